"""The frame reward of the moving shapes likes the named colour in the middle, and the recipes are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange

from alignkit.errors import RewardError
from alignkit.rewards import evaluate, load, load_file
from alignkit.shipped import path
from alignkit.training.instruct_video import InstructVideo
from alignkit.training.recipe_files import Source, find
from alignkit.training.recipe_files import load as recipe_of
from alignkit.types import Prompt

CENTRED = "shipped:recipes/shapes/frame_reward.py:Centred"
PROMPT = "a red circle moves right"
world = load_file(path("recipes", "shapes", "world.py"))


def frame(colour: str = "red", x: float = 15.5, y: float = 15.5) -> torch.Tensor:
    """(1, 3, 32, 32) one frame with a circle at (x, y)."""
    pixels = world.draw(world.Clip(colour, "circle", ((x, y),) * world.FRAMES, radius=6.0))
    return rearrange(torch.from_numpy(np.asarray(pixels[:1])) / 255, "b h w c -> b c h w")


def score(media: torch.Tensor, prompt: str = PROMPT) -> float:
    return float(evaluate(load(CENTRED), media, [prompt]).scores)


def test_the_named_colour_in_the_middle_is_best() -> None:
    best = score(frame())
    assert best > score(frame(x=10.0)) + 0.1 > score(frame(x=5.0)) + 0.2
    assert best > score(frame(colour="blue")) + 0.3
    assert abs(score(torch.full((1, 3, 32, 32), 0.2))) < 0.05  # nothing there
    assert abs(score(torch.tensor(world.COLOURS["red"]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255)) < 0.05


def test_its_gradient_draws_the_shape_to_the_middle() -> None:
    media = frame(x=7.0, y=7.0).requires_grad_()
    evaluate(load(CENTRED), media, [PROMPT]).scores.sum().backward()
    assert media.grad is not None and bool(media.grad.isfinite().all())
    red = media.grad[0, 0]
    assert float(red[14:18, 14:18].min()) > 0 > float(red[24:, 24:].max())  # redder here, less so in the corner
    with torch.no_grad():
        assert score(media + 0.05 * media.grad.sign()) > score(media)


def test_a_prompt_of_another_world_is_an_error() -> None:
    with pytest.raises(RewardError, match="no prompt of the moving shapes"):
        evaluate(load(CENTRED), frame(), ["a cat"])


@pytest.mark.parametrize(
    ("variant", "share", "segments"), [("recipe", 0.6, 4), ("dense", 0.6, 9), ("full_start", 1.0, 4)]
)
def test_the_variants_differ_in_what_they_say(variant: str, share: float, segments: int) -> None:
    own = recipe_of(Source(find("shapes_instruct").file, variant))
    assert isinstance(own, InstructVideo)
    own.validate()
    ((spec, weight),) = own.rewards.items()
    assert load(spec).chosen(9, [Prompt(PROMPT)]).shape == (1, segments)  # type: ignore[attr-defined]
    assert (own.start, weight) == (share, 1.0) and not any("frame_reward" in str(judge) for judge in own.judges[:-1])
