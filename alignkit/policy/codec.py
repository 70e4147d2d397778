"""Between latents and pixels, by the pipeline's own un-packing, decoder and post-processing, in both directions.

Decoding runs the pipeline with no iteration of its loop. Encoding inverts what stands between the latents of the loop
and its VAE, for every pipeline by the same means: what the decoder receives is f(x0), and f (un-packing, scaling,
shifting) moves and scales single elements. So f(x0) = J x0 + b with one number in every row and column of J, autograd
gives J^T w, and f(x0) = z has the solution

    x0 = J^T (z - b) / J^T (J 1)        b = f(0), J 1 = f(1) - f(0), element by element
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DecoderOutput
from einops import rearrange
from torch import nn

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.driver import Driver
from alignkit.policy.frames import Call, Decoding, Own, Replace, Watched, check, cutting, numbering, picking, read
from alignkit.policy.onestep import session_from
from alignkit.policy.session import Session
from alignkit.policy.standin import class_attribute

OF_PICTURES = ("image_processor", "video_processor")
EXACT = 1e-5  # relative error of the inversion in float32


@dataclass
class Decoder:
    """What a pipeline gave to the decoder of one of its components in one run."""

    name: str = ""
    given: list[torch.Tensor] | None = None

    def input(self) -> torch.Tensor | None:
        """All calls as one, along the rows."""
        return None if not self.given else torch.cat(self.given)


class Codec:
    """Decodes and encodes for one driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.pipe = driver, driver.pipe
        self.watched = Watched()
        self.batch: int | None = None  # samples decoded at once; None: all
        self._said_bare_decode = False

    def decode(self, x0: torch.Tensor, cond: Conditioning, frames: int | None = None) -> torch.Tensor:
        """Media float32 in [0, 1]: (B, 3, H, W) or (B, T, 3, H, W); outside [0, 1] the gradient passes through.

        Args:
            frames: only so many first frames, (B, frames, 3, H, W), from the fewest latents that give them.
        """
        if self.batch is not None and len(x0) > self.batch:
            pieces = [slice(start, start + self.batch) for start in range(0, len(x0), self.batch)]
            return torch.cat([self.decode(x0[piece], cond[piece], frames) for piece in pieces])
        replace = None if frames is None else self._replacement(x0, cond, frames)
        media = self._media(x0, cond, replace, grad=torch.is_grad_enabled())[:, :frames]
        return media + (media.clamp(0, 1) - media).detach()

    def num_frames(self, x0: torch.Tensor, cond: Conditioning) -> int:
        """Frames of a video that is decoded whole."""
        found = self._decoding(x0, cond)
        if found.rows is not None:
            return found.rows.shape[1]
        return self.watched.frames(self._decoder_of(found), found.calls[0])

    def latent_frames(self, x0: torch.Tensor, cond: Conditioning, frames: int | None) -> int:
        """How many leading latent frames of each video are decoded for its first `frames` frames; None: of all."""
        found = self._decoding(x0, cond)
        if found.rows is not None:
            return found.rows.shape[1] if frames is None else frames
        latents = found.calls[0].z.shape[2]
        return latents if frames is None else self.watched.needed(self._decoder_of(found), found.calls[0], frames)

    def _replacement(self, x0: torch.Tensor, cond: Conditioning, frames: int) -> Replace:
        """Decoders that do no more than the first `frames` frames need."""
        found = self._decoding(x0, cond)
        if found.rows is None:
            return cutting(self.watched.needed(self._decoder_of(found), found.calls[0], frames))
        check(frames, found.rows.shape[1])
        wanted = torch.zeros(found.rows.numel(), dtype=torch.bool)
        wanted[found.rows[:, :frames].flatten()] = True
        return picking(wanted)

    def _decoding(self, x0: torch.Tensor, cond: Conditioning) -> Decoding:
        """How the pipeline decodes such latents, from a run in which no decoder really runs."""
        calls: list[Call] = []
        media = self._media(x0.detach(), cond, numbering(calls), grad=False)
        return read(calls, media, self._pipeline)

    def _decoder_of(self, found: Decoding) -> nn.Module:
        return vars(self.pipe)[found.calls[0].name]

    def _media(self, x0: torch.Tensor, cond: Conditioning, replace: Replace | None, *, grad: bool) -> torch.Tensor:
        """What the pipeline makes of `x0`, float32."""
        result = self._end(x0, cond, replace, grad=grad)
        media = result[0] if isinstance(result, tuple | list) else result
        if isinstance(media, list):
            media = torch.stack(media)
        if not isinstance(media, torch.Tensor) or media.ndim not in (4, 5):
            raise PolicyError(f"{self._pipeline} decodes to {type(media).__name__}, not to pixels")
        return media.float()

    def encode(self, media: torch.Tensor, cond: Conditioning, like: torch.Tensor) -> torch.Tensor:
        """(B, ...) float32 latents whose decoder input is the VAE's encoding of `media`; like: (B, ...) any latents."""
        zeros = torch.zeros(like.shape, device=like.device, requires_grad=True)
        with torch.enable_grad():
            shift, name = self._decoder_input(zeros, cond, media)
            latents = self._encoded(name, media, shift, cond)
            ones = self._decoder_input(torch.ones_like(zeros), cond, media)[0].detach() - shift.detach()
            wanted = torch.where(ones != 0, latents - shift.detach(), 0.0)
            moved = torch.autograd.grad(shift, zeros, wanted.to(shift), retain_graph=True)[0]
            scale = torch.autograd.grad(shift, zeros, ones.to(shift))[0]
        if bool((scale == 0).any()):
            raise PolicyError(
                f"{int((scale == 0).sum())} of {scale.numel()} latent positions of {self._pipeline} never reach its "
                "decoder (the loop writes known parts over them), so pixels do not determine them; encode with a "
                "pipeline that generates the whole picture"
            )
        x0 = (moved / scale).float()
        self._verify(x0, latents, ones, cond, media)
        return x0

    def _verify(
        self, x0: torch.Tensor, latents: torch.Tensor, ones: torch.Tensor, cond: Conditioning, media: torch.Tensor
    ) -> None:
        """The decoder must receive `latents` again, whatever the pipeline draws before it decodes."""
        grain = max(torch.finfo(dtype).eps for dtype in (cond.layout.dtype, ones.dtype))  # of the loop, of the VAE
        allowed = max(EXACT, 8 * grain) * max(float(latents.abs().max()), 1.0)
        for seeds in (cond.seeds, tuple(seed + 1 for seed in cond.seeds)):
            with torch.no_grad():
                again = self._decoder_input(x0, replace(cond, seeds=seeds), media)[0]
            error = float(torch.where(ones != 0, again.float() - latents, 0.0).abs().max())
            if error > allowed:
                raise PolicyError(
                    f"{self._pipeline} does more to its latents before decoding than move, scale and shift them "
                    f"(inverted, they differ by {error:.2g}), so pictures cannot be turned into its latents; usual "
                    "cause: noise added for a decoder that is told a timestep"
                )

    # runs

    def _end(self, x0: torch.Tensor, cond: Conditioning, replace: Replace | None, *, grad: bool) -> Any:
        """Run the pipeline from the end of its loop on, with `replace` in place of its decoders."""

        def on_step(index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x0.to(sample), x0.to(sample)

        session = session_from(self.driver, x0, cond, [], on_step)
        self._bare(session)
        if replace is not None:
            _replace_decoders(session, replace)
        return self.driver.run(session, cond, output_type="pt", grad=grad)

    def _bare(self, session: Session) -> None:
        """Decode without clamp (ours keeps the gradient), safety checker and watermark, on the copy only."""
        for name, part in vars(self.pipe).items():
            if isinstance(part, VaeImageProcessor):
                twin = copy.copy(part)
                twin.__dict__["denormalize"] = lambda media: media * 0.5 + 0.5
                session.copy.__dict__[name] = twin
            elif name in ("safety_checker", "watermark") and part is not None:
                session.copy.__dict__[name] = None
                if not self._said_bare_decode:
                    said = f"decode leaves out the pipeline's {name}; sampling with the pipeline keeps it"
                    warnings.warn(said, stacklevel=5)
                    self._said_bare_decode = True

    def _decoder_input(self, x0: torch.Tensor, cond: Conditioning, media: torch.Tensor) -> tuple[torch.Tensor, str]:
        """What the decoder is given for latents `x0`, all its calls along the rows, and the component's name."""
        seen = Decoder()
        self._end(x0, cond, _noting(seen, media), grad=torch.is_grad_enabled())
        found = seen.input()
        if found is None:
            raise PolicyError(f"{self._pipeline} does not decode with a VAE of its own, so it cannot encode pictures")
        return found, seen.name

    # pixels

    def _encoded(self, name: str, media: torch.Tensor, given: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The VAE's own encoding of media in [0, 1], float32, in the layout of `given`."""
        vae = vars(self.pipe)[name]
        pixels = self._normalised(media).to(self.driver.device)
        if given.ndim == 5:
            pixels = rearrange(pixels, "b c h w -> b c 1 h w" if media.ndim == 4 else "b t c h w -> b c t h w")
        elif media.ndim == 5:
            pixels = rearrange(pixels, "b t c h w -> (b t) c h w")
        latents = _encode(vae, pixels).float()
        if latents.shape != given.shape:
            raise RecipeError(
                f"media of shape {tuple(media.shape)} are encoded to {tuple(latents.shape)}, and the decoder of "
                f"{self._pipeline} takes {tuple(given.shape)} under this conditioning; resize or cut the media to the "
                "conditioning's height, width and num_frames, one per prompt"
            )
        return latents.to(given.device)

    def _normalised(self, media: torch.Tensor) -> torch.Tensor:
        """Pixels in the range of the VAE, as the pipeline's own image processor says."""
        parts = {n: p for n, p in vars(self.pipe).items() if isinstance(p, VaeImageProcessor)}
        parts = {n: p for n, p in parts.items() if n in OF_PICTURES} or parts  # others prepare masks and controls
        ranges = {bool(part.config["do_normalize"]) for part in parts.values()}
        if len(ranges) != 1:
            raise PolicyError(
                f"the image processors of {self._pipeline} ({', '.join(parts) or 'none'}) do not say whether its VAE "
                "takes pixels in [-1, 1] or [0, 1], so it cannot encode pictures"
            )
        return media.float() * 2 - 1 if ranges.pop() else media.float()

    @property
    def _pipeline(self) -> str:
        return type(self.pipe).__name__


def _replace_decoders(session: Session, replace: Replace) -> None:
    for name, part in vars(session.copy).items():
        if isinstance(part, nn.Module) and class_attribute(type(part), "decode") and "encode" in vars(part):
            part.__dict__["decode"] = replace(name, part.decode)  # type: ignore[arg-type]


def _noting(seen: Decoder, media: torch.Tensor) -> Replace:
    """Decoders that answer zeros in the shape of `media` and note what they were given."""
    seen.given = []

    def replace(name: str, own: Own) -> Own:
        def decode(z: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            assert seen.given is not None
            seen.name = name
            seen.given.append(z)
            frames = (media.shape[1] if media.ndim == 5 else 1,) if z.ndim == 5 else ()
            pixels = torch.zeros(z.shape[0], 3, *frames, *media.shape[-2:], device=z.device, dtype=z.dtype)
            return DecoderOutput(sample=pixels) if return_dict else (pixels,)

        return decode

    return replace


@torch.no_grad()
def _encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The most likely latents; a VAE that overflows in half precision runs in float32, as its pipelines do."""
    own = vae.dtype
    upcast = own == torch.float16 and bool(vae.config.get("force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        encoded = vae.encode(pixels.to(torch.float32 if upcast else own))
    finally:
        if upcast:
            vae.to(own)
    if "latent_dist" in encoded:
        return encoded.latent_dist.mode()
    return encoded.latent
