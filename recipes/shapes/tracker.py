"""A judge of the moving shapes that no training sees: it finds the shape in every frame and follows it.

Per frame: the ground is the median colour of the border, the shape is the largest connected region that differs from
it, its place the centre of mass of that difference. Its colour is the named colour of the nearest hue, which
brightness does not change; its form is read from how the outline varies with the angle, which survives the blur of an
autoencoder. From the track of a clip follow the parts, each in [0, 1]:

| part | what it is |
|---|---|
| direction | 1 where the fitted displacement is at least 4 pixels and nearest to the direction asked for, else 0 |
| smoothness | 1 - (root mean square distance from the best straight uniform motion) / 2 pixels, at least 0 |
| steadiness | 1 - (standard deviation of the shape's brightness, over its mean) / 0.3, at least 0 |
| identity | share of frames with the colour and the form that were asked for, and with no second shape |

`tracker` is their product, so a clip is good only if it is good in all of them. `speed`, in pixels per frame, stands
beside them.

A frame without a shape is a fault that was measured, not a score that is missing: it counts as wrong for identity, and
smoothness and steadiness, measured on the other frames, are multiplied by the share of frames that show a shape. A clip
that shows one in fewer than half of its frames moves nowhere: all its parts are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange, reduce
from scipy import ndimage

from alignkit import shipped
from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.loading import load_file
from alignkit.types import Prompt

world = load_file(shipped.path("recipes", "shapes", "world.py"))

FAINTEST = 0.1  # distance in RGB in [0, 1] from the ground below which there is no shape
SMALLEST = 12  # pixels
# angular harmonics above which an outline is a triangle's, and a square's or a cross's; drawn, they have 0.54 and 0.28
POINTED, CORNERED = 0.16, 0.07
SECOND = 0.3  # of the shape's area: what a second shape has at least
MOVED = 4.0  # pixels of displacement over the clip; the slowest clip of the world has 8
JERKY, FLICKERING = 2.0, 0.3  # pixels, relative deviation: where smoothness and steadiness reach 0
PARTS = ("direction", "smoothness", "steadiness", "identity")
IN_FRAME = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # neighbours of a pixel, none in time


@dataclass(frozen=True)
class Track:
    """What is seen in each of F frames.

    Attributes:
        found: (F,) bool, whether there is a shape; the rest means something only where there is.
        centres: (F, 2) centre of mass (x, y) in pixels, y down.
        colours: (F, 3) of the shape, in [0, 1].
        shapes: (F,) index into the world's shapes.
        alone: (F,) bool, whether there is no second shape.
    """

    found: np.ndarray
    centres: np.ndarray
    colours: np.ndarray
    shapes: np.ndarray
    alone: np.ndarray


def contrast(frames: np.ndarray, thick: int = 2) -> np.ndarray:
    """(F, H, W, 3) difference from the ground of (F, H, W, 3) in [0, 1]; the ground is the border's median colour."""
    border = np.ones(frames.shape[1:3], bool)
    border[thick:-thick, thick:-thick] = False
    ground = np.median(frames[:, border], axis=1)
    return frames - rearrange(ground, "f c -> f 1 1 c")


def largest_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Connected regions of (F, H, W) bool: the largest of each frame, and the (F,) sizes of first and second."""
    labels = np.zeros(mask.shape, np.int32)
    count = int(ndimage.label(mask, IN_FRAME, output=labels))  # pyright: ignore[reportArgumentType]
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    frame_of = np.zeros(count + 1, int)
    frame_of[labels] = np.arange(len(mask))[:, None, None]
    largest, first, second = (np.zeros(len(mask), int) for _ in range(3))
    for label in range(1, count + 1):
        frame = frame_of[label]
        if sizes[label] > first[frame]:
            largest[frame], first[frame], second[frame] = label, sizes[label], first[frame]
        elif sizes[label] > second[frame]:
            second[frame] = sizes[label]
    return (labels == largest[:, None, None]) & mask, first, second


def follow(frames: np.ndarray) -> Track:
    """The shape in each of (F, H, W, 3) frames in [0, 1]."""
    difference = contrast(frames)
    distance = np.linalg.norm(difference, axis=-1)
    peak = reduce(distance, "f h w -> f 1 1", "max")
    region, first, second = largest_regions(distance > 0.4 * np.maximum(peak, FAINTEST))
    found = (peak[:, 0, 0] >= FAINTEST) & (first >= SMALLEST)
    core = region & (distance > 0.85 * peak)
    tint = _mean(difference, core)
    strength = np.maximum(np.linalg.norm(tint, axis=1), FAINTEST)[:, None]
    # what differs from the ground as the shape does, 1 inside it; ringing and noise of other colours drop out
    cover = np.einsum("f h w c, f c -> f h w", difference, tint / strength**2)
    near = ndimage.binary_dilation(region, IN_FRAME, iterations=2)  # soft edges belong to the shape
    weight = np.maximum(cover, 0) * near
    total = np.maximum(reduce(weight, "f h w -> f 1", "sum"), 1e-6)
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)
    centres = np.einsum("f h w, h w c -> f c", weight, np.stack([x, y], axis=-1)) / total
    centre_x, centre_y = rearrange(centres, "f c -> c f 1 1")
    forms = outlines(weight, x - centre_x, y - centre_y)
    return Track(found, centres, _mean(frames, core), forms, second < SECOND * first)


def _mean(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(F, C) mean of (F, H, W, C) inside (F, H, W) bool; 0 where nothing is."""
    total = np.einsum("f h w c, f h w -> f c", values, inside)
    return total / np.maximum(reduce(inside, "f h w -> f 1", "sum"), 1)


