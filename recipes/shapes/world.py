"""The world of moving shapes: short clips of one coloured shape, and the imperfect captions the generator learns from.

A prompt fixes colour, shape and direction. It leaves free the place, size, speed and ground; whether an aligned
generator still varies those is the diversity that the report measures.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

SIZE, FRAMES = 32, 9  # pixels per side, frames per clip
TEMPLATE = "a {colour} {shape} {direction}"
COLOURS = {
    "red": (220, 45, 45),
    "green": (45, 185, 65),
    "blue": (55, 85, 235),
    "yellow": (235, 215, 45),
    "purple": (160, 55, 200),
    "orange": (240, 135, 25),
    "cyan": (40, 200, 215),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"moves right": (1, 0), "moves left": (-1, 0), "rises": (0, -1), "falls": (0, 1)}  # (x, y), y down
RADIUS = (6.5, 8.0)  # pixels from the centre to the farthest side: small or large
SPEED = (1.0, 2.0)  # pixels per frame: slow or fast
PLACES = (8, 12, 16, 20, 24)  # pixels; a centre starts and ends at one of them along each axis
GROUND = (15, 75)  # grey level
HELD_OUT_PER_DIRECTION, SPLIT_SEED = 8, 6


@dataclass(frozen=True)
class Clip:
    """One clip: what the prompt names (colour, shape, direction) and what it leaves free."""

    colour: str
    shape: str
    path: tuple[tuple[float, float], ...]  # centre (x, y) in pixels, frame by frame
    radius: float = 6.5
    ground: float = 45.0
    light: tuple[float, ...] = (1.0,) * FRAMES  # brightness, frame by frame; it flickers where they differ


@dataclass(frozen=True)
class Faults:
    """Shares of clips with each fault, drawn one by one; a clip may have several.

    Attributes:
        free: places, sizes and speeds are anywhere between those of the world.
    """

    wrong_direction: float
    still: float
    jerky: float
    flickering: float
    free: bool = False


PRETRAINING = Faults(wrong_direction=0.28, still=0.2, jerky=0.06, flickering=0.15)
FREE = replace(PRETRAINING, free=True)
NONE = Faults(0.0, 0.0, 0.0, 0.0)


def prompt_for(colour: str, shape: str, direction: str) -> str:
    return TEMPLATE.format(colour=colour, shape=shape, direction=direction)


def parse(prompt: str) -> tuple[str, str, str]:
    """(colour, shape, direction) of a prompt of this world.

    Raises:
        ValueError: it is none of this world.
    """
    article, _, rest = prompt.partition(" ")
    colour, _, rest = rest.partition(" ")
    shape, _, direction = rest.partition(" ")
    if article != "a" or colour not in COLOURS or shape not in SHAPES or direction not in DIRECTIONS:
        raise ValueError(
            f"{prompt!r} is no prompt of the moving shapes; expected like {prompt_for('red', 'circle', 'rises')!r}"
        )
    return colour, shape, direction


def split_prompts() -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts), the directions alike; every word of a held-out prompt occurs in others."""
    every = [prompt_for(*parts) for parts in itertools.product(COLOURS, SHAPES, DIRECTIONS)]
    rng, held_out = random.Random(SPLIT_SEED), set()
    for direction in DIRECTIONS:
        held_out.update(rng.sample([p for p in every if p.endswith(direction)], HELD_OUT_PER_DIRECTION))
    return [p for p in every if p not in held_out], [p for p in every if p in held_out]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How much of a pixel the shape covers, in [0, 1], at (x, y) pixels from its centre; edges 2.5 pixels soft."""
    if shape == "circle":
        depth = radius - np.hypot(x, y)
    elif shape == "square":
        depth = 0.88 * radius - np.maximum(abs(x), abs(y))
    elif shape == "triangle":
        side = ((y + radius) / 2 - abs(x)) * np.sqrt(0.8)
        depth = np.minimum(side, 0.9 * radius - y)
    else:
        bar = 0.36 * radius
        depth = np.maximum(np.minimum(radius - abs(x), bar - abs(y)), np.minimum(radius - abs(y), bar - abs(x)))
    return np.clip(depth / 2.5 + 0.5, 0, 1)


def draw(clip: Clip) -> np.ndarray:
    """The clip as (FRAMES, SIZE, SIZE, 3) uint8; the same Clip always gives the same pixels."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    frames = []
    for (centre_x, centre_y), light in zip(clip.path, clip.light, strict=True):
        inside = coverage(clip.shape, x - centre_x, y - centre_y, clip.radius)[..., None]
        pixels = clip.ground + (np.array(COLOURS[clip.colour], np.float32) - clip.ground) * inside
        frames.append(np.clip(pixels * light, 0, 255).round().astype(np.uint8))
    return np.stack(frames)


