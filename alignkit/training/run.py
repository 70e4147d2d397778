"""A run of policy-gradient training: what it loads, and one round of it; `loop.py` does what is around the rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignkit.data.sampler import GroupSampler
from alignkit.errors import RecipeError
from alignkit.flow.plan import Plan
from alignkit.objectives.advantages import group_statistics
from alignkit.policy import Conditioning
from alignkit.policy.adapters import denoisers
from alignkit.policy.memory import checkpointing
from alignkit.rewards import Weighted
from alignkit.rewards.embedding import embedding
from alignkit.training import checkpoint, finish, grpo, loop
from alignkit.training.assess import Assessment, assess
from alignkit.training.experience import Experience, collect, conditions, join_scores
from alignkit.training.grpo import GRPO
from alignkit.training.loop import Session, State
from alignkit.training.progress import Display
from alignkit.training.recipe import RewardSpec
from alignkit.training.recipe_files import TRAINERS, AnyRecipe, Source, reload, save
from alignkit.training.replay import Replay
from alignkit.training.reward_model import RewardModel, RewardTraining
from alignkit.training.run_dir import RunDir
from alignkit.training.runtime import Runtime
from alignkit.training.scoring import Scoring, Worker
from alignkit.training.seeds import generator, global_state, restore_global_state
from alignkit.training.setup import available, policy_of, prompts_of
from alignkit.training.signals import Interrupted, StopFlag
from alignkit.training.transforms import BaseRewards, pooled_squares, transformed
from alignkit.training.update import Piece, accumulate, averages, minibatches
from alignkit.types import Prompt


class Run:
    """One run in this process: everything that was loaded, and the state that a checkpoint holds."""

    def __init__(self, recipe: GRPO, directory: RunDir, flag: StopFlag) -> None:
        self.recipe, self.directory, self.flag = recipe, directory, flag
        self.runtime = Runtime(recipe.precision)
        self.display = Display(recipe.steps, enabled=self.runtime.main)
        self.prompts, self.held_out = prompts_of(recipe)
        self.rewards = Weighted(recipe.rewards, recipe.on_error, recipe.reward_timeout)
        judges = available(recipe.judges, self.display.say)
        self.rewards.check_prompts(self.prompts)
        self.rewards.and_judges(judges).check_prompts(self.held_out)
        world = (self.runtime.rank, self.runtime.world)
        self.sampler = GroupSampler(self.prompts, recipe.prompts_per_step, recipe.seed, *world)
        self.policy = policy_of(recipe, self.runtime)
        self.open = ExitStack()
        self.open.callback(self.policy.close)
        self.open.enter_context(checkpointing(denoisers(self.policy.pipe), on=recipe.gradient_checkpointing))
        self.open.callback(self.runtime.track(recipe.tracker, directory.folder))
        self._ready_rewards(judges)
        self.parameters = self.policy.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=recipe.adam_betas, weight_decay=recipe.weight_decay
        )
        self.state = State()

    def _ready_rewards(self, judges: Sequence[RewardSpec]) -> None:
        """Bind rewards to the policy, read their weights, say where they are computed."""
        recipe = self.recipe
        self.rewards.bind(self.policy)
        self.judges = self.rewards.and_judges(judges)
        self.judges.bind(self.policy)
        self.rewards.prepare()
        self.judges.prepare()
        embed = recipe.diversity_shaping and embedding(recipe.diversity_shaping, self.rewards.rewards)
        worker = Worker() if recipe.rewards_beside else None
        if worker is not None:
            self.open.callback(worker.close)
        self.scoring = Scoring(self.rewards, embed or None, recipe.reward_device, worker)
        self.judging = Scoring(self.judges, None, recipe.reward_device, None if self.judges.of_policy else worker)
        if recipe.transform == "log_sigmoid" and self.rewards.groupwise:
            raise RecipeError(
                "transform='log_sigmoid' compares with the base, and win rates have no value of their own"
            )
        if recipe.replay and self.runtime.world > 1:
            raise RecipeError(
                f"replay={recipe.replay} on {self.runtime.world} processes: they would run different numbers of "
                "denoiser calls; use replay=0"
            )
        self.base = BaseRewards()
        self.replay = Replay(recipe.replay, recipe.replay_rounds, self.prompts, self._encode) if recipe.replay else None

    def _encode(self, prompts: list[Prompt]) -> Conditioning:
        """Prompts of one shape as a round conditions on them."""
        recipe = self.recipe
        with self.runtime.autocast():
            return conditions(
                self.policy, prompts, recipe.num_steps, recipe.seed, recipe.call, recipe.train_guidance == "same"
            )[0]

    # assessments

    def assess(self, prompts: list[Prompt], call: dict[str, Any], *, own_scheduler: bool = False) -> Assessment:
        """Held-out prompts with the weights in force."""
        recipe = self.recipe
        with self.runtime.autocast():
            return assess(
                self.policy,
                prompts,
                self.judging,
                num_steps=recipe.eval_steps or recipe.num_steps,
                seed=recipe.seed,
                call=call,
                batch=recipe.eval_batch,
                poll=self.flag.poll,
                guided=recipe.train_guidance == "same",
                own_scheduler=own_scheduler,
            )

    # rounds

    def before(self) -> dict[str, Any]:
        """The base on the held-out prompts."""
        self.display.say(f"assessing the base on {len(self.held_out)} held-out prompts")
        return finish.baseline(self)

    def finish(self) -> None:
        """The aligned model on the same prompts; what the user takes away."""
        self.display.say("assessing the aligned model")
        finish.write(self)

    def curve(self) -> dict[str, float]:
        """A small held-out assessment for the report's curves."""
        prompts = self.held_out[: self.recipe.eval_curve_prompts]
        found = finish.measures(self.assess(prompts, dict(self.recipe.call)), self.judges)
        return {f"heldout/{name}": value for name, value in found.items()}

    def round(self, step: int) -> dict[str, float]:
        """Collect experience, turn rewards into advantages, update; interrupted, it is as if it had not begun."""
        cursor, drawn, base = self.sampler.state_dict(), global_state(), self.base.state()
        try:
            return self._round(step)
        except Interrupted:
            self.sampler.load_state_dict(cursor)
            restore_global_state(*drawn)
            self.base.load(base)
            raise

    def _round(self, step: int) -> dict[str, float]:
        recipe, weights = self.recipe, self.rewards.weights
        experiences = self.collect(step)
        raw = join_scores([e.scores for e in experiences])
        groups = _numbered([e.groups for e in experiences])
        prompts = [prompt for e in experiences for prompt in e.cond.prompts]
        scores = transformed(recipe, raw, weights, groups, prompts, self.base)
        kept = [e.features for e in experiences if e.features is not None]
        advantage, live = grpo.advantages(recipe, scores, weights, groups, torch.cat(kept) if kept else None)
        metrics = {f"reward/{n}": float(v.double().nanmean()) for n, v in raw.parts.items()}
        metrics |= {"reward/total": float(raw.total.double().nanmean())}
        metrics |= {f"reward/{n}_failed": float(c) for n, c in raw.failed.items() if c}
        metrics |= {f"reward/{n}": v for n, v in self.rewards.counted().items()}
        if scores is not raw:
            metrics |= {f"transformed/{n}": float(v.double().nanmean()) for n, v in scores.parts.items() if weights[n]}
        metrics |= {f"groups/{n}": v for n, v in group_statistics(scores.total, groups).items()}
        metrics |= self.update(step, experiences, advantage, live)
        return metrics

    def collect(self, step: int) -> list[Experience]:
        """P prompts, G samples each, sampled with the current weights and scored."""
        recipe = self.recipe
        prompts, plan = next(self.sampler), recipe.plan_for(step)
        if recipe.transform == "log_sigmoid":
            self._measure_base(prompts, plan, step)
        return self._sample(prompts, plan, recipe.group_size, (recipe.seed, "rollout", step))

    def _sample(
        self, prompts: list[Prompt], plan: Plan, group_size: int, key: tuple[int | str, ...]
    ) -> list[Experience]:
        """Groups of samples with the weights in force, scored."""
        recipe = self.recipe
        first = self.runtime.rank * len(prompts) * group_size
        guided = recipe.train_guidance == "same"
        made: list[Experience] = []
        with self.runtime.autocast():
            for cond in conditions(self.policy, prompts, recipe.num_steps, recipe.seed, recipe.call, guided):
                made.append(
                    collect(
                        self.policy,
                        cond,
                        plan,
                        self.scoring,
                        group_size=group_size,
                        batch=recipe.rollout_batch,
                        key=key,
                        first=first,
                        reduce=recipe.reduce,
                        poll=self.flag.poll,
                    )
                )
                first += len(made[-1].groups)
        return made

    def _measure_base(self, prompts: list[Prompt], plan: Plan, step: int) -> None:
        """What the untrained weights get on prompts that are new to the run, sampled as a round is."""
        recipe = self.recipe
        new = [prompt for prompt in prompts if prompt.id not in self.base.good]
        if not new:
            return
        with self.policy.reference():
            made = self._sample(new, plan, recipe.transform_samples, (recipe.seed, "base", step))
        scores = join_scores([e.scores for e in made])
        owners = [prompt for e in made for prompt in e.cond.prompts]
        self.base.learn(scores, owners, recipe.transform_quantile)
        if not self.base.spread:
            groups = torch.tensor([prompt.id for prompt in owners])
            for name, part in scores.parts.items():
                squares, count = (self.runtime.sum(float(v)) for v in pooled_squares(part, groups))
                self.base.spread[name] = (squares / max(count, 1.0)) ** 0.5

    def update(
        self, step: int, experiences: list[Experience], advantage: torch.Tensor, live: torch.Tensor
    ) -> dict[str, float]:
        """The recipe's optimizer steps over one round; the learning rate follows the recipe's schedule."""
        recipe, metrics = self.recipe, {}
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        shares = minibatches(experiences, advantage, live, recipe.updates, drop=self.runtime.world == 1)
        if self.replay is not None:
            metrics |= self._replayed(step, shares, experiences, live)

        def loss_of(cond: Any, record: Any, weight: torch.Tensor) -> Any:
            return grpo.policy_step(self.policy, cond, record, weight, recipe)

        for number, share in enumerate(shares):
            if self.runtime.max(len(share)) == 0:
                continue
            poll = self.flag.poll if number == 0 else _never
            logs = accumulate(self.runtime, share, recipe.micro_batch, loss_of, poll)
            if number == 0 and "ratio" in logs:
                metrics |= self._first_ratio(step, logs["ratio"])
            norm = self.runtime.optimizer_step(self.optimizer, self.parameters, recipe.max_grad_norm)
            named = averages({n: v for n, v in logs.items() if not n.endswith("ratio")})
            metrics |= {f"policy/{n}": v for n, v in named.items()} | {"policy/grad_norm": norm}
            for name in logs.keys() & {"ratio", "replay_ratio"}:
                metrics[f"policy/{name}_max_dev"] = max(float((r - 1).abs().max()) for r in logs[name])
        if step == 0:
            self.runtime.check_equal(self.parameters)
        if recipe.ema_decay is not None:
            self.policy.snapshot("ema", recipe.ema_decay)
        if self.replay is not None:
            self.replay.keep(experiences, advantage, live, step)
        return metrics

    def _replayed(
        self, step: int, shares: list[list[Piece]], experiences: list[Experience], live: torch.Tensor
    ) -> dict[str, float]:
        """Put groups of earlier rounds where the shares have the fewest samples, one for each group without signal."""
        assert self.replay is not None
        groups = _numbered([e.groups for e in experiences])
        missing = len(groups.unique()) - len(groups[live.cpu()].unique())
        pieces = self.replay.refill(missing, step, generator(self.recipe.seed, "replay", step))
        for piece in pieces:
            min(shares, key=lambda share: sum(len(p.rows) for p in share)).append(piece)
        ages = [piece.experience.age for piece in pieces]
        return {"replay/groups": float(len(pieces))} | ({"replay/age": sum(ages) / len(ages)} if ages else {})

    def _first_ratio(self, step: int, ratios: list[torch.Tensor]) -> dict[str, float]:
        """The on-policy self-check: before the first update of a round nothing has changed yet."""
        worst = max(float((r - 1).abs().max()) for r in ratios)
        if step == 0:
            self.display.say(
                f"on-policy check: max |ratio - 1| = {worst * 1e6:.2f}e-6 before the first update. It must be 0 up to "
                "rounding: rollout and training compute the same Gaussian. After it, ratios move away from 1 as the "
                "weights do; with updates=1 they are always 1, and that is right."
            )
        return {"policy/ratio_first_dev": worst}

    # commits

    def tensors(self) -> dict[str, torch.Tensor]:
        """The policy's trained weights and their companions, and the groups that may be trained on again."""
        own = {f"weights/{k}": v for k, v in self.policy.weights.state().items()}
        return own | (self.replay.tensors() if self.replay is not None else {})

    def values(self) -> dict[str, Any]:
        """Which prompts come next, and what was learned of the base."""
        own = {"sampler": self.sampler.state_dict(), "base": self.base.state()}
        return own | ({"replay": self.replay.values()} if self.replay is not None else {})

    def load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint held."""
        own = "weights/"
        self.policy.weights.load({k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)})
        self.sampler.load_state_dict(values["sampler"])
        self.base.load(values["base"])
        if self.replay is not None:
            self.replay.load(tensors, values["replay"], self.runtime.device)


def _never() -> None:
    """After a round's first update there is no clean state to stop in, so the round is finished first."""


