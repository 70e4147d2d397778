"""The first frames of a video alone: which latents a decoder needs for them is found by watching it, once.

Whether a decoder is causal in time is seen, not looked up: a few small random latents are decoded whole and cut short,
with everything after the cut made loud, and the frames compared. So a decoder that normalises over time, looks ahead,
works in chunks, or answers other numbers of frames than 1 + r (k - 1) needs no name here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from alignkit.errors import RecipeError
from alignkit.policy.memory import decoding

SIDE = 4  # latents of a probe are at most this high and wide
LOUD = 10.0  # what comes after the cut, in standard deviations
EXACT = 1e-3  # of the largest pixel, in float32; convolutions in TF32 round by less

Own = Callable[..., Any]
Replace = Callable[[str, Own], Own]
"""(component, its own decode) -> what the pipeline calls instead."""


@dataclass(frozen=True)
class Call:
    """One call of a decoder: the component's name, the latents (rows, ...), and all other arguments."""

    name: str
    z: torch.Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Decoding:
    """How a pipeline decodes: the calls of its decoder, and what became of their rows.

    Attributes:
        calls: in order.
        rows: (B, T) which row of all calls each frame is, where frames are decoded as pictures of their own; None
            where the decoder sees whole videos, (rows, C, K, h, w).
    """

    calls: tuple[Call, ...]
    rows: torch.Tensor | None


