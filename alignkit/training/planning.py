"""What a recipe will do and cost, said before anything runs: from configurations alone, or from a few micro-steps.

Level 1 needs no weights and no network: exact parameter counts, adapters, samples and denoiser rows per round, memory
that follows from sizes. Level 2 (`measuring.py`) loads the weights and fills in what only a measurement can know.
Nothing is guessed: what was not measured is None in the record and "not measured" in the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from alignkit.data.prompts import load_prompts
from alignkit.errors import RecipeError, RewardError
from alignkit.inference.comparison import Comparison
from alignkit.policy.adapters import LoRA, linear_targets
from alignkit.rewards import load
from alignkit.rewards.card import HasCard, HasWeights
from alignkit.rewards.weights import present
from alignkit.shipped import resolved
from alignkit.training import decoded
from alignkit.training.blueprint import Blueprint, blueprint, call_of, count, latent_numel, pixels_of
from alignkit.training.costs import FP32, memory, round_of
from alignkit.training.recipe import Recipe
from alignkit.training.recipe_files import AnyRecipe
from alignkit.training.reward_model import RewardModel, made
from alignkit.training.steered import Steered


@dataclass(frozen=True)
class Trainable:
    """What the optimizer sees.

    Attributes:
        method: "LoRA(rank=16, alpha=32.0)" or "Full()".
        layers: linear layers that get an adapter, by denoiser; all of them for full fine-tuning.
        endings: how many of those layers by the last part of their name.
        parameters: trained numbers.
    """

    method: str
    layers: Mapping[str, int]
    endings: Mapping[str, int]
    parameters: int


def plan(recipe: AnyRecipe) -> dict[str, Any]:
    """Level 1: a JSON record of what the recipe will do.

    Raises:
        RecipeError: the recipe contradicts itself, or nothing is known about its model here.
    """
    recipe.validate()
    if isinstance(recipe, RewardModel):
        return plan_reward_model(recipe)
    if isinstance(recipe, Comparison):
        return plan_comparison(recipe)
    found = blueprint(recipe.model)
    if not found.denoisers:
        raise RecipeError(
            f"{recipe.model}: no denoiser among {', '.join(found.components) or 'no components'} of {found.pipeline}"
            + "".join(f"; {name}: {why}" for name, why in found.unknown.items())
        )
    call, size_from = call_of(found, recipe.call)
    trained = trainable(recipe, found)
    rounds = round_of(recipe, found, call)
    numel = latent_numel(found, call)
    return {
        "model": recipe.model,
        "pipeline": found.pipeline,
        "configured_by": found.source,
        "weights_here": found.weights is not None,
        "trainer": type(recipe).__name__,
        "parameters": found.parameters(),
        "unread_components": dict(found.unknown),
        "trainable": asdict(trained),
        "round": asdict(rounds),
        "rounds": recipe.steps,
        "data_here": None if recipe.data is None else Path(resolved(recipe.data)).exists(),
        "size": {n: call.get(n) for n in ("height", "width", "num_frames")} | {"from": size_from},
        "latent_elements_per_sample": numel,
        "decoded": decoded.decoded(recipe, found, call),
        "memory_bytes": memory(recipe, found, trained.parameters, rounds, numel, pixels_of(found, call)),
        "rewards": [reward_record(spec, weight) for spec, weight in recipe.rewards.items()]
        + [reward_record(spec, None) for spec in recipe.judges],
        "guide": [reward_record(s, w) for s, w in recipe.guide.items()] if isinstance(recipe, Steered) else [],
        "measured": None,
    }


def plan_reward_model(recipe: RewardModel) -> dict[str, Any]:
    """What a reward model's recipe will do. Its scorer is built, as only the recipe's own code knows its size."""
    scorer = made(recipe.model, "model")
    trained = [p for p in scorer.parameters() if p.requires_grad]
    numel = sum(p.numel() for p in trained)
    return {
        "model": _spec(recipe.model),
        "trainer": "RewardModel",
        "parameters": {"scorer": count(scorer)},
        "trained": numel,
        "data": _spec(recipe.data),
        "loss": _spec(recipe.loss),
        "noise": recipe.noise,
        "rounds": recipe.steps,
        "examples": recipe.steps * recipe.batch,
        "memory_bytes": {
            "weights": sum(p.numel() * p.element_size() for p in scorer.parameters()),
            "gradients": numel * FP32,
            "optimizer": 2 * numel * FP32,
            "ema": numel * FP32 if recipe.ema_decay is not None else 0,
            "activations": None,
        },
        "measured": None,
    }


def plan_comparison(recipe: Comparison) -> dict[str, Any]:
    """What a comparison will do, by contender and in all."""
    count = len(load_prompts(resolved(recipe.prompts))[: recipe.limit]) * len(recipe.seeds)
    arms = {name: {kind: number * count for kind, number in asdict(c).items()} for name, c in recipe.costs().items()}
    return {
        "model": recipe.model,
        "trainer": "Comparison",
        "prompts": count // len(recipe.seeds),
        "seeds": list(recipe.seeds),
        "samples": count * len(arms),
        "arms": arms,
        "rewards": [reward_record(spec, None) for spec in recipe.specs],
        "measured": None,
    }


def _spec(value: Any) -> str:
    return value if isinstance(value, str) else f"{value.__module__}:{value.__qualname__}"


def reward_record(spec: Any, weight: float | None) -> dict[str, Any]:
    """A reward (or, without a weight, a judge) as the plan shows it; no weights are read."""
    try:
        reward = load(spec)
    except RewardError as error:  # a program that is not installed
        return {"name": str(spec), "weight": weight, "cost": "", "weights": {}, "cannot_load": str(error)}
    files = reward.files() if isinstance(reward, HasWeights) else ()
    return {
        "name": reward.name,
        "weight": weight,
        "cost": reward.card.cost if isinstance(reward, HasCard) else "",
        "weights": {one.source: present(one) for one in files},
        "cannot_load": None,
    }


def trainable(recipe: Recipe, found: Blueprint) -> Trainable:
    """Exact number of trained parameters; LoRA layers as the policy will choose them."""
    if not isinstance(recipe.train, LoRA):
        sizes = {name: len(list(m.parameters())) for name, m in found.denoisers.items()}
        return Trainable("Full()", sizes, {}, sum(count(m) for m in found.denoisers.values()))
    rank, total = recipe.train.rank, 0
    layers: dict[str, int] = {}
    endings: dict[str, int] = {}
    for name, module in found.denoisers.items():
        chosen = linear_targets(module, recipe.train.targets)
        layers[name] = len(chosen)
        for path in chosen:
            layer = cast(nn.Linear, module.get_submodule(path))
            total += rank * (layer.in_features + layer.out_features)
            ending = path.rpartition(".")[2] if not path[-1].isdigit() else ".".join(path.split(".")[-2:])
            endings[ending] = endings.get(ending, 0) + 1
    method = f"LoRA(rank={rank}, alpha={recipe.train.alpha})"
    if recipe.init_lora is not None:
        method += f", counted at this rank; init_lora={recipe.init_lora!r} brings its own"
    return Trainable(method, layers, endings, total)


def measured(record: Mapping[str, Any], recipe: AnyRecipe) -> dict[str, Any]:
    """Level 2: the record with `measured` filled in and the denoiser rows counted.

    Raises:
        RecipeError: the weights are not on this machine, or the recipe trains a reward model.
    """
    from alignkit.training.measuring import measure

    if not isinstance(recipe, Recipe):
        raise RecipeError("--measure measures how generators are trained; a run of another kind says its own times")
    if not record["weights_here"]:
        raise RecipeError(
            f"--measure needs the weights of {record['model']!r} on disk and only its configuration is here; download "
            "it first, or leave --measure out"
        )
    found = measure(recipe)
    rounds = dict(record["round"])
    factor = found["rows_per_sample"] / rounds["rows_per_sample"]
    rounds |= {"rows_per_sample": found["rows_per_sample"]}
    rounds["rows"] = {name: round(number * factor) for name, number in rounds["rows"].items()}
    return {**record, "round": rounds, "measured": found}


# the table


def lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, how much) for people; None is "not measured"."""
    if record["trainer"] == "RewardModel":
        yield from _reward_model_lines(record)
        return
    if record["trainer"] == "Comparison":
        yield from _comparison_lines(record)
        return
    rounds, trained = record["round"], record["trainable"]
    yield "model", f"{record['model']} ({record['pipeline']}, from {record['configured_by']})"
    for name, number in record["parameters"].items():
        yield f"  {name}", f"{number:,} parameters"
    for name, why in record["unread_components"].items():
        yield f"  {name}", f"not read: {why}"
    layers = ", ".join(f"{n} in {name}" for name, n in trained["layers"].items())
    endings = ", ".join(f"{name} x{n}" for name, n in trained["endings"].items())
    yield "trained", f"{trained['method']}: {trained['parameters']:,} parameters; layers: {layers}"
    if endings:
        yield "  layers", endings
    yield from _round_lines(rounds)
    if record["data_here"] is False:
        yield "  data", f"{rounds['data']} is not here; the run needs it"
    size = record["size"]
    frames = f" x {size['num_frames']} frames" if size["num_frames"] else ""
    yield "size", f"{size['height']} x {size['width']}{frames} ({size['from']})"
    counted = "counted" if (record["measured"] or {}).get("rows_per_sample") else "by rule"
    yield from decoded.lines(record["decoded"])
    yield "guidance", f"{rounds['rows_per_sample']} denoiser row(s) per sample and step ({counted})"
    rows = rounds["rows"]
    parts = ", ".join(f"{name} {number:,}" for name, number in rows.items() if number and name != "total")
    yield "denoiser rows", f"{rows['total']:,} per round ({parts}); {rows['total'] * record['rounds']:,} in all"
    if rounds["guide"]:
        asked, followed = rounds["guide"]["forward"], rounds["guide"]["backward"]
        yield "guide", f"asked of {asked:,} latents per round, differentiated for {followed:,}"
    if rounds["rows_per_new_prompt"]:
        yield "  base rewards", f"{rounds['rows_per_new_prompt']:,} more when a prompt is first drawn"
    if rounds["rows_before"]:
        yield "  data of the base", f"{rounds['rows_before']:,} more before the first round"
    for name, size in record["memory_bytes"].items():
        if size != 0:
            yield f"memory: {name.replace('_', ' ')}", _size(size)
    for kind, reward in [*(("reward", one) for one in record["rewards"]), *(("guide", one) for one in record["guide"])]:
        role = "judge" if reward["weight"] is None else f"{kind} x {reward['weight']:g}"
        missing = [source for source, here in reward["weights"].items() if not here]
        needs = f"not here: {', '.join(missing)} (alignkit fetch)" if missing else ""
        yield f"{role}: {reward['name']}", "; ".join(filter(None, (reward["cost"], needs, reward["cannot_load"])))
    known = [size for size in record["memory_bytes"].values() if size is not None]
    yield "memory: sum of what is known", _size(sum(known))
    yield from _measured(record)


