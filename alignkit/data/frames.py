"""Which frames of a video are looked at: indices from a number of frames, no pixels."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise

import torch

from alignkit.errors import RecipeError


def every_nth(num_frames: int, nth: int) -> list[int]:
    """0, nth, 2 nth, ... below `num_frames`."""
    _positive(num_frames=num_frames, nth=nth)
    return list(range(0, num_frames, nth))


def uniform(num_frames: int, count: int) -> list[int]:
    """`count` indices evenly spaced from the first to the last frame, rounded to nearest.

    Raises:
        RecipeError: more than there are.
    """
    _positive(num_frames=num_frames, count=count)
    if count > num_frames:
        raise RecipeError(f"{count} frames were asked of a video of {num_frames}; ask for at most {num_frames}")
    return torch.linspace(0, num_frames - 1, count).round().long().tolist()


def count_at_rate(num_frames: int, media_fps: float, fps: float, least: int = 4, most: int = 768) -> int:
    """How many frames of a video played at `media_fps` are sampled at `fps`: even, as Qwen2-VL pairs them.

    num_frames / media_fps * fps, kept between `least` and `most` and below `num_frames`, rounded to the nearest
    even number (ties to a multiple of 4), as published with VideoAlign (arXiv 2501.13918). A single frame is 1.
    """
    _positive(num_frames=num_frames, media_fps=media_fps, fps=fps, least=least, most=most)
    if num_frames == 1:
        return 1
    wanted = min(max(num_frames / media_fps * fps, least), min(most, num_frames) // 2 * 2)
    return round(wanted / 2) * 2


def at_rate(times: Sequence[float], fps: float) -> list[int]:
    """Indices of the frames that are on screen at 0, 1/fps, 2/fps, ... seconds after the first; needs no constant rate.

    A frame that stays on screen longer than 1/fps comes again, as a player shows it.

    Args:
        times: seconds at which each frame appears, ascending.
    """
    _positive(fps=fps, num_frames=len(times))
    length = times[-1] - times[0]
    slack = 1e-3  # many files round their times to the millisecond: a frame that appears so late is still on time
    moments = [times[0] + k / fps + slack for k in range(int((length + slack) * fps) + 1)]
    return [bisect.bisect_right(times, moment) - 1 for moment in moments]


def segments(num_frames: int, count: int) -> list[range]:
    """`range(num_frames)` cut into `count` consecutive segments whose lengths differ by at most 1.

    Raises:
        RecipeError: fewer frames than segments.
    """
    _positive(num_frames=num_frames, count=count)
    if count > num_frames:
        raise RecipeError(f"segments={count} of a video of {num_frames} frames; expected at most {num_frames}")
    cuts = [num_frames * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def middles(num_frames: int, count: int) -> list[int]:
    """The middle frame of each of `segments`; of an even number the one nearer to the start."""
    return [part[(len(part) - 1) // 2] for part in segments(num_frames, count)]


def one_per_segment(num_frames: int, count: int, rng: torch.Generator) -> list[int]:
    """One random frame of each of `segments` (SegVR of InstructVideo, arXiv 2312.12490)."""
    return [part[int(torch.randint(len(part), (), generator=rng))] for part in segments(num_frames, count)]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise RecipeError(f"{name}={value}; expected more than 0")
