"""The one loop: assess the base, train in rounds with commits, assess again, write what a user takes away."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkit.data.sampler import GroupSampler
from alignkit.errors import CheckpointError, RecipeError
from alignkit.objectives.advantages import group_statistics
from alignkit.policy.adapters import denoisers
from alignkit.policy.memory import checkpointing
from alignkit.rewards import Weighted
from alignkit.training import checkpoint, finish, grpo
from alignkit.training.assess import Assessment, assess
from alignkit.training.experience import Experience, collect, conditions, join_scores
from alignkit.training.grpo import GRPO
from alignkit.training.progress import Display
from alignkit.training.recipe import Recipe
from alignkit.training.recipe_files import Source, reload, save
from alignkit.training.run_dir import RunDir
from alignkit.training.runtime import Runtime
from alignkit.training.seeds import global_state, restore_global_state
from alignkit.training.setup import available, policy_of, prompts_of
from alignkit.training.signals import Interrupted, StopFlag, listening
from alignkit.training.update import accumulate, averages, minibatches
from alignkit.types import Prompt


@dataclass
class State:
    """What changes while a run goes on, beside the weights."""

    step: int = 0
    trained_seconds: float = 0.0
    baseline: dict[str, Any] = field(default_factory=dict)
    finished_training: bool = False


class Run:
    """One run in this process: everything that was loaded, and the state that a checkpoint holds."""

    def __init__(self, recipe: GRPO, directory: RunDir, flag: StopFlag) -> None:
        self.recipe, self.directory, self.flag = recipe, directory, flag
        self.runtime = Runtime(recipe.precision)
        self.display = Display(recipe.steps, enabled=self.runtime.main)
        self.prompts, self.held_out = prompts_of(recipe)
        self.rewards = Weighted(recipe.rewards, recipe.on_error, recipe.reward_timeout)
        judges = {**recipe.rewards, **dict.fromkeys(available(recipe.judges, self.display.say), 0.0)}
        self.judges = Weighted(judges, recipe.on_error, recipe.reward_timeout)
        self.rewards.check_prompts(self.prompts)
        self.judges.check_prompts(self.held_out)
        world = (self.runtime.rank, self.runtime.world)
        self.sampler = GroupSampler(self.prompts, recipe.prompts_per_step, recipe.seed, *world)
        self.policy = policy_of(recipe, self.runtime)
        self.open = ExitStack()
        self.open.callback(self.policy.close)
        self.open.enter_context(checkpointing(denoisers(self.policy.pipe), on=recipe.gradient_checkpointing))
        self.open.callback(self.runtime.track(recipe.tracker, directory.folder))
        self.parameters = self.policy.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=recipe.adam_betas, weight_decay=recipe.weight_decay
        )
        self.state = State()
        self.committed = -1
        self.commit_time = time.monotonic()

    # assessments

    def assess(self, prompts: list[Prompt], call: dict[str, Any], *, own_scheduler: bool = False) -> Assessment:
        """Held-out prompts with the weights in force."""
        recipe = self.recipe
        with self.runtime.autocast():
            return assess(
                self.policy,
                prompts,
                self.judges,
                num_steps=recipe.eval_steps or recipe.num_steps,
                seed=recipe.seed,
                call=call,
                batch=recipe.eval_batch,
                poll=self.flag.poll,
                guided=recipe.train_guidance == "same",
                own_scheduler=own_scheduler,
            )

    # rounds

    def train(self) -> None:
        """Rounds until the recipe's number or its time limit."""
        limit = self.recipe.time_limit
        self.display.start(self.state.step)
        try:
            while self.state.step < self.recipe.steps and not (limit and self.state.trained_seconds >= limit):
                began = time.monotonic()
                metrics = self.round(self.state.step)
                self.state.step += 1
                seconds = time.monotonic() - began
                self.state.trained_seconds += seconds
                if self._curve_is_due():
                    metrics |= self.curve()
                if self.runtime.main:
                    metrics["time/step_seconds"] = seconds
                    self.directory.log(self.state.step, metrics)
                    self.runtime.log(self.state.step, metrics)
                    self.display.step(self.state.step, metrics)
                self.runtime.wait()
                if time.monotonic() - self.commit_time >= self.recipe.checkpoint_seconds:
                    self.commit()
                self.flag.poll()
        finally:
            self.display.stop()
        self.state.finished_training = True
        self.commit()

    def _curve_is_due(self) -> bool:
        every = self.recipe.eval_every
        return every > 0 and self.state.step % every == 0 and self.runtime.main

    def curve(self) -> dict[str, float]:
        """A small held-out assessment for the report's curves."""
        prompts = self.held_out[: self.recipe.eval_curve_prompts]
        found = finish.measures(self.assess(prompts, dict(self.recipe.call)), self.judges)
        return {f"heldout/{name}": value for name, value in found.items()}

    def round(self, step: int) -> dict[str, float]:
        """Collect experience, turn rewards into advantages, update."""
        recipe, cursor = self.recipe, self.sampler.state_dict()
        try:
            experiences = self.collect(step)
            scores = join_scores([e.scores for e in experiences])
            groups = _numbered([e.groups for e in experiences])
            advantage, live = grpo.advantages(recipe, scores, self.rewards.weights, groups)
        except Interrupted:
            self.sampler.load_state_dict(cursor)  # nothing was updated: the round can begin again
            raise
        metrics = {f"reward/{n}": float(v.double().nanmean()) for n, v in scores.parts.items()}
        metrics |= {"reward/total": float(scores.total.double().nanmean())}
        metrics |= {f"reward/{n}_failed": float(c) for n, c in scores.failed.items() if c}
        metrics |= {f"groups/{n}": v for n, v in group_statistics(scores.total, groups).items()}
        metrics |= self.update(step, experiences, advantage, live)
        return metrics

    def collect(self, step: int) -> list[Experience]:
        """P prompts, G samples each, sampled with the current weights and scored."""
        recipe = self.recipe
        prompts, plan = next(self.sampler), recipe.plan_for(step)
        first = self.runtime.rank * len(prompts) * recipe.group_size
        guided = recipe.train_guidance == "same"
        made: list[Experience] = []
        with self.runtime.autocast():
            for cond in conditions(self.policy, prompts, recipe.num_steps, recipe.seed, recipe.call, guided):
                made.append(
                    collect(
                        self.policy,
                        cond,
                        plan,
                        self.rewards,
                        group_size=recipe.group_size,
                        batch=recipe.rollout_batch,
                        key=(recipe.seed, "rollout", step),
                        first=first,
                        reduce=recipe.reduce,
                        poll=self.flag.poll,
                    )
                )
                first += len(made[-1].groups)
        return made

    def update(
        self, step: int, experiences: list[Experience], advantage: torch.Tensor, live: torch.Tensor
    ) -> dict[str, float]:
        """The recipe's optimizer steps over one round; the learning rate follows the recipe's schedule."""
        recipe, metrics = self.recipe, {}
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        shares = minibatches(experiences, advantage, live, recipe.updates, drop=self.runtime.world == 1)

        def loss_of(cond: Any, record: Any, weight: torch.Tensor) -> Any:
            return grpo.policy_step(self.policy, cond, record, weight, recipe)

        for number, share in enumerate(shares):
            if self.runtime.max(len(share)) == 0:
                continue
            poll = self.flag.poll if number == 0 else _never
            logs = accumulate(self.runtime, share, recipe.micro_batch, loss_of, poll)
            if number == 0:
                metrics |= self._first_ratio(step, logs["ratio"])
            norm = self.runtime.optimizer_step(self.optimizer, self.parameters, recipe.max_grad_norm)
            named = averages({n: v for n, v in logs.items() if n != "ratio"})
            metrics |= {f"policy/{n}": v for n, v in named.items()} | {"policy/grad_norm": norm}
            metrics["policy/ratio_max_dev"] = max(float((r - 1).abs().max()) for r in logs["ratio"])
        if step == 0:
            self.runtime.check_equal(self.parameters)
        if recipe.ema_decay is not None:
            self.policy.snapshot("ema", recipe.ema_decay)
        return metrics

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

    def commit(self) -> None:
        """Write the state of this moment, on the main process."""
        self.commit_time = time.monotonic()
        if not self.runtime.main or (self.committed == self.state.step and not self.state.finished_training):
            return
        tensors = {f"weights/{k}": v for k, v in self.policy.weights.state().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in slots.items()}
        rng, rest = global_state()
        values = {
            "step": self.state.step,
            "trained_seconds": self.state.trained_seconds,
            "baseline": self.state.baseline,
            "finished_training": self.state.finished_training,
            "sampler": self.sampler.state_dict(),
            "rng": rest,
            "scaler": self.runtime.scaler.state_dict() if self.runtime.scaler else None,
        }
        keep = self.recipe.keep_checkpoints
        checkpoint.commit(self.directory.checkpoints, self.state.step, {**tensors, "rng/torch": rng}, values, keep)
        self.committed = self.state.step

    def restore(self) -> bool:
        """Continue from the newest commit; False where there is none."""
        found = checkpoint.newest(self.directory.checkpoints, self.display.say)
        if found is None:
            return False
        tensors, values = dict(found.tensors), found.values
        restore_global_state(tensors.pop("rng/torch"), values["rng"])
        weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        self.policy.weights.load(weights)
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if self.runtime.scaler and values["scaler"]:
            self.runtime.scaler.load_state_dict(values["scaler"])
        self.sampler.load_state_dict(values["sampler"])
        names = ("step", "trained_seconds", "baseline", "finished_training")
        self.state = State(**{n: values[n] for n in names})
        self.committed = self.state.step
        return True