def crowd(rng: np.random.Generator, faults: Faults, count: int = 4) -> np.ndarray:
    """(FRAMES, SIZE, SIZE, 3) uint8 of `count` moving shapes and a ground of any colours: what an autoencoder learns
    from faster than from one shape on grey."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    frames = np.tile(rng.uniform(0, 255, size=3), (FRAMES, SIZE, SIZE, 1)).astype(np.float32)
    for _ in range(count):
        shape, direction = SHAPES[rng.integers(len(SHAPES))], list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
        clip, colour = random_clip(rng, "white", shape, direction, faults), rng.uniform(0, 255, size=3)
        for frame, (centre_x, centre_y) in zip(frames, clip.path, strict=True):
            inside = coverage(shape, x - centre_x, y - centre_y, clip.radius)[..., None]
            frame += (colour - frame) * inside
    return frames.round().astype(np.uint8)


def steady_path(rng: np.random.Generator, direction: str, speed: float, free: bool = False) -> np.ndarray:
    """(FRAMES, 2) centres along `direction` at `speed`, from one of PLACES to another, or from anywhere between."""
    travel = np.outer(np.arange(FRAMES) * speed, DIRECTIONS[direction])
    low = PLACES[0] - np.minimum(travel[-1], 0)
    room = PLACES[-1] - PLACES[0] - np.abs(travel[-1])
    if free:
        return low + rng.uniform(size=2) * room + travel
    step = PLACES[1] - PLACES[0]
    return low + step * rng.integers(room // step, endpoint=True) + travel


def random_clip(rng: np.random.Generator, colour: str, shape: str, direction: str, faults: Faults = NONE) -> Clip:
    """A clip whose place, size, speed and ground, which no prompt names, are drawn at random."""
    if rng.random() < faults.wrong_direction:
        others = [name for name in DIRECTIONS if name != direction]
        direction = others[rng.integers(len(others))]
    radius, speed = (rng.uniform(*ends) if faults.free else float(rng.choice(ends)) for ends in (RADIUS, SPEED))
    path = steady_path(rng, direction, speed, faults.free)
    kind = rng.random()
    if kind < faults.still:
        path = np.repeat(path[FRAMES // 2 : FRAMES // 2 + 1], FRAMES, axis=0)
    elif kind < faults.still + faults.jerky:
        path = jerked(rng, path)
    clip = Clip(colour, shape, tuple(map(tuple, path.tolist())), radius, rng.uniform(*GROUND))
    return flickering(rng, clip) if rng.random() < faults.flickering else clip


def jerked(rng: np.random.Generator, path: np.ndarray, pixels: float = 2.5) -> np.ndarray:
    """The path with every centre moved at random by up to `pixels` along each axis, inside the picture."""
    return np.clip(path + rng.uniform(-pixels, pixels, size=path.shape), 4, SIZE - 5)


def flickering(rng: np.random.Generator, clip: Clip, darkest: float = 0.35) -> Clip:
    """The clip with the brightness of every frame drawn from [darkest, 1]."""
    return replace(clip, light=tuple(rng.uniform(darkest, 1.0, size=FRAMES).tolist()))


def pretraining_pair(rng: np.random.Generator, faults: Faults = PRETRAINING) -> tuple[str, Clip]:
    """(prompt, clip) as a web crawl might have it: some clips stand still, flicker or move another way."""
    train, _ = _SPLIT
    prompt = train[rng.integers(len(train))]
    return prompt, random_clip(rng, *parse(prompt), faults)


_SPLIT = split_prompts()


def write_world(path: Path) -> None:
    """Write world.json: what rewards, recipes and reports need to know of this world."""
    train, held_out = split_prompts()
    record = {
        "size": SIZE,
        "frames": FRAMES,
        "colours": {name: list(rgb) for name, rgb in COLOURS.items()},
        "shapes": list(SHAPES),
        "directions": {name: list(step) for name, step in DIRECTIONS.items()},
        "template": TEMPLATE,
        "radius": list(RADIUS),
        "speed": list(SPEED),
        "places": list(PLACES),
        "ground": list(GROUND),
        "train_prompts": train,
        "held_out_prompts": held_out,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
