"""Peak memory of decoding video against its number of frames, on tiny decoders of Wan's and LTX-Video's architecture.

Two clips of 32 x 32 pixels, random weights, both decoders causal. `whole` and `gradient` are bytes of live tensors at
their peak, weights included; everything else is a ratio to one of them in the same run. What is compared:

* without gradient, to `whole`: clip after clip (`slicing`), overlapping chunks of frames (`framewise`; LTX-Video's
  decoder alone has it, Wan's works latent frame by latent frame anyway), and the first half of the frames;
* with the gradient of one segmental reward, to `gradient`, where all frames are decoded and kept: the first frames up
  to the last that is looked at, with the middle frames of four segments, and with the middle frame of the video alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange

from alignkit.policy.frames import Call, Watched
from alignkit.rewards import Weighted
from alignkit.rewards.video import Segmental
from alignkit.training.live_tensors import peak_bytes
from alignkit.types import Prompt

CLIPS, SIDE, LATENT_CHANNELS = 2, 4, 4
FRAMES = (9, 17, 33, 65)
PER_LATENT = 4  # frames


def wan_vae() -> Any:
    """Wan's video autoencoder: 8 times smaller in space, 4 times in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def ltx_vae() -> Any:
    """LTX-Video's, with a causal decoder: 8 times smaller in space, 4 times in time."""
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=2,
        patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        decoder_causal=True,
    )


DECODERS: Mapping[str, Callable[[], Any]] = {"Wan": wan_vae, "LTX-Video": ltx_vae}


@dataclass(frozen=True)
class Clips:
    """A decoder and latents of so many frames."""

    vae: Any
    z: torch.Tensor  # (clips, C, K, h, w)
    frames: int

    @classmethod
    def of(cls, vae: Any, frames: int) -> Clips:
        latents = (frames - 1) // PER_LATENT + 1
        rng = torch.Generator().manual_seed(0)
        return cls(vae, torch.randn(CLIPS, LATENT_CHANNELS, latents, SIDE, SIDE, generator=rng), frames)

    def latents_for(self, frames: int) -> int:
        """Leading latent frames that the first `frames` frames need."""
        return Watched().needed(self.vae, Call("vae", self.z, (), {}), frames)

    def decoded(self, latents: int | None = None) -> torch.Tensor:
        """(clips, 3, t, H, W) about [-1, 1] of the first `latents` latent frames."""
        return self.vae.decode(self.z[:, :, :latents], return_dict=False)[0]

    def peak(self, latents: int | None = None, flag: str | None = None) -> int:
        """Bytes at the peak of the decoder without gradient, with a switch of it on."""
        if flag is not None:
            setattr(self.vae, flag, True)
        try:
            with torch.no_grad():
                return peak_bytes(self._pipe, lambda: self.decoded(latents))
        finally:
            if flag is not None:
                setattr(self.vae, flag, False)

    def peak_of_gradient(self, segments: int, first: bool) -> int:
        """Bytes at the peak of decoding and of the gradient of a segmental reward; `first`: no more than it needs."""
        prompts = [Prompt("a clip", id=i) for i in range(CLIPS)]
        reward = Weighted(Segmental("brightness", segments=segments, frames="middle"))
        needed = reward.frames_needed(self.frames, prompts) if first else None
        latents = None if needed is None else self.latents_for(needed)

        def work() -> None:
            self.z.requires_grad_(True)
            media = rearrange(self.decoded(latents), "b c t h w -> b t c h w")
            reward((media * 0.5 + 0.5).clamp(0, 1), prompts, num_frames=self.frames).total.sum().backward()
            self.z.grad = None

        return peak_bytes(self._pipe, work)

    @property
    def _pipe(self) -> Any:
        return SimpleNamespace(components={"vae": self.vae})


def video(frames: Sequence[int] = FRAMES) -> list[dict[str, Any]]:
    """One record per decoder and number of frames; under a minute on one CPU core."""
    return [measured(name, count) for name in DECODERS for count in frames]


def measured(name: str, frames: int) -> dict[str, Any]:
    """Peaks of one decoder, in bytes, and their ratios."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae = DECODERS[name]().eval().requires_grad_(False)
    clips = Clips.of(vae, frames)
    framewise = "use_framewise_decoding" in vars(vae)
    whole, gradient = clips.peak(), clips.peak_of_gradient(4, first=False)
    half = clips.latents_for(frames // 2 + 1)
    return {
        "decoder": name,
        "frames": frames,
        "whole_bytes": whole,
        "slicing": clips.peak(flag="use_slicing") / whole,
        "framewise": clips.peak(flag="use_framewise_decoding") / whole if framewise else None,
        "first_half": clips.peak(half) / whole,
        "gradient_bytes": gradient,
        "gradient_of_segments": clips.peak_of_gradient(4, first=True) / gradient,
        "gradient_of_the_middle": clips.peak_of_gradient(1, first=True) / gradient,
    }


COLUMNS = (
    *("decoder", "frames", "whole", "slicing", "framewise", "first half"),
    *("with gradient", "of 4 segments", "of the middle frame"),
)


def rows(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The table for people, in the order of `COLUMNS`."""
    for one in found:
        names = ("slicing", "framewise", "first_half", "gradient_of_segments", "gradient_of_the_middle")
        ratios = ["-" if one[name] is None else f"{one[name]:.2f}" for name in names]
        whole, gradient = (f"{one[name] / 2**20:.2f} MiB" for name in ("whole_bytes", "gradient_bytes"))
        yield [one["decoder"], str(one["frames"]), whole, *ratios[:3], gradient, *ratios[3:]]