def _never() -> None:
    """After a round's first update there is no clean state to stop in, so the round is finished first."""


def _numbered(groups: list[torch.Tensor]) -> torch.Tensor:
    """Group numbers that do not repeat between experiences."""
    offsets = [0]
    for g in groups:
        offsets.append(offsets[-1] + int(g.max()) + 1)
    return torch.cat([g + o for g, o in zip(groups, offsets, strict=False)])


def start(recipe: Recipe, folder: Path, source: Source | None = None, command: list[str] | None = None) -> Path:
    """Run a recipe in a new run directory; returns the folder.

    Raises:
        RecipeError: a combination that cannot work.
        CheckpointError: the folder already holds a run.
        SystemExit: the run was asked to stop (128 + signal); it can be resumed.
    """
    recipe = _supported(recipe)
    recipe.validate()
    if not _first_process():
        return _drive(recipe, RunDir(folder), command or sys.argv)
    directory = RunDir.create(folder)
    with checkpoint.lock(folder):
        save(folder, recipe, source)
        return _drive(recipe, directory, command or sys.argv)


def resume(folder: Path, command: list[str] | None = None) -> Path:
    """Continue a run from its newest commit, bit for bit; from step 0, with a sentence, if it has none."""
    recipe, _ = reload(folder)
    with checkpoint.lock(folder) if _first_process() else nullcontext():
        return _drive(_supported(recipe), RunDir(folder), command or sys.argv, again=True)


