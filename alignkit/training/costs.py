"""What one round of a recipe costs in denoiser rows and in memory, by formula, for every method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alignkit.policy.adapters import LoRA
from alignkit.training import anchors, tree
from alignkit.training.awm import AWM
from alignkit.training.blueprint import Blueprint
from alignkit.training.crd import CRD
from alignkit.training.dgpo import DGPO
from alignkit.training.dpo import DPO
from alignkit.training.euphonium import Euphonium
from alignkit.training.grpo import GRPO
from alignkit.training.instruct_video import InstructVideo
from alignkit.training.kto import KTO
from alignkit.training.matching import Matching
from alignkit.training.recipe import Recipe
from alignkit.training.rwr import ADRPO, SFT
from alignkit.training.shaped import Shaped
from alignkit.training.steered import Steered
from alignkit.training.value_gradient import ValueGradient

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = 4
ALWAYS_COMPARES = (DPO, KTO, DGPO, ADRPO, ValueGradient)
"""Methods whose loss has the reference in it, whatever their coefficients."""


@dataclass(frozen=True)
class Round:
    """One optimisation round over all processes. Groups without a signal are counted as if they had one.

    Attributes:
        prompts, samples, updates: P, samples (or, from data, pairs) of a round, optimizer steps.
        trained, unit: what goes through the loss, "samples" or "pairs".
        views: recorded steps, or noise levels, at which each of them does.
        num_steps, stochastic: the sampling grid, and the steps of it that are recorded in round 0.
        data: file that the round is drawn from; None: it is sampled.
        rows_per_sample: denoiser rows of one sample at one step, 2 with classifier-free guidance.
        rows: denoiser rows by role: "sampling", "training" (forward and backward), "editing" (steps of InstructVideo
            before the one with a graph), "reference", "old" (the companion), "data" (the anchor on data, forward and
            backward), and their sum, "total".
        micro_batch: samples (or pairs) per backward.
        rows_per_new_prompt: denoiser rows when a prompt is first drawn, where rewards are compared with the base's.
        rows_before: denoiser rows once, before the first round: samples of the base as data.
        guide: latents of which the guide is asked, "forward", and those of them where its gradient is taken,
            "backward". With an evenly spaced grid that begins at sigma 1, whose first step is not guided.
    """

    prompts: int
    samples: int
    updates: int
    trained: int
    unit: Literal["samples", "pairs"]
    views: int
    num_steps: int
    stochastic: list[int]
    data: str | None
    rows_per_sample: int
    rows: Mapping[str, int]
    micro_batch: int
    rows_per_new_prompt: int = 0
    rows_before: int = 0
    guide: Mapping[str, int] = field(default_factory=dict)


def rows_per_sample(found: Blueprint, call: Mapping[str, Any]) -> int:
    """Denoiser rows of one sample at one step, by the usual rules of diffusers' pipelines (not measured)."""
    if "true_cfg_scale" in call:
        return 2 if call["true_cfg_scale"] > 1 and call.get("negative_prompt") is not None else 1
    embedded = any(m.config.get("guidance_embeds") for m in found.denoisers.values())  # type: ignore[union-attr]
    scale = call.get("guidance_scale")
    return 2 if not embedded and isinstance(scale, int | float) and scale > 1 else 1


