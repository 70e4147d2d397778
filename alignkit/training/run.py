"""A run that trains a generator, by any method: what it loads, and how a round gets its experience.

`learner.py` turns experience into optimizer steps; `loop.py` does what is around the rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import RecipeError
from alignkit.inference.comparison import Comparison, compare
from alignkit.objectives.advantages import group_statistics
from alignkit.policy import Conditioning
from alignkit.policy.adapters import denoisers
from alignkit.policy.memory import checkpointing
from alignkit.rewards import Weighted
from alignkit.rewards.embedding import embedding
from alignkit.training import checkpoint, finish, loop
from alignkit.training.adversary import adversary_of
from alignkit.training.assess import Assessment, assess
from alignkit.training.data_anchor import alarm
from alignkit.training.divergence import path_kl
from alignkit.training.experience import Experience, join_scores
from alignkit.training.gather import Gather
from alignkit.training.grpo import GRPO
from alignkit.training.learner import Learner, numbered
from alignkit.training.loop import Session, State
from alignkit.training.progress import Display
from alignkit.training.recipe import Recipe, RewardSpec
from alignkit.training.recipe_files import TRAINERS, AnyRecipe, Source, reload, save
from alignkit.training.replay import Replay
from alignkit.training.reward_model import RewardModel, RewardTraining
from alignkit.training.run_dir import RunDir
from alignkit.training.runtime import Runtime
from alignkit.training.scoring import Scoring, Worker
from alignkit.training.seeds import generators, global_state, restore_global_state
from alignkit.training.setup import available, data_of, policy_of, prompts_of
from alignkit.training.shaped import Shaped
from alignkit.training.signals import Interrupted, StopFlag
from alignkit.training.transforms import transformed
from alignkit.types import Prompt


class Run:
    """One run in this process: everything that was loaded, and the state that a checkpoint holds."""

    def __init__(self, recipe: Recipe, directory: RunDir, flag: StopFlag) -> None:
        self.recipe, self.directory, self.flag = recipe, directory, flag
        self.runtime = Runtime(recipe.precision)
        self.display = Display(recipe.steps, enabled=self.runtime.main)
        data = data_of(recipe)
        self.prompts, self.held_out = prompts_of(recipe, data)
        if data is not None:
            self.display.say(data.sentence(recipe.group_size))
            recipe.check_data(data)
        own = recipe.prompts_per_step // self.runtime.world
        if own % recipe.updates:
            raise RecipeError(
                f"updates={recipe.updates} does not split the {own} prompts of each of {self.runtime.world} processes; "
                f"use a divisor of {own}"
            )
        self.rewards = Weighted(recipe.rewards, recipe.on_error, recipe.reward_timeout)
        judges = available(recipe.judges, self.display.say)
        self.rewards.check_prompts(self.prompts if data is None else self.held_out)
        self.rewards.and_judges(judges).check_prompts(self.held_out)
        self.policy = policy_of(recipe, self.runtime)
        self.open = ExitStack()
        self.open.callback(self.policy.close)
        self.open.enter_context(checkpointing(denoisers(self.policy.pipe), on=recipe.gradient_checkpointing))
        self.open.callback(self.runtime.track(recipe.tracker, directory.folder))
        self._ready_rewards(judges)
        recipe = self.recipe = recipe.bound(self.policy)
        self.gather = Gather(recipe, self.policy, self.scoring, self.runtime, self.prompts, data, flag.poll)
        self.learner = Learner(
            recipe, self.policy, self.runtime, self.display.say, self._replay(), self.gather.anchor()
        )
        self.parameters, self.optimizer = self.learner.parameters, self.learner.optimizer
        self.adversary = adversary_of(
            recipe.critic,
            self.rewards,
            self.prompts,
            recipe.seed,
            self.runtime,
            self.display.say,
            recipe.reward_device,
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
        shaping = recipe.diversity_shaping if isinstance(recipe, Shaped) else None
        embed = shaping and embedding(shaping, self.rewards.rewards)
        worker = Worker() if recipe.rewards_beside else None
        if worker is not None:
            self.open.callback(worker.close)
        self.scoring = Scoring(self.rewards, embed or None, recipe.reward_device, worker)
        self.judging = Scoring(self.judges, None, recipe.reward_device, None if self.judges.of_policy else worker)
        if isinstance(recipe, Shaped) and recipe.transform == "log_sigmoid" and self.rewards.groupwise:
            raise RecipeError(
                "transform='log_sigmoid' compares with the base, and win rates have no value of their own"
            )

    def _replay(self) -> Replay | None:
        recipe = self.recipe
        if not isinstance(recipe, GRPO) or not recipe.replay:
            return None
        if self.runtime.world > 1:
            raise RecipeError(
                f"replay={recipe.replay} on {self.runtime.world} processes: they would run different numbers of "
                "denoiser calls; use replay=0"
            )
        return Replay(recipe.replay, recipe.replay_rounds, self.prompts, self._encode)

    def _encode(self, prompts: list[Prompt]) -> Conditioning:
        """Prompts of one shape as a round conditions on them."""
        return self.gather.conditions(prompts)[0]

    # assessments

    def assess(
        self, prompts: list[Prompt], call: dict[str, Any], *, own_scheduler: bool = False, guided: bool = False
    ) -> Assessment:
        """Held-out prompts with the weights in force, guided if the recipe trains the guided output or asked to be."""
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
                guided=guided or recipe.train_guidance == "same",
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
        found = {**finish.measures(self.assess(prompts, dict(self.recipe.call)), self.judges), **self.distances()}
        self._watch_data(found)
        return {f"heldout/{name}": value for name, value in found.items()}

    def distances(self) -> dict[str, float]:
        """How far the weights in force are from the base: KL of the sampler's paths, denoising loss on data."""
        recipe, found = self.recipe, dict[str, float]()
        with self.runtime.autocast():
            if recipe.kl_prompts:
                cond = self._encode(self.held_out[: recipe.kl_prompts])
                rng = generators(len(cond), recipe.seed, "kl")
                found["kl"] = float(path_kl(self.policy, cond, rng, self.flag.poll).mean())
            if self.learner.anchor is not None:
                found["data_loss"] = self.learner.anchor.loss(self.policy, recipe.seed, recipe.eval_batch)
        return found

    def _watch_data(self, found: Mapping[str, float]) -> None:
        """Say so where the denoising loss on data has risen too far."""
        first, now = self.state.baseline["distances"].get("data_loss"), found.get("data_loss")
        if first is not None and now is not None and (sentence := alarm(first, now)):
            self.display.say(sentence)

    def round(self, step: int) -> dict[str, float]:
        """Collect experience, turn rewards into advantages, update; interrupted, it is as if it had not begun."""
        gathered, drawn = self.gather.state(), global_state()
        try:
            return self._round(step)
        except Interrupted:
            self.gather.load(gathered)
            restore_global_state(*drawn)
            raise

    def _round(self, step: int) -> dict[str, float]:
        recipe, weights = self.recipe, self.rewards.weights
        experiences = self.collect(step)
        raw = join_scores([e.scores for e in experiences])
        groups = numbered([e.groups for e in experiences])
        prompts = [prompt for e in experiences for prompt in e.cond.prompts]
        scores = raw
        if isinstance(recipe, Shaped):
            scores = transformed(recipe, raw, weights, groups, prompts, self.gather.base)
        kept = [e.features for e in experiences if e.features is not None]
        weighed, live = recipe.weigh(scores, weights, groups, torch.cat(kept) if kept else None)
        known = {n: v for n, v in raw.parts.items() if not bool(v.isnan().all())}  # others applied to no sample
        metrics = {f"reward/{n}": float(v.double().nanmean()) for n, v in known.items()}
        metrics |= {"reward/total": float(raw.total.double().nanmean())}
        metrics |= {f"reward/{n}_failed": float(c) for n, c in raw.failed.items() if c}
        metrics |= {f"reward/{n}": v for n, v in self.rewards.counted().items()}
        if scores is not raw:
            metrics |= {f"transformed/{n}": float(v.double().nanmean()) for n, v in scores.parts.items() if weights[n]}
        metrics |= {f"groups/{n}": v for n, v in group_statistics(scores.total, groups).items()}
        metrics |= recipe.measured(weighed, live)
        if self.adversary is None or self.adversary.policy_trains(step):
            metrics |= self.learner.learn(step, experiences, weighed, live, self.flag.poll)
        if self.adversary is not None:
            shown = [(e.media, e.cond.prompts) for e in experiences if e.media is not None]
            metrics |= self.adversary.step(step, shown)
        return metrics

    def collect(self, step: int) -> list[Experience]:
        """P prompts, G samples each, with their scores."""
        return self.gather.collect(step)

    # commits

    def tensors(self) -> dict[str, torch.Tensor]:
        """Trained weights and their companions, groups that may be trained on again, critics."""
        own = {f"weights/{k}": v for k, v in self.policy.weights.state().items()}
        own |= self.learner.replay.tensors() if self.learner.replay is not None else {}
        return own | (self.adversary.tensors() if self.adversary is not None else {})

    def values(self) -> dict[str, Any]:
        """Which prompts come next, and what was learned of the base."""
        replay = self.learner.replay
        return self.gather.state() | ({"replay": replay.values()} if replay is not None else {})

    def load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint held."""
        own = "weights/"
        self.policy.weights.load({k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)})
        self.gather.load(dict(values))
        if self.learner.replay is not None:
            self.learner.replay.load(tensors, values["replay"], self.runtime.device)
        if self.adversary is not None:
            self.adversary.load(tensors)


def start(recipe: AnyRecipe, folder: Path, source: Source | None = None, command: list[str] | None = None) -> Path:
    """Run a recipe in a new run directory; returns the folder.

    Raises:
        RecipeError: a combination that cannot work.
        CheckpointError: the folder already holds a run.
        SystemExit: the run was asked to stop (128 + signal); it can be resumed.
    """
    if isinstance(recipe, Comparison):
        return _compared(recipe, folder, source, command)
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
    if isinstance(recipe, Comparison):
        with checkpoint.lock(folder):
            return compare(recipe, folder)
    with checkpoint.lock(folder) if loop.first_process() else nullcontext():
        return loop.drive(session_of(recipe), RunDir(folder), command, again=True)


def _compared(recipe: Comparison, folder: Path, source: Source | None, command: list[str] | None) -> Path:
    """Run a comparison in a new run directory."""
    recipe.validate()
    directory = RunDir.create(folder)
    with checkpoint.lock(folder):
        save(folder, recipe, source)
        directory.write_environment("cuda" if torch.cuda.is_available() else "cpu", command or sys.argv)
        return compare(recipe, folder)


def session_of(recipe: AnyRecipe) -> Callable[[RunDir, StopFlag], Session]:
    """What trains this kind of recipe. Raises RecipeError where nothing does."""
    if isinstance(recipe, Recipe):
        return partial(Run, recipe)
    if isinstance(recipe, RewardModel):
        return partial(RewardTraining, recipe)
    raise RecipeError(f"there is no trainer for {type(recipe).__name__}; use {' or '.join(TRAINERS)}")