def numbering(calls: list[Call]) -> Replace:
    """Decoders that note their calls and answer pictures (or one-frame videos) whose pixels are the row's number."""

    def replace(name: str, own: Own) -> Own:
        def decode(z: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            first = sum(len(call.z) for call in calls)
            calls.append(Call(name, z, args, kwargs))
            numbers = torch.arange(first, first + len(z), dtype=torch.float32, device=z.device)
            pixels = numbers.view(-1, *[1] * (z.ndim - 1)).expand(-1, 3, *[1] * (z.ndim - 4), 8, 8).clone()
            return DecoderOutput(sample=pixels) if return_dict else (pixels,)

        return decode

    return replace


def read(calls: Sequence[Call], media: torch.Tensor, pipeline: str) -> Decoding:
    """What `numbering` found, from the media (B, T, 3, 8, 8) that the pipeline made of the numbers.

    Raises:
        RecipeError: a pipeline of pictures, or one without a decoder of its own.
    """
    if not calls or media.ndim != 5:
        raise RecipeError(
            f"{pipeline} decodes no videos with a VAE of its own, so there are no first frames; leave `frames` out"
        )
    if calls[0].z.ndim == 5:
        return Decoding(tuple(calls), None)
    shown = media[:, :, 0, 0, 0].double().cpu()
    return Decoding(tuple(calls), shown.flatten().argsort().argsort().view(shown.shape))  # numbers grow with the rows


@dataclass
class Prefixes:
    """What was seen of one decoder with `latents` latent frames.

    Attributes:
        frames: of a video decoded whole.
        deaf: how many of its leading frames the last latent frame does not change.
        agree: by number of leading latents, how many leading frames they alone decode to as the whole does.
    """

    latents: int
    frames: int
    deaf: int
    agree: dict[int, int] = field(default_factory=dict)


class Watched:
    """Decoders of one pipeline and what was seen of them."""

    def __init__(self) -> None:
        self._seen: dict[Any, Prefixes] = {}

    def frames(self, vae: nn.Module, call: Call) -> int:
        """Frames of a video decoded whole."""
        return self._prefixes(vae, call).frames

    def needed(self, vae: nn.Module, call: Call, frames: int) -> int:
        """The fewest leading latents that decode to the first `frames` frames as the whole does; all where no fewer do.

        Raises:
            RecipeError: more frames than there are.
        """
        seen = self._prefixes(vae, call)
        check(frames, seen.frames)
        if frames > seen.deaf:  # as they depend on all latents
            return seen.latents
        for count in range(max(frames * (seen.latents - 1) // seen.frames, 1), seen.latents):
            if count not in seen.agree:
                seen.agree[count] = agreeing(vae, call, count)
            if seen.agree[count] >= frames:
                return count
        return seen.latents

    def _prefixes(self, vae: nn.Module, call: Call) -> Prefixes:
        public = {name: value for name, value in vars(vae).items() if not name.startswith("_")}
        settings = sorted((name, value) for name, value in public.items() if isinstance(value, bool | int | float))
        key = (call.name, call.z.shape[2], tuple(settings), len(call.args), tuple(call.kwargs))
        if key not in self._seen:
            whole, changed = (run(vae, call, z) for z in (probe(call), probe(call, call.z.shape[2] - 1)))
            self._seen[key] = Prefixes(call.z.shape[2], whole.shape[2], same_frames(whole, changed))
        return self._seen[key]


def check(frames: int, of: int) -> None:
    """Raises RecipeError where a video of `of` frames has no first `frames`."""
    if not 1 <= frames <= of:
        raise RecipeError(f"frames={frames} of videos of {of}; expected 1 to {of}, or None for all")


def probe(call: Call, quiet: int | None = None) -> torch.Tensor:
    """(1, C, K, h, w) small normal latents, float32, always the same; loud after the first `quiet` of them."""
    _, channels, latents, height, width = call.z.shape
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(1, channels, latents, min(height, SIDE), min(width, SIDE), generator=rng)
    if quiet is not None:
        z[:, :, quiet:] *= LOUD
    return z.to(call.z.device)


def agreeing(vae: nn.Module, call: Call, count: int) -> int:
    """How many leading frames are the same when only the first `count` latents are decoded."""
    z = probe(call, quiet=count)
    return same_frames(run(vae, call, z[:, :, :count]), run(vae, call, z))


def same_frames(cut: torch.Tensor, whole: torch.Tensor) -> int:
    """How many leading frames of two videos (1, 3, T, H, W) are the same, on the scale of the first."""
    common = min(whole.shape[2], cut.shape[2])
    error = (whole[:, :, :common] - cut[:, :, :common]).abs().amax(dim=(0, 1, 3, 4))
    same = error <= EXACT * cut.abs().max()  # False where either is not finite
    return int(same.long().cumprod(dim=0).sum())


@torch.no_grad()
def run(vae: nn.Module, call: Call, z: torch.Tensor) -> torch.Tensor:
    """(1, 3, T, H, W) float32: `z` (1, C, K, h, w) decoded with the other arguments of `call`, in float32."""

    def of_first(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        row = value[:1] if value.ndim and len(value) == len(call.z) else value
        return row.float() if row.is_floating_point() else row

    single = {p.dtype for p in vae.parameters() if p.is_floating_point()} <= {torch.float32}
    devices = [z.device.index or 0] if z.device.type == "cuda" else []
    with (
        nullcontext() if single else decoding(vae, dtype=torch.float32),
        torch.autocast(z.device.type, enabled=False),
        torch.random.fork_rng(devices=devices),
    ):
        torch.default_generator.manual_seed(0)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(0)
        kwargs = {name: of_first(value) for name, value in call.kwargs.items()}
        return vae.decode(z, *map(of_first, call.args), return_dict=False, **kwargs)[0].float()  # type: ignore[operator]


def cutting(count: int) -> Replace:
    """Decoders of videos that are given the first `count` latents."""

    def replace(name: str, own: Own) -> Own:
        def decode(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return own(z[:, :, :count], *args, **kwargs)

        return decode

    return replace


def picking(wanted: torch.Tensor) -> Replace:
    """Decoders of pictures that decode the wanted rows, (rows of all calls,) bool, and answer zeros for the others."""
    begun = 0

    def replace(name: str, own: Own) -> Own:
        def decode(z: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            nonlocal begun
            rows = wanted[begun : begun + len(z)].nonzero().flatten().to(z.device)
            begun += len(z)
            few = own(z[rows if len(rows) else slice(1)], *args, return_dict=False, **kwargs)[0]  # one for its shape
            pixels = few.new_zeros(len(z), *few.shape[1:])
            pixels = pixels.index_copy(0, rows, few) if len(rows) else pixels
            return DecoderOutput(sample=pixels) if return_dict else (pixels,)

        return decode

    return replace