def outlines(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(F,) index of the form of each picture, from how it varies with the angle around its centre of mass.

    The third harmonic tells a triangle that points up, the fourth a square, whose corners lie on the diagonals, from
    a cross, whose arms lie on the axes; a circle, or what is too blurred to be anything else, has neither. Blur
    weakens the harmonics, keeps their signs, and leaves a circle a circle.

    Args:
        weight: (F, H, W) how much of each pixel is the shape's, at least 0.
        x, y: (F, H, W) pixels from its centre of mass, y down.
    """
    radius = np.hypot(x, y)
    angle = np.arctan2(y, x)
    heavy = weight * radius**2
    total = np.maximum(reduce(heavy, "f h w -> f", "sum"), 1e-6)
    third = reduce(heavy * np.sin(3 * angle), "f h w -> f", "sum") / total
    fourth = reduce(heavy * np.cos(4 * angle), "f h w -> f", "sum") / total
    form = np.select([third > POINTED, fourth < -CORNERED, fourth > CORNERED], [2, 1, 3], 0)
    return np.array([world.SHAPES.index(name) for name in ("circle", "square", "triangle", "cross")])[form]


def hues(colours: np.ndarray) -> np.ndarray:
    """(...,) index of the named colour at the smallest angle to each (..., 3), so that brightness does not matter."""
    named = np.array(list(world.COLOURS.values()), float)
    named /= np.linalg.norm(named, axis=1, keepdims=True)
    return np.argmax(colours @ named.T, axis=-1)


def uniform_motion(centres: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares fit of centres by place + velocity * time.

    Args:
        centres: (n, 2) in pixels.
        times: (n,) in frames, at least two different ones.

    Returns:
        (2,) velocity in pixels per frame, and the root mean square distance from the fit in pixels.
    """
    design = np.stack([np.ones(len(times)), times], axis=1)
    fit = np.linalg.lstsq(design, centres, rcond=None)[0]
    return fit[1], float(np.sqrt(((centres - design @ fit) ** 2).sum(axis=1).mean()))


def heading(displacement: np.ndarray) -> str:
    """The world's direction nearest to a (2,) displacement in pixels; "" where it is shorter than MOVED."""
    if np.linalg.norm(displacement) < MOVED:
        return ""
    return max(world.DIRECTIONS, key=lambda name: float(np.dot(world.DIRECTIONS[name], displacement)))


def judge(track: Track, prompt: str) -> dict[str, float]:
    """Every part of one clip, with its product `all` and `speed` in pixels per frame; see the head of this file."""
    times = np.flatnonzero(track.found)
    if 2 * len(times) < len(track.found) or len(times) < 2:
        return dict.fromkeys((*PARTS, "all", "speed"), 0.0)
    colour, shape, direction = world.parse(prompt)
    share = len(times) / len(track.found)
    centres, brightness = track.centres[times], np.linalg.norm(track.colours[times], axis=1)
    velocity, residual = uniform_motion(centres, times)
    right = (hues(track.colours) == list(world.COLOURS).index(colour)) & (track.shapes == world.SHAPES.index(shape))
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1) / np.diff(times)
    parts = {
        "direction": float(heading(velocity * (len(track.found) - 1)) == direction),
        "smoothness": share * max(0.0, 1 - residual / JERKY),
        "steadiness": share * max(0.0, 1 - float(brightness.std() / brightness.mean()) / FLICKERING),
        "identity": float((right & track.found & track.alone).mean()),
    }
    return {**parts, "all": float(np.prod(list(parts.values()))), "speed": float(np.median(steps))}


def judgements(media: torch.Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
    """`judge` of each of (B, T, 3, H, W) clips in [0, 1]."""
    frames = rearrange(media.detach().cpu().float().numpy(), "b t c h w -> (b t) h w c")
    seen, length = follow(frames), media.shape[1]
    clips = [slice(start, start + length) for start in range(0, len(frames), length)]
    return [
        judge(Track(**{name: values[clip] for name, values in vars(seen).items()}), prompt)
        for clip, prompt in zip(clips, prompts, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Tracker:
    """Whether the shape that the prompt names moves as it says: steadily, and staying itself.

    Attributes:
        part: "all", the product of the parts, named `tracker`; or "direction", "smoothness", "steadiness",
            "identity", each in [0, 1], or "speed" in pixels per frame, named like that.
    """

    part: str = "all"

    kind = "video"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="video",
        summary="the shape that the prompt names moves as it says, steadily, and stays itself",
        range="[0, 1]; speed: pixels per frame",
        cost="about 1 ms a clip on one core",
    )

    def __post_init__(self) -> None:
        if self.part not in ("all", *PARTS, "speed"):
            raise RecipeError(f"part={self.part!r}; choose one of {', '.join(('all', *PARTS, 'speed'))}")

    @property
    def name(self) -> str:
        return "tracker" if self.part == "all" else self.part

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt that is none of this world."""
        for prompt in prompts:
            try:
                world.parse(prompt)
            except ValueError as error:
                raise RewardError(f"prompt {prompt.id}: {error}") from error

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) of (B, T, 3, H, W) in [0, 1]. Raises RewardError where the prompt is none of this world."""
        self.check_prompts(prompts)
        found = [parts[self.part] for parts in judgements(media, prompts)]
        return torch.tensor(found, dtype=torch.float32, device=media.device)
