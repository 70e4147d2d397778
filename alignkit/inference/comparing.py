"""A method of guidance beside unguided samples and the best of n, from the same noise at equal denoiser calls."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.errors import RecipeError
from alignkit.inference.guide import Guided, method_of, run
from alignkit.inference.judges import Judges
from alignkit.inference.method import BestOfN, Method
from alignkit.inference.sampling import BATCH, Sample
from alignkit.inference.side_by_side import Column
from alignkit.inference.task import Task
from alignkit.policy import Policy
from alignkit.types import Prompt

UNGUIDED = "unguided"


@dataclass(frozen=True)
class Contender:
    """What is compared.

    Attributes:
        name: what tables call it.
        budget: denoiser calls over those of one plain sample.
    """

    name: str
    method: Method
    budget: float


@dataclass(frozen=True)
class Row:
    """What one contender drew.

    Attributes:
        prompts, seeds: of each sample.
        guided: the samples, in the order of the prompts, those of one prompt side by side.
        weights: by reward name; 0 for judges.
    """

    name: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    guided: Guided
    weights: Mapping[str, float]

    @property
    def samples(self) -> list[Sample]:
        """The same as `sampling.sample` returns them."""
        media = self.guided.media.detach().float().cpu()
        return [Sample(p, s, m) for p, s, m in zip(self.prompts, self.seeds, media, strict=True)]

    def per_sample(self, spent: str) -> float:
        """What one of the samples took, on average, of one kind of `Calls`."""
        return self.guided.trace["spent"][spent] / len(self.seeds)


def weighted_spec(text: str) -> tuple[str, float]:
    """`SPEC` or `SPEC=WEIGHT`; the weight is 1 where it is not given."""
    spec, equals, weight = text.rpartition("=")
    if equals and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight.strip(), re.IGNORECASE):
        return spec.strip(), float(weight)
    return text.strip(), 1.0


def weighted_specs(texts: Sequence[str]) -> dict[str, float]:
    """{spec: weight} of all.

    Raises:
        RecipeError: a reward is named twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        spec, weight = weighted_spec(text)
        if spec in found:
            raise RecipeError(f"reward {spec!r} is given twice; give it once, with one weight: {spec}=WEIGHT")
        found[spec] = weight
    return found


def contenders(method: str | Method, budget: float | None, num_steps: int) -> list[Contender]:
    """Unguided samples, the best of as many as the method's denoiser calls pay for, and the method.

    The best of one is the unguided sample, and the best of n is not compared with itself: both are left out.

    Args:
        budget: None: the method's own default.

    Raises:
        RecipeError: an unknown method, or a budget below one sample.
    """
    own = method_of(method)
    given = own.default_budget if budget is None else budget
    if not given >= 1 or math.isinf(given):
        raise RecipeError(f"budget={given:g}: a sample costs 1; give 1 or more")
    count = round(own.calls(num_steps, given).denoiser / num_steps)
    found = [Contender(UNGUIDED, BestOfN(), 1.0)]
    if count > 1 and not isinstance(own, BestOfN):
        found.append(Contender(BestOfN.name, BestOfN(), float(count)))
    return [*found, Contender(method if isinstance(method, str) else own.name, own, given)]


PLAN = (
    "cost of one sample",
    "denoiser calls",
    "with gradient",
    "reward head",
    "with gradient",
    "decodes",
    "with gradient",
    "samples of a prompt at once",
)


def costs(compared: Sequence[Contender], num_steps: int) -> list[list[str]]:
    """The table of what each will cost beforehand, in the order of `PLAN`."""
    return [_cost(one, num_steps) for one in compared]


def _cost(one: Contender, num_steps: int) -> list[str]:
    calls = one.method.calls(num_steps, one.budget)
    denoiser = f"{calls.denoiser} ({calls.denoiser / num_steps:.4g} x {num_steps})"
    counted = (calls.denoiser_gradients, calls.head, calls.head_gradients, calls.decodes, calls.decode_gradients)
    return [one.name, denoiser, *(str(number) for number in counted), str(one.method.rows(one.budget))]


def calls_in_all(compared: Sequence[Contender], num_steps: int, samples: int) -> int:
    """Denoiser calls of `compare` for so many samples of each: theirs, and one plain sample before."""
    return num_steps + samples * sum(one.method.calls(num_steps, one.budget).denoiser for one in compared)


