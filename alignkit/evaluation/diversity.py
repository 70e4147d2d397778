"""How much the samples of one prompt differ, as one number and by parts, so that a loss has a name.

A prompt leaves things open (shade, position, font, framing); alignment that fixes them lost diversity even
where every sample got better. Numbers are means over groups, and a group is the samples of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan

import torch
from einops import rearrange, reduce

from alignkit.rewards.pixels import luminance


@dataclass(frozen=True)
class Diversity:
    """Diversity within groups; NaN where no group had two samples to compare.

    Attributes:
        total: mean root-mean-square difference of two samples of one group, media in [0, 1].
        parts: the same groups seen one property at a time; see `PARTS`.
        groups: how many groups had at least two samples.
    """

    total: float
    parts: Mapping[str, float]
    groups: int


def within_groups(media: torch.Tensor, groups: torch.Tensor, keep: torch.Tensor | None = None) -> Diversity:
    """Diversity of the samples of each prompt, averaged over prompts.

    Args:
        media: (B, 3, H, W) or (B, T, 3, H, W) in [0, 1].
        groups: (B,) integer id of each sample's prompt.
        keep: (B,) bool, the samples to compare. A base model that often fails differs mostly by its failures;
            keeping only what a judge finds right asks whether the successes became alike.
    """
    if media.ndim not in (4, 5) or groups.shape != media.shape[:1]:
        raise ValueError(
            f"diversity needs media (B, 3, H, W) or (B, T, 3, H, W) and groups (B,); "
            f"got {tuple(media.shape)} and {tuple(groups.shape)}"
        )
    chosen = torch.ones_like(groups, dtype=torch.bool) if keep is None else keep
    members = [media[(groups == group) & chosen].double() for group in groups.unique()]
    members = [group for group in members if len(group) > 1]
    parts = {name: _mean([part(group) for group in members]) for name, part in PARTS.items()}
    return Diversity(_mean([pairwise_rmse(group) for group in members]), parts, len(members))


def comparison(before: Diversity, after: Diversity) -> dict[str, object]:
    """The `diversity` entry of `summary.json`; what was not measured is null."""
    pairs = {name: (before.parts[name], after.parts[name]) for name in before.parts}
    parts = {name: {"before": _finite(old), "after": _finite(new)} for name, (old, new) in pairs.items()}
    return {"before": _finite(before.total), "after": _finite(after.total), "parts": parts}


def pairwise_rmse(samples: torch.Tensor) -> float:
    """Mean over all pairs of the root-mean-square difference; samples (G, ...) with G >= 2."""
    flat = samples.flatten(1).double()
    distances = torch.pdist(flat) / flat.shape[1] ** 0.5  # (G (G - 1) / 2,)
    return float(distances.mean())


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features (G, D): 1 is one direction.

    Roy and Vetterli 2007, "The effective rank". Identical samples have no direction at all and give 0.
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    if values.sum() == 0:
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def vendi(features: torch.Tensor) -> float:
    """Effective number of distinct samples, in [1, G], for features (G, D) under the cosine kernel.

    Friedman and Dieng 2023, "The Vendi Score": exp of the entropy of the eigenvalues of K / G.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    share = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def brightness(samples: torch.Tensor) -> float:
    """Standard deviation over the group of the mean luminance."""
    return float(_luminance(samples).flatten(1).mean(dim=1).std())


def colour(samples: torch.Tensor) -> float:
    """Root-mean-square over channels of the group's deviation of the mean colour, luminance taken out."""
    mean = reduce(samples, "g c h w -> g c" if samples.ndim == 4 else "g t c h w -> g c", "mean")
    chroma = mean - reduce(mean, "g c -> g 1", "mean")
    return float(chroma.var(dim=0).mean().sqrt())


def contrast(samples: torch.Tensor) -> float:
    """Standard deviation over the group of each sample's own contrast."""
    return float(_luminance(samples).flatten(1).std(dim=1).std())


def position(samples: torch.Tensor) -> float:
    """Deviation over the group of where the content is, as a share of the image's size.

    Content is what differs in luminance from the image's median, and its place is the centre of mass.
    """
    return float(_centres(_luminance(samples)).var(dim=0).mean().sqrt())


def shape(samples: torch.Tensor) -> float:
    """What is left (font, letters, layout): pairwise difference with place, shade and contrast taken out."""
    light = _luminance(samples)
    size = torch.tensor(light.shape[-2:], dtype=light.dtype)
    shifts = ((0.5 - _centres(light)) * size).round().long()
    moved = [one.roll(tuple(shift.tolist()), (-2, -1)) for one, shift in zip(light, shifts, strict=True)]
    flat = torch.stack(moved).flatten(1)
    deviation = flat.std(dim=1, keepdim=True)
    standard = (flat - flat.mean(dim=1, keepdim=True)) / deviation.clamp(min=1e-3)  # a flat image stays flat
    return pairwise_rmse(standard)


PARTS: Mapping[str, Callable[[torch.Tensor], float]] = {
    "brightness": brightness,
    "colour": colour,
    "contrast": contrast,
    "position": position,
    "shape": shape,
}


def _luminance(samples: torch.Tensor) -> torch.Tensor:
    """(G, 3, H, W) to (G, 1, H, W), and (G, T, 3, H, W) to (G, T, H, W)."""
    return luminance(rearrange(samples, "g c h w -> g 1 c h w") if samples.ndim == 4 else samples)


def _centres(light: torch.Tensor) -> torch.Tensor:
    """(G, T, H, W) to (G, 2): row and column of the centre of mass, in [0, 1]; the middle if it is flat."""
    median = rearrange(light, "g t h w -> g t (h w)").median(dim=2).values
    mass = reduce((light - rearrange(median, "g t -> g t 1 1")).abs(), "g t h w -> g h w", "mean") + 1e-9
    rows, columns = (torch.arange(n, dtype=light.dtype, device=light.device) + 0.5 for n in mass.shape[1:])
    total = mass.sum(dim=(1, 2))
    row = torch.einsum("g h w, h -> g", mass, rows) / total / mass.shape[1]
    column = torch.einsum("g h w, w -> g", mass, columns) / total / mass.shape[2]
    return torch.stack([row, column], dim=1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else nan


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
