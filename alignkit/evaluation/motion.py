"""What a clip does over time: how much moves, how much pixels change, how its brightness flickers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce, repeat

from alignkit.data.frames import uniform
from alignkit.rewards.pixels import luminance
from alignkit.rewards.video import flow_magnitude, flows, frame_difference

PAIRS = 32  # neighbouring frames that are compared, of a long clip evenly spread
PIXELS = 2**22  # numbers of the frames that are looked at together
FLAT = 1e-3  # standard deviation of luminance below which a frame has no contrast
SIDE = 64  # pixels of a frame's shorter side in which flow is measured


@dataclass(frozen=True)
class Course:
    """One clip over time, at the S pairs of neighbouring frames that were compared.

    Attributes:
        steps: (S,) the first frame of each pair.
        flow: (S,) mean length of the optical flow, in pixels per frame.
        change: (S,) mean absolute change of a pixel, in [0, 1].
        brightness: (S,) mean luminance of the pair's second frame, in [0, 1].
        flicker: (S,) how far the mean luminance jumps from the pair's first frame to its second, in [0, 1].
    """

    steps: tuple[int, ...]
    flow: torch.Tensor
    change: torch.Tensor
    brightness: torch.Tensor
    flicker: torch.Tensor


@dataclass(frozen=True)
class Band:
    """Mean and standard deviation over clips, step by step."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def course(frames: torch.Tensor) -> Course:
    """The course of a clip (T, 3, H, W) uint8 of at least two frames."""
    first = uniform(len(frames) - 1, min(PAIRS, len(frames) - 1))
    at_once = max(1, PIXELS // frames[0].numel())
    flow, change, light = [], [], []
    for piece in torch.tensor(first).split(at_once):
        pairs = torch.stack([frames[piece], frames[piece + 1]], dim=1).float() / 255
        grey = luminance(pairs)
        flow.append(flow_magnitude(flows(repeat(evenly_lit(grey), "s t h w -> s t c h w", c=3), SIDE)))
        change.append(frame_difference(pairs))
        light.append(reduce(grey, "s t h w -> s t", "mean"))
    before, after = torch.cat(light).unbind(1)
    return Course(tuple(first), torch.cat(flow), torch.cat(change), after, (after - before).abs())


def evenly_lit(grey: torch.Tensor) -> torch.Tensor:
    """(S, 2, H, W) luminance, the second frame brought to the mean and the contrast of the first.

    Optical flow takes every change of brightness for motion; without this, flickering clips seem to move several
    times as fast as they do, and a generator that learnt not to flicker seems to have stopped.
    """
    mean = reduce(grey, "s t h w -> s t 1 1", "mean")
    contrast = (grey - mean).square().mean(dim=(2, 3), keepdim=True).sqrt().clamp(min=FLAT)
    return (grey - mean) / contrast * contrast[:, :1] + mean[:, :1]


def measures(one: Course) -> dict[str, float]:
    """The clip's numbers: means over its steps."""
    return {
        "flow": float(one.flow.mean()),
        "frame_difference": float(one.change.mean()),
        "flicker": float(one.flicker.mean()),
    }


def bands(courses: Sequence[Course]) -> dict[str, Band]:
    """Flow, and brightness as its distance from the clip's own mean, over the clips of the most usual length.

    Clips differ in brightness by their content; what flickers is what leaves the clip's own mean.
    """
    if not courses:
        return {}
    ((steps, _),) = Counter(one.steps for one in courses).most_common(1)
    alike = [one for one in courses if one.steps == steps]
    curves = {
        "flow": torch.stack([one.flow for one in alike]),
        "brightness": torch.stack([one.brightness - one.brightness.mean() for one in alike]),
    }
    places = tuple(step + 1.0 for step in steps)
    return {name: _band(places, values.double()) for name, values in curves.items()}


def _band(steps: tuple[float, ...], values: torch.Tensor) -> Band:
    return Band(steps, tuple(values.mean(dim=0).tolist()), tuple(values.std(dim=0, correction=0).tolist()))