def _first_process() -> bool:
    """Whether this process owns the run directory; launchers say which one it is before anything is loaded."""
    return os.environ.get("RANK", "0") == "0"


def _supported(recipe: Recipe) -> GRPO:
    if not isinstance(recipe, GRPO):
        raise RecipeError(f"there is no trainer for {type(recipe).__name__}; use GRPO")
    return recipe


def _drive(recipe: GRPO, directory: RunDir, command: list[str], again: bool = False) -> Path:
    with listening() as flag:
        run = Run(recipe, directory, flag)
        try:
            if run.runtime.main:
                directory.write_environment(str(run.runtime.device), command)
            resumed = again and run.restore()
            if again:
                word = (
                    f"resuming at step {run.state.step}"
                    if resumed
                    else "there is no committed checkpoint; starting from step 0"
                )
                run.display.say(word)
                if run.runtime.main:
                    directory.cut_metrics(run.state.step if resumed else -1)
            _phases(run)
        except Interrupted as stop:
            _stopped(run, stop)
        finally:
            run.open.close()
    return directory.folder


def _phases(run: Run) -> None:
    if run.runtime.main and not run.state.baseline:
        run.display.say(f"assessing the base on {len(run.held_out)} held-out prompts")
        run.state.baseline = finish.baseline(run)
    run.runtime.wait()
    if run.committed < 0:
        run.commit()
    if not run.state.finished_training:
        run.train()
    if run.runtime.main:
        run.display.say("assessing the aligned model")
        finish.write(run)
    run.runtime.wait()


def _stopped(run: Run, stop: Interrupted) -> None:
    """Save what is whole, say how to go on, leave with 128 + signal."""
    try:
        if run.state.baseline:
            run.commit()
    except CheckpointError as error:
        run.display.say(str(error))
    where = f"step {run.committed} is saved" if run.committed >= 0 else "nothing is saved yet"
    run.display.say(f"stopped by {stop}; {where}. Go on with: alignkit resume {run.directory.folder}")
    raise SystemExit(stop.exit_code)