def round_of(recipe: Recipe, found: Blueprint, call: Mapping[str, Any]) -> Round:
    """Samples, updates and denoiser rows of one round."""
    each = 1 if recipe.train_guidance == "off" else rows_per_sample(found, call)
    taught = each
    if isinstance(recipe, CRD) and recipe.teacher_call:
        taught = rows_per_sample(found, {**call, **recipe.teacher_call})
    units, views = trained_of(recipe), views_of(recipe)
    sides = 2 if isinstance(recipe, DPO) else 1
    anchored = min(recipe.prompts_per_step, recipe.data_samples) if recipe.data_beta > 0 else 0
    rows = {
        "sampling": each * denoised(recipe),
        "training": each * sides * units * views,
        "editing": each * units * recipe.editing_calls if isinstance(recipe, InstructVideo) else 0,
        "reference": taught * sides * units * compared_views(recipe),
        "old": each * units * views if recipe.needs_old or (isinstance(recipe, AWM) and recipe.updates > 1) else 0,
        "data": anchored * recipe.updates,  # unguided
    }
    based = recipe.transform_samples if isinstance(recipe, Shaped) and recipe.transform == "log_sigmoid" else 0
    drawn = recipe.data_beta > 0 and recipe.data_anchor is None
    return Round(
        prompts=recipe.prompts_per_step,
        samples=samples_of(recipe),
        updates=recipe.updates,
        trained=units,
        unit="pairs" if isinstance(recipe, DPO) else "samples",
        views=views,
        num_steps=recipe.num_steps,
        stochastic=sorted(recipe.plan_for(0).stochastic),
        data=recipe.data,
        rows_per_sample=each,
        rows={**rows, "total": sum(rows.values())},
        micro_batch=min(recipe.micro_batch or units, max(units // recipe.updates, 1)),
        rows_per_new_prompt=based * each * recipe.num_steps,
        rows_before=recipe.data_samples * each * recipe.num_steps if drawn else 0,
        guide=guide_of(recipe) if isinstance(recipe, Steered) else {},
    )


def guide_of(recipe: Steered) -> dict[str, int]:
    """How often a round asks its guide, in latents."""
    if not isinstance(recipe, Euphonium):
        taught = trained_of(recipe) * views_of(recipe)
        return {"forward": taught, "backward": taught}
    plan, strength = recipe.plan_for(0), recipe.strength()
    sigmas = {k: 1.0 - k / recipe.num_steps for k in range(plan.start, recipe.num_steps)}
    guided = sum(strength.at(k, recipe.num_steps, sigma) > 0 for k, sigma in sigmas.items())
    ends = {end for k in plan.stochastic for end in (k, k + 1)} if recipe.process_weight else set()
    samples = samples_of(recipe)
    return {"forward": samples * (guided + len(ends)), "backward": samples * guided}


def samples_of(recipe: Recipe) -> int:
    """Samples of one round; pairs where the data are pairs."""
    return recipe.prompts_per_step * (1 if isinstance(recipe, DPO) and recipe.data is not None else recipe.group_size)


def trained_of(recipe: Recipe) -> int:
    """Samples or pairs of one round that go through the loss: of some methods one of each group."""
    one_of_group = isinstance(recipe, DPO) or (isinstance(recipe, SFT) and recipe.keep == "best")
    return recipe.prompts_per_step if one_of_group else samples_of(recipe)


def views_of(recipe: Recipe) -> int:
    """Recorded steps, or noise levels, at which a sample is trained in one round."""
    if isinstance(recipe, InstructVideo):
        return 1
    return recipe.draws if isinstance(recipe, Matching) else len(recipe.plan_for(0).stochastic)


def compared_views(recipe: Recipe) -> int:
    """How many of these the reference denoises as well."""
    if isinstance(recipe, ALWAYS_COMPARES):
        return recipe.draws
    if isinstance(recipe, Matching):
        return recipe.draws if recipe.velocity_beta > 0 else 0
    if isinstance(recipe, InstructVideo):
        return 1 if recipe.velocity_beta > 0 else 0
    if not isinstance(recipe, GRPO):
        return 0
    steps = recipe.plan_for(0).stochastic
    if recipe.velocity_beta > 0:
        return len(steps)
    return sum(anchors.kl_counts(step, recipe.kl_steps) for step in steps) if recipe.kl_beta > 0 else 0


def denoised(recipe: Recipe) -> int:
    """Latents that the sampler of one round denoises, over all its steps; shared ones once."""
    if recipe.data is not None:
        return 0
    plan = recipe.plan_for(0)
    splits = recipe.splits_for(plan) if isinstance(recipe, GRPO) else ()
    if isinstance(recipe, GRPO) and splits:
        width = recipe.branch_width or recipe.group_size
        return recipe.prompts_per_step * tree.denoised(splits, width, recipe.num_steps, plan.start)
    return samples_of(recipe) * (recipe.num_steps - plan.start)


def memory(
    recipe: Recipe,
    found: Blueprint,
    trained: int,
    rounds: Round,
    numel: int | None,
    media: int | None,
) -> dict[str, int | None]:
    """Bytes by formula, on one process. Activations depend on kernels and are measured or not known.

    Args:
        trained: numbers that the optimizer sees.
        numel, media: numbers of one sample's latents and of its pixels; None: not known.
    """
    width = BYTES[recipe.precision]
    full = not isinstance(recipe.train, LoRA)
    # full fine-tuning: the reference is a copy, and trained weights have the dtype they were loaded in
    each = width if full else FP32
    replayed = recipe.replay * recipe.group_size * (3 * rounds.views + 1) if isinstance(recipe, GRPO) else 0
    pixels = rounds.samples if recipe.keeps_media else 0
    return {
        "weights": sum(found.parameters().values()) * width,
        "reference": trained * width if full else 0,
        "adapters": 0 if full else trained * FP32,
        "ema": trained * each if recipe.ema_decay is not None else 0,
        "old": trained * each if recipe.uses_old else 0,
        "gradients": trained * each,
        "optimizer": 2 * trained * each,
        "stored_latents": _bytes(stored_latents(recipe, rounds), numel),
        "stored_media": _bytes(pixels, media),
        "replay": _bytes(replayed, numel),
        "activations": None,
    }


def stored_latents(recipe: Recipe, rounds: Round) -> int:
    """How many latents of one sample's size a round keeps, in float32.

    Final latents once. Of each recorded step what entered, what left, and the mean, and what guided it; of each noise
    level the noise and the noised latents; of pairs both sides.
    """
    if not isinstance(recipe, Matching):
        guided = isinstance(recipe, Euphonium) and recipe.guide_weight > 0
        return rounds.samples * ((4 if guided else 3) * rounds.views + 1)
    if rounds.unit == "pairs":
        return rounds.samples + rounds.trained * (2 + 3 * rounds.views)
    return rounds.samples * (1 + 2 * rounds.views)


def _bytes(count: int, numel: int | None) -> int | None:
    if count == 0:
        return 0
    return None if numel is None else count * numel * FP32
