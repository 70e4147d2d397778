"""Methods of guidance compared on one pipeline: same prompts, same noise, several seeds, judges that none of them saw.

1. Every contender (`Arm`) draws one sample per prompt and seed; contenders share the noise streams of a seed.
2. All samples are scored by the same rewards and judges.
3. Scores are averaged over the seeds of a prompt; differences to the first contender are paired by prompt, with
   bootstrap intervals. Diversity is that of the samples of one prompt over the seeds.
4. `summary.json` and samples side by side are written, and from them a table (`table.md`), a picture (`comparison.png`)
   and `report.html`.

Every contender's samples of every seed are kept as they come: a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from alignkit.data.prompts import load_prompts
from alignkit.errors import RecipeError
from alignkit.evaluation.diversity import within_groups
from alignkit.evaluation.paired import paired
from alignkit.flow.transition import per_sample_generators
from alignkit.inference.guide import guide, method_of
from alignkit.inference.method import Calls
from alignkit.inference.sampling import Sample, add_loras, open_pipeline, parse_lora
from alignkit.inference.side_by_side import Column, side_by_side
from alignkit.policy import Policy
from alignkit.rewards import Reward, load
from alignkit.shipped import resolved
from alignkit.types import Prompt


@dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        method: a name of `guide.METHODS`, also with options, `'fk(potential="max")'`; "best_of_n" with budget 1 is
            unguided.
        rewards: {spec: weight} that steer it; empty: those of the comparison.
        budget: denoiser calls over those of one plain sample.
        num_steps: of the sampler; None: the comparison's.
        call: keywords of the pipeline that differ from the comparison's.
    """

    method: str = "best_of_n"
    rewards: Mapping[str, float] = field(default_factory=dict)
    budget: float = 1.0
    num_steps: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A recipe that compares methods of guidance.

    Attributes:
        model: folder or hub id of the pipeline.
        prompts: file of the prompts.
        arms: the contenders by name; differences are to the first.
        rewards: {spec: weight} that steer where an arm has none of its own; they score every sample.
        judges: specs that score every sample; where an arm has one among its rewards, it steers that arm.
        exact: rewards or judges whose share of full marks (a score of 1) is measured too, as `NAME_exact`.
        shown: measures in the picture; empty: all.
        frontier: two measures that are drawn against each other; None: nothing is.
        limit: of the prompts, from the first on; None: all.
        lora: LoRA files, `PATH` or `PATH:SCALE`.
        seeds: one run of all arms each.
        grid: prompts of which samples are shown side by side.
    """

    model: str
    prompts: str
    arms: Mapping[str, Arm]
    rewards: Mapping[str, float]
    judges: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    frontier: tuple[str, str] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    lora: tuple[str, ...] = ()
    num_steps: int = 28
    limit: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 16
    grid: int = 6

    def validate(self) -> None:
        """Refuse what cannot work.

        Raises:
            RecipeError: what was given, the rule, and what would work.
        """
        if len(self.arms) < 2 or not self.seeds:
            raise RecipeError(
                f"a comparison needs at least two arms and one seed; given {list(self.arms)}, {self.seeds}"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise RecipeError(f"seeds={self.seeds} holds one twice; give each once")
        files = [slug(name) for name in self.arms]
        if len(set(files)) < len(files) or not all(files):
            raise RecipeError(f"arms {list(self.arms)} are kept as {files}, which must differ; name them with letters")
        for name, arm in self.arms.items():
            method_of(arm.method)
            if arm.budget < 1:
                raise RecipeError(f"arm {name!r}: budget={arm.budget:g} is below 1, the cost of one plain sample")

    @property
    def specs(self) -> tuple[str, ...]:
        """Every reward and judge, once."""
        own = [*self.rewards, *self.judges, *(spec for arm in self.arms.values() for spec in arm.rewards)]
        return tuple(dict.fromkeys(own))

    def with_specs(self, changed: Callable[[str], str]) -> Comparison:
        """The same with every spec as `changed` answers."""

        def all_of(rewards: Mapping[str, float]) -> dict[str, float]:
            return {changed(spec): weight for spec, weight in rewards.items()}

        arms = {name: replace(arm, rewards=all_of(arm.rewards)) for name, arm in self.arms.items()}
        judges = tuple(changed(spec) for spec in self.judges)
        return replace(self, rewards=all_of(self.rewards), judges=judges, arms=arms)

    def costs(self) -> dict[str, Calls]:
        """What one prompt and seed will cost, by arm."""
        return {n: method_of(a.method).calls(a.num_steps or self.num_steps, a.budget) for n, a in self.arms.items()}


@dataclass(frozen=True)
class Drawn:
    """What one arm drew, over all seeds.

    Attributes:
        media: (S, P, ...) in [0, 1].
        parts: every reward and judge, (S, P).
        calls: denoiser calls over those of one plain sample of the comparison's steps.
        spent: of each kind, per sample.
        seconds: per sample.
    """

    media: torch.Tensor
    parts: Mapping[str, torch.Tensor]
    calls: float
    spent: Mapping[str, float]
    seconds: float


def compare(recipe: Comparison, folder: Path, say: Any = None) -> Path:
    """Draw what is missing in a run directory, measure, write tables and pictures; returns the folder."""
    from alignkit.inference.comparison_report import measured, table, write

    say = Console(highlight=False, markup=False, soft_wrap=True).print if say is None else say
    began = time.monotonic()
    prompts = load_prompts(resolved(recipe.prompts))[: recipe.limit]
    if len(prompts) < 2:
        raise RecipeError(f"{len(prompts)} prompts of {recipe.prompts}; intervals over prompts need at least 2")
    with ExitStack() as stack:
        policy = functools.cache(lambda: stack.enter_context(opened(recipe)))  # not at all where nothing is missing
        reward = functools.cache(load)
        drawn = {name: draw(recipe, name, prompts, folder / "arms", policy, reward, say) for name in recipe.arms}
    record = summary(recipe, drawn, prompts)
    record["wall_seconds"] = time.monotonic() - began
    (folder / "summary.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    samples_of(recipe, drawn, prompts).save(folder / "samples.png")
    wanted = (*recipe.shown, *(recipe.frontier or ()), *(f"{name}_exact" for name in recipe.exact))
    absent = [measure for measure in dict.fromkeys(wanted) if measure not in measured(record)]
    if absent:
        say(f"asked for and not measured: {', '.join(absent)}; there are {', '.join(measured(record))}")
    say(table(record))
    say(f"report: {write(folder)}")
    return folder


def opened(recipe: Comparison) -> Policy:
    """The pipeline with its LoRA files, ready to be sampled."""
    pipe = open_pipeline(resolved(recipe.model))
    add_loras(pipe, [parse_lora(text) for text in recipe.lora])
    return Policy(pipe)


def draw(
    recipe: Comparison,
    name: str,
    prompts: list[Prompt],
    folder: Path,
    policy: Callable[[], Policy],
    reward: Callable[[str], Reward],
    say: Any,
) -> Drawn:
    """One arm's samples of all seeds, from disk where they are there.

    Args:
        policy, reward: give what all arms share; asked only where something is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{slug(name)}-seed{seed}.safetensors" for seed in recipe.seeds]
    missing = [(seed, file) for seed, file in zip(recipe.seeds, files, strict=True) if not file.is_file()]
    for seed, file in missing:
        tensors, numbers = sampled(recipe, recipe.arms[name], policy(), reward, prompts, seed)
        aside = file.with_suffix(".tmp")
        save_file(tensors, aside, metadata={"numbers": json.dumps(numbers)})
        aside.replace(file)
        say(f"{name}, seed {seed}: {numbers['seconds']:.2f} s per sample")
    return read(files)