def _numbered(groups: list[torch.Tensor]) -> torch.Tensor:
    """Group numbers that do not repeat between experiences."""
    offsets = [0]
    for g in groups:
        offsets.append(offsets[-1] + int(g.max()) + 1)
    return torch.cat([g + o for g, o in zip(groups, offsets, strict=False)])


def start(recipe: AnyRecipe, folder: Path, source: Source | None = None, command: list[str] | None = None) -> Path:
    """Run a recipe in a new run directory; returns the folder.

    Raises:
        RecipeError: a combination that cannot work.
        CheckpointError: the folder already holds a run.
        SystemExit: the run was asked to stop (128 + signal); it can be resumed.
    """
    session = session_of(recipe)
    recipe.validate()
    if not loop.first_process():
        return loop.drive(session, RunDir(folder), command)
    directory = RunDir.create(folder)
    with checkpoint.lock(folder):
        save(folder, recipe, source)
        return loop.drive(session, directory, command)


def resume(folder: Path, command: list[str] | None = None) -> Path:
    """Continue a run from its newest commit, bit for bit; from step 0, with a sentence, if it has none."""
    recipe, _ = reload(folder)
    with checkpoint.lock(folder) if loop.first_process() else nullcontext():
        return loop.drive(session_of(recipe), RunDir(folder), command, again=True)


def session_of(recipe: AnyRecipe) -> Callable[[RunDir, StopFlag], Session]:
    """What trains this kind of recipe. Raises RecipeError where nothing does."""
    if isinstance(recipe, GRPO):
        return partial(Run, recipe)
    if isinstance(recipe, RewardModel):
        return partial(RewardTraining, recipe)
    raise RecipeError(f"there is no trainer for {type(recipe).__name__}; use {' or '.join(TRAINERS)}")
