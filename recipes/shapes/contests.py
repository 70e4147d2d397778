"""Pairs of clips of one prompt, and which is the better one in look, motion and what was asked: labels as people give.

Three dimensions, as in VideoReward (arXiv 2501.13918, section 3): VQ how single frames look, MQ how things move, TA
whether it is what the prompt asks. Labels are 1 (the first is better), -1 (the second), 0 (alike), 22 (no answer).

What counts, in this world:
* VQ: flicker, blur, grain and low contrast, each the worse the stronger. Motion does not matter.
* MQ: steady is best, jerky the worse the stronger, still is worst. Look and direction do not matter.
* TA: how many of colour, shape and direction are as asked. A still clip moves in no direction, so its direction is
  wrong too: as wrong as another one, which a clip that moves the wrong way makes up for in MQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from scipy.ndimage import gaussian_filter

from alignkit.rewards.loading import load_file
from alignkit.shipped import path

world = load_file(path("recipes", "shapes", "world.py"))

DIMENSIONS = ("VQ", "MQ", "TA")
FIRST, SECOND, TIE, INVALID = 1, -1, 0, 22
LOOKS = ("flicker", "blur", "grain", "low contrast")
ALIKE = (0.2, 0.2, 0.5)  # quality differs by less than this: a tie
FLAWED_LOOK = 0.6  # of clips
STILL, JERKY = 0.25, 0.35
OTHER_COLOUR, OTHER_SHAPE, OTHER_DIRECTION = 0.22, 0.22, 0.25
FREE = replace(world.NONE, free=True)  # without the world's faults, anywhere: where a generator may put it too
WEAKEST = 0.25  # of the flaws there are; the strongest is 1


@dataclass(frozen=True)
class Shown:
    """What one clip of a pair shows: severities are 0 (no flaw) or in [WEAKEST, 1].

    Attributes:
        look: which flaw of look it has, one of LOOKS; it counts where `spoilt` is above 0.
        jerks: how jerky; 0: steady.
    """

    colour: str
    shape: str
    direction: str
    look: str = LOOKS[0]
    spoilt: float = 0.0
    jerks: float = 0.0
    still: bool = False

    def quality(self, prompt: str) -> tuple[float, float, float]:
        """(VQ, MQ, TA): VQ and MQ in [-1, 0], TA the number in 0 to 3 of what is as asked."""
        colour, shape, direction = world.parse(prompt)
        asked = (self.colour == colour) + (self.shape == shape) + (self.direction == direction and not self.still)
        return -self.spoilt, -1.3 if self.still else -self.jerks, float(asked)


def random_shown(rng: np.random.Generator, prompt: str, other: float | None = None) -> Shown:
    """A clip of the prompt with flaws drawn one by one.

    Args:
        other: share of other colours, and of other shapes and directions; None: OTHER_COLOUR and so on.
    """
    colour, shape, direction = world.parse(prompt)
    motion = rng.random()
    return Shown(
        _or_other(rng, colour, world.COLOURS, OTHER_COLOUR if other is None else other),
        _or_other(rng, shape, world.SHAPES, OTHER_SHAPE if other is None else other),
        _or_other(rng, direction, world.DIRECTIONS, OTHER_DIRECTION if other is None else other),
        LOOKS[rng.integers(len(LOOKS))],
        float(rng.uniform(WEAKEST, 1)) if rng.random() < FLAWED_LOOK else 0.0,
        float(rng.uniform(WEAKEST, 1)) if STILL <= motion < STILL + JERKY else 0.0,
        bool(motion < STILL),
    )


ANSWER_WORDS = "colour shape direction yes no is stands look fine slight strong motion steady shaky jerky still"


def described(shown: Shown) -> str:
    """What a model that looks at the clip should say, in words of this world."""
    moves = "stands" if shown.still else shown.direction
    look = f"{'strong' if _strong(shown.spoilt) else 'slight'} {shown.look}" if shown.spoilt else "fine"
    jerks = ("jerky" if _strong(shown.jerks) else "shaky") if shown.jerks else "steady"
    return f"is {shown.colour} {shown.shape} {moves} look {look} motion {'still' if shown.still else jerks}"


def matched(shown: Shown, prompt: str) -> str:
    """What it should say when asked whether the clip is what the prompt asks for."""
    colour, shape, direction = world.parse(prompt)
    right = (shown.colour == colour, shown.shape == shape, shown.direction == direction and not shown.still)
    names = zip(("colour", "shape", "direction"), right, strict=True)
    return " ".join(f"{name} {'yes' if one else 'no'}" for name, one in names)


def _strong(severity: float) -> bool:
    return severity > (1 + WEAKEST) / 2


def _or_other(rng: np.random.Generator, name: str, names: Any, share: float) -> str:
    others = [other for other in names if other != name]
    other = others[rng.integers(len(others))]
    return other if rng.random() < share else name


def film(rng: np.random.Generator, shown: Shown) -> np.ndarray:
    """(T, H, W, 3) uint8; what `shown` leaves free is drawn."""
    return filmed(rng, shown)[0]


def filmed(rng: np.random.Generator, shown: Shown) -> tuple[np.ndarray, np.ndarray]:
    """`film`, and (T, 2) the centre (x, y) of the shape in pixels."""
    clip = world.random_clip(rng, shown.colour, shown.shape, shown.direction, FREE)
    steps = np.array(clip.path)
    if shown.still:
        steps = np.repeat(steps[world.FRAMES // 2 : world.FRAMES // 2 + 1], world.FRAMES, axis=0)
    elif shown.jerks:
        steps = world.jerked(rng, steps, pixels=0.5 + 2.5 * shown.jerks)
    clip = replace(clip, path=tuple(map(tuple, steps.tolist())))
    if shown.spoilt and shown.look == "flicker":
        clip = world.flickering(rng, clip, darkest=1 - 0.75 * shown.spoilt)
    return spoilt(rng, world.draw(clip), clip.ground, shown), steps


def spoilt(rng: np.random.Generator, pixels: np.ndarray, ground: float, shown: Shown) -> np.ndarray:
    """The clip with the flaws of look that are in the pixels."""
    if not shown.spoilt or shown.look == "flicker":
        return pixels
    values = pixels.astype(np.float32)
    if shown.look == "blur":
        values = gaussian_filter(values, sigma=(0, 2.2 * shown.spoilt, 2.2 * shown.spoilt, 0))
    elif shown.look == "grain":
        values = values + rng.normal(0, 45 * shown.spoilt, size=values.shape)
    else:
        values = ground + (1 - 0.8 * shown.spoilt) * (values - ground)
    return np.clip(values, 0, 255).round().astype(np.uint8)


def told(prompt: str, first: Shown, second: Shown) -> list[int]:
    """The three labels of a pair, without noise."""
    leads = zip(first.quality(prompt), second.quality(prompt), ALIKE, strict=True)
    return [TIE if abs(a - b) < alike else (FIRST if a > b else SECOND) for a, b, alike in leads]


def as_people_answer(rng: np.random.Generator, labels: np.ndarray, mistaken: float, unanswered: float) -> np.ndarray:
    """(N, 3) labels of which a share is drawn at random from win, loss and tie, and a share is INVALID."""
    noise = rng.choice([FIRST, SECOND, TIE], size=labels.shape)
    labels = np.where(rng.random(labels.shape) < mistaken, noise, labels)
    return np.where(rng.random(labels.shape) < unanswered, INVALID, labels)


Drawn = tuple[list[str], np.ndarray, np.ndarray, np.ndarray]
"""Prompts, (N, T, H, W, 3) uint8 twice, (N, 3) labels."""


def drawn(
    rng: np.random.Generator,
    count: int,
    prompts: Sequence[str],
    mistaken: float = 0.0,
    unanswered: float = 0.0,
) -> Drawn:
    """`count` pairs of clips.

    Args:
        prompts: to draw from.
        mistaken, unanswered: shares of labels that are noise and that are missing.
    """
    asked = [prompts[int(rng.integers(len(prompts)))] for _ in range(count)]
    pairs = [(random_shown(rng, prompt), random_shown(rng, prompt)) for prompt in asked]
    labels = np.array([told(prompt, *pair) for prompt, pair in zip(asked, pairs, strict=True)])
    first, second = (np.stack([film(rng, pair[side]) for pair in pairs]) for side in (0, 1))
    return asked, first, second, as_people_answer(rng, labels, mistaken, unanswered)


def as_media(clips: np.ndarray) -> torch.Tensor:
    """(..., T, 3, H, W) in [0, 1] of (..., T, H, W, 3) uint8."""
    return rearrange(torch.from_numpy(clips), "... h w c -> ... c h w").float() / 255


FLAWS = {"VQ": LOOKS, "MQ": ("jerky", "still"), "TA": ("other colour", "other shape", "other direction", "no motion")}
"""Flaws of a clip that is otherwise as asked, by the dimension that they count in."""


def flawed(rng: np.random.Generator, prompt: str, flaw: str) -> Shown:
    """What a clip of the prompt with one flaw shows, at middle strength; "" is none."""
    right = Shown(*world.parse(prompt))
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "jerky": {"jerks": 0.6},
        "still": {"still": True},
        "no motion": {"still": True},
        "other colour": {"colour": _or_other(rng, right.colour, world.COLOURS, 1.0)},
        "other shape": {"shape": _or_other(rng, right.shape, world.SHAPES, 1.0)},
        "other direction": {"direction": _or_other(rng, right.direction, world.DIRECTIONS, 1.0)},
    }
    return replace(right, **changes.get(flaw, {"look": flaw, "spoilt": 0.6}))


def probes(rng: np.random.Generator, prompts: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Prompts, and for each flaw and for none, "", a clip of each: (N, T, H, W, 3) uint8."""
    flaws = ("", *(flaw for group in FLAWS.values() for flaw in group))
    clips = {f: np.stack([film(rng, flawed(rng, prompt, f)) for prompt in prompts]) for f in flaws}
    return list(prompts), clips