def _round_lines(rounds: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    prompts, samples, views, unit = (rounds[name] for name in ("prompts", "samples", "views", "unit"))
    drawn = f"{prompts} prompts x {samples // prompts} = {samples}"
    origin = "samples" if rounds["data"] is None else f"{unit} of {rounds['data']}"
    yield "round", f"{drawn} {origin}, {rounds['updates']} update(s)"
    kept = "" if (rounds["trained"], unit) == (samples, "samples") else f"{rounds['trained']} {unit}, "
    if rounds["stochastic"]:
        trained = f"stochastic and trained in round 0: {_ranges(rounds['stochastic'])}"
    else:
        trained = f"trained: {kept}{views} noise level(s) each"
    sampled = "nothing is sampled" if rounds["data"] is not None else f"{rounds['num_steps']} sampled"
    yield "steps", f"{sampled}; {trained}"


def _reward_model_lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", f"{record['model']}: {record['parameters']['scorer']:,} parameters, {record['trained']:,} trained"
    yield "data", record["data"]
    noise = f", at noise levels {record['noise']}" if record["noise"] else ""
    yield "loss", f"{record['loss']}{noise}"
    yield "steps", f"{record['rounds']:,}, {record['examples']:,} examples in all"
    for name, size in record["memory_bytes"].items():
        if size != 0:
            yield f"memory: {name}", _size(size)


def _comparison_lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", record["model"]
    yield "samples", f"{record['samples']:,}: {record['prompts']} prompts, {len(record['seeds'])} seeds"
    for name, calls in record["arms"].items():
        spent = ", ".join(f"{kind.replace('_', ' ')} {number:,}" for kind, number in calls.items() if number)
        yield f"  {name}", spent
    for reward in record["rewards"]:
        yield "reward", reward["name"]


def _measured(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = record["measured"]
    names = ("peak memory", "seconds per round", "groups with a signal")
    if found is None:
        yield from ((name, "not measured (--measure, where the weights are on disk)") for name in names)
        return
    yield names[0], f"{_size(found['peak_memory_bytes'])} ({found['peak_memory_of']})"
    hours = found["seconds_per_round"] * record["rounds"] / 3600
    seconds = f"{found['seconds_per_round']:.1f} on {found['device']}"
    yield names[1], f"{seconds}; {hours:.2f} h for {record['rounds']} rounds"
    if found["signal_fraction"] is not None:
        yield names[2], f"{found['signal_fraction']:.2f} of {found['groups']} groups of {found['group_size']}"


def _ranges(steps: list[int]) -> str:
    if steps and steps == list(range(steps[0], steps[-1] + 1)) and len(steps) > 2:
        return f"{steps[0]}-{steps[-1]} ({len(steps)})"
    return ", ".join(map(str, steps)) or "none"


def _size(size: int | None) -> str:
    if size is None:
        return "not measured"
    power = min(int(math.log(max(size, 1), 1024)), 3)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