def memory_notes(one: Contender, num_steps: int, batch: int) -> list[str]:
    """Sentences about what a contender keeps in memory."""
    calls, rows = one.method.calls(num_steps, one.budget), one.method.rows(one.budget)
    at_once = max(rows, batch // rows * rows)
    notes = [f"{one.name}: up to {at_once} samples are denoised at once (batch {batch}, {rows} of a prompt together)"]
    parts = {
        "the denoiser": calls.denoiser_gradients,
        "the decoder": calls.decode_gradients,
        "the reward's head": calls.head_gradients,
    }
    through = [part for part, count in parts.items() if count]
    if through:
        options = dataclasses.asdict(one.method)
        size = options.get("gradient_batch")
        kept = "all of these samples" if size is None else f"{size} samples at a time"
        advice = "; gradient_batch=1 keeps those of one" if "gradient_batch" in options and size is None else ""
        names = " and ".join(through)
        notes.append(f"{one.name}: gradients pass through {names}, whose activations are kept of {kept}{advice}")
    return notes


def compare(
    pipe: Any,
    prompts: Sequence[str],
    judges: Judges,
    compared: Sequence[Contender],
    *,
    num: int,
    steps: int,
    seed: int,
    call: Mapping[str, Any],
    batch: int = BATCH,
) -> list[Row]:
    """Draw `num` samples of each prompt with every contender; sample i of a prompt has the noise of seed `seed + i`.

    Args:
        pipe: a loaded pipeline, left unmodified, with whatever LoRAs it has.
        call: further keywords of the pipeline.

    Raises:
        RecipeError: a keyword that the pipeline does not have, or rewards that a method cannot use.
    """
    texts = [Prompt(text, id=i) for i, text in enumerate(prompts) for _ in range(num)]
    seeds = [seed + i for _ in prompts for i in range(num)]
    with Policy(pipe) as policy:
        judges.bind(policy)
        judges.check_prompts(texts)
        cond = policy.condition(texts, num_steps=steps, seed=seeds, **call)
        tasks = [Task(policy, judges, len(cond.timesteps), one.budget, batch, cond.sigmas) for one in compared]
        for one, task in zip(compared, tasks, strict=True):
            one.method.check(task)
        # One sample before the clocks: what loads at its first call would count against the first row.
        run(BestOfN(), Task(policy, judges, len(cond.timesteps), 1.0, batch), cond[[0]], [torch.Generator()])
        rows: list[Row] = []
        for one, task in zip(compared, tasks, strict=True):
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            rows.append(Row(one.name, texts, seeds, run(one.method, task, cond, generators), judges.weights))
    return rows


# what people and programs read


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: mean rewards and judges, their weighted total, and what one sample took."""
    names = [n if w else f"{n} (judge)" for n, w in rows[0].weights.items()]
    header = ["", *names, "weighted total", "denoiser calls over a plain sample's", "reward head", "decodes", "seconds"]
    return header, [_line(row) for row in rows]


def _line(row: Row) -> list[str]:
    trace = row.guided.trace
    parts = [shown(mean(row.guided.parts[name])) for name in row.weights]
    spent = [f"{row.per_sample(kind):.4g}" for kind in ("head", "decodes")]
    seconds = f"{trace['seconds'] / len(row.seeds):.3g}"
    return [row.name, *parts, shown(mean(row.guided.rewards)), f"{trace['budget_used']:.4g}", *spent, seconds]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The rows as columns of a picture, with the scores under each sample."""
    return [Column(row.name, row.samples, [_scores(row, i) for i in range(len(row.seeds))]) for row in rows]


def _scores(row: Row, sample: int) -> list[str]:
    lines = [f"{name} {shown(_number(row.guided.parts[name][sample]))}" for name in row.weights]
    several = sum(weight != 0 for weight in row.weights.values()) > 1
    return [*lines, *([f"total {shown(_number(row.guided.rewards[sample]))}"] if several else [])]


def record(rows: Sequence[Row], **about: Any) -> dict[str, Any]:
    """A JSON record: what was drawn from what, every score, and what it took."""
    return {**about, "weights": dict(rows[0].weights), "methods": [_recorded(row) for row in rows]}


def _recorded(row: Row) -> dict[str, Any]:
    trace = row.guided.trace
    samples = [
        {
            "prompt": str(prompt),
            "seed": seed,
            "total": _number(row.guided.rewards[i]),
            "rewards": {name: _number(row.guided.parts[name][i]) for name in row.weights},
        }
        for i, (prompt, seed) in enumerate(zip(row.prompts, row.seeds, strict=True))
    ]
    return {
        "name": row.name,
        "method": trace["method"],
        "options": {name: value if _plain(value) else str(value) for name, value in trace["options"].items()},
        "total": mean(row.guided.rewards),
        "rewards": {name: mean(row.guided.parts[name]) for name in row.weights},
        "budget": trace["budget"],
        "budget_used": trace["budget_used"],
        "spent": dict(trace["spent"]),
        "seconds": trace["seconds"],
        "samples": samples,
    }


def mean(scores: torch.Tensor) -> float | None:
    """Over the samples that have a score; None where none has."""
    return _number(scores[~scores.isnan()].float().mean())


def shown(value: float | None) -> str:
    """A score for people."""
    return "-" if value is None else f"{value:.4f}"


def _number(value: torch.Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