def sampled(
    recipe: Comparison,
    arm: Arm,
    policy: Policy,
    reward: Callable[[str], Reward],
    prompts: list[Prompt],
    seed: int,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One arm and seed: media (P, ...) uint8 and the parts (P,), and what it took."""
    steps = arm.num_steps or recipe.num_steps
    steers = dict(arm.rewards or recipe.rewards)
    out = guide(
        policy,
        prompts,
        {reward(spec): weight for spec, weight in steers.items()},
        arm.method,
        arm.budget,
        per_sample_generators(torch.Generator().manual_seed(seed), len(prompts)),
        num_steps=steps,
        seed=seed,
        batch=recipe.batch,
        judges=[reward(spec) for spec in dict.fromkeys((*recipe.rewards, *recipe.judges)) if spec not in steers],
        **{**recipe.call, **arm.call},
    )
    count = len(prompts)
    spent = {kind: number / count for kind, number in out.trace["spent"].items()}
    numbers = {"spent": spent, "calls": spent["denoiser"] / recipe.num_steps, "seconds": out.trace["seconds"] / count}
    media = (out.media.detach().clamp(0, 1) * 255).round().byte().cpu().contiguous()
    parts = {f"parts/{name}": value.detach().float().cpu().contiguous() for name, value in out.parts.items()}
    return {"media": media, **parts}, numbers


def read(files: list[Path]) -> Drawn:
    """What `draw` wrote, of all seeds."""
    media, parts, numbers = [], [], []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
            numbers.append(json.loads(opened.metadata()["numbers"]))
        media.append(tensors.pop("media").float() / 255)
        parts.append({key.removeprefix("parts/"): value for key, value in tensors.items()})
    spent = {kind: sum(one["spent"][kind] for one in numbers) / len(numbers) for kind in numbers[0]["spent"]}
    calls, seconds = (sum(one[key] for one in numbers) / len(numbers) for key in ("calls", "seconds"))
    stacked = {name: torch.stack([one[name] for one in parts]) for name in parts[0]}
    return Drawn(torch.stack(media), stacked, calls, spent, seconds)


def summary(recipe: Comparison, drawn: Mapping[str, Drawn], prompts: list[Prompt]) -> dict[str, Any]:
    """Every arm's measures, and its differences to the first arm, as JSON."""
    base = per_prompt(recipe, next(iter(drawn.values())))
    arms = {}
    for number, (name, one) in enumerate(drawn.items()):
        own = per_prompt(recipe, one)
        measures = {measure: float(values.nanmean()) for measure, values in own.items()}
        against = differences(own, base) if number else {}
        arms[name] = {
            "measures": measures,
            "against_first": against,
            "diversity": diversity(one),
            "calls": one.calls,
            "spent": dict(one.spent),
            "seconds": one.seconds,
            "arm": {**asdict(recipe.arms[name]), "call": dict(recipe.arms[name].call)},
        }
    about = {"model": recipe.model, "prompts": len(prompts), "seeds": list(recipe.seeds)}
    return {"recipe": "Comparison", **about, "shown": recipe.shown, "frontier": recipe.frontier, "arms": arms}


def differences(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """The interval of every measure that both have for at least two prompts."""
    both = [m for m in ours if m in theirs and int((ours[m] - theirs[m]).isfinite().sum()) > 1]
    return {m: asdict(paired(ours[m], theirs[m])) for m in both}


def per_prompt(recipe: Comparison, one: Drawn) -> dict[str, torch.Tensor]:
    """(P,) of every measure, averaged over seeds."""
    found = {name: value.double().nanmean(dim=0) for name, value in one.parts.items()}
    full = {name: one.parts[name].double() for name in recipe.exact if name in one.parts}
    marks = {name: torch.where(scores.isnan(), scores, (scores >= 1).double()) for name, scores in full.items()}
    return found | {f"{name}_exact": value.nanmean(dim=0) for name, value in marks.items()}


def diversity(one: Drawn) -> float | None:
    """How much an arm's samples of one prompt differ over the seeds; None with one seed."""
    seeds, count = one.media.shape[:2]
    if seeds < 2:
        return None
    return within_groups(one.media.flatten(0, 1), torch.arange(count).repeat(seeds)).total


def samples_of(recipe: Comparison, drawn: Mapping[str, Drawn], prompts: list[Prompt]) -> Any:
    """Samples of the first seed side by side, a few prompts from all over the file."""
    rows = torch.linspace(0, len(prompts) - 1, min(recipe.grid, len(prompts))).round().long().unique().tolist()
    columns = []
    for name, one in drawn.items():
        shown = [Sample(str(prompts[i]), recipe.seeds[0], one.media[0, i]) for i in rows]
        named = [name for name in recipe.exact if name in one.parts] or list(one.parts)[:2]
        scores = [[f"{name} {float(one.parts[name][0, i]):.2f}" for name in named] for i in rows]
        columns.append(Column(name, shown, scores))
    return side_by_side(columns)


def slug(name: str) -> str:
    """A file name of an arm's."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()
