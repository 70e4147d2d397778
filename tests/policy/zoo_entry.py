"""What the tables of the zoo are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from tests.policy.tiny_parts import picture

PROMPTS = ("a red cat", "a blue dog")
PICTURES = (picture(0), picture(1))
BAD = {"negative_prompt": ["bad quality"] * len(PROMPTS)}
CFG = {"guided": {"guidance_scale": 4.0}, "unguided": {"guidance_scale": 1.0}}
EMBEDDED = {
    "embedded": {"guidance_scale": 3.5},
    "true_cfg": {"guidance_scale": 3.5, "true_cfg_scale": 3.0, **BAD},
}


@dataclass(frozen=True)
class Entry:
    """One pipeline of the zoo.

    Attributes:
        build: makes the pipeline; every call gives a fresh one with the same weights.
        family: the name in the README's table.
        call: the pipeline's own keywords that make it small, the same in every variant.
        variants: further keywords by name; each is compared with the pipeline's own loop.
        video: decoded media are (B, T, 3, H, W), not (B, 3, H, W).
        image: conditioned on an image, so the prologue may draw random numbers.
        draws_per_batch: it draws them from the global generator, one stream for the whole batch, so that a subset
            is conditioned on other draws than its rows of the batch.
    """

    build: Callable[[], DiffusionPipeline]
    family: str
    call: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    video: bool = False
    image: bool = False
    draws_per_batch: bool = False
