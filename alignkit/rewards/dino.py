"""Rewards that compare an image with reference images by DINO features."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import einsum, reduce

from alignkit.data.media import load_image
from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import weights as on_disk
from alignkit.rewards.card import Card
from alignkit.rewards.features import DinoFeatures, Features, tiny_dinov2
from alignkit.rewards.references import COLUMN, fit, image_tensor, references_of
from alignkit.rewards.weights import Files
from alignkit.types import Prompt

USES = ("cls", "patches", "both")
MATCHES = ("position", "best", "gram")
POOLS = ("mean", "nearest", "top_k")
IMAGES = "*.png|*.jpg|*.jpeg|*.webp|*.bmp|*.PNG|*.JPG|*.JPEG"


def similarities(images: Features, references: Features, use: str, match: str) -> torch.Tensor:
    """(B, R) similarity in [-1, 1] of B images to R references.

    Args:
        use: "cls": cosine of the class tokens. "patches": by `match`. "both": the mean of the two.
        match: "position": mean cosine of the patches at the same place. "best": cosine of each patch with the most
            similar patch of the other image, averaged over the patches of both, so that an image of one repeated
            patch is not like a rich reference. "gram": cosine of the Gram matrices of the patches (Gatys et al.,
            arXiv 1508.06576), which knows what occurs together and not where.
    """
    of_cls = einsum(images.cls, references.cls, "b d, r d -> b r")
    if use == "cls":
        return of_cls
    of_patches = torch.stack([_of_patches(images.patches, one, match) for one in references.patches], dim=1)
    return of_patches if use == "patches" else (of_cls + of_patches) / 2


def _of_patches(images: torch.Tensor, reference: torch.Tensor, match: str) -> torch.Tensor:
    """(B,) similarity of (B, N, D) to (M, D)."""
    if match == "position":
        if images.shape[1] != reference.shape[0]:
            raise RewardError(
                f"{images.shape[1]} patches cannot be compared place by place with {reference.shape[0]} of the "
                "reference; give both images one size, or choose match='best'"
            )
        return reduce(einsum(images, reference, "b n d, n d -> b n"), "b n -> b", "mean")
    cosines = einsum(images, reference, "b n d, m d -> b n m")
    if match == "best":
        return (cosines.amax(dim=2).mean(dim=1) + cosines.amax(dim=1).mean(dim=1)) / 2
    # <P'P, Q'Q> = |PQ'|^2: the D x D matrices are never built
    own = einsum(images, images, "b n d, b m d -> b n m").square().sum(dim=(1, 2))
    theirs = einsum(reference, reference, "n d, m d -> n m").square().sum()
    return cosines.square().sum(dim=(1, 2)) / (own * theirs).sqrt()


def pooled(similarity: torch.Tensor, how: str, k: int) -> torch.Tensor:
    """(B,) of (B, R): the mean over the references, the nearest one, or the mean of the `k` nearest."""
    count = {"mean": similarity.shape[1], "nearest": 1, "top_k": min(k, similarity.shape[1])}[how]
    return similarity.topk(count, dim=1).values.mean(dim=1)


def _check(name: str, use: str, match: str, pool: str, k: int) -> None:
    for option, value, known in (("use", use, USES), ("match", match, MATCHES), ("pool", pool, POOLS)):
        if value not in known:
            raise RecipeError(f"reward {name!r}: {option}={value!r}; choose one of {', '.join(known)}")
    if k < 1:
        raise RecipeError(f"reward {name!r}: k={k}; expected at least 1")


@dataclass(frozen=True, eq=False)
class DinoSimilarity:
    """How much an image resembles the reference image of its prompt, by DINO features.

    The reference is cropped to the image's aspect ratio and resized to its size first. Where a prompt has several
    references, `pool` says how they count.

    Attributes:
        weights, size, dtype: see `DinoFeatures`.
        use, match: see `similarities`.
        pool, k: see `pooled`.
        column: of the prompts: a path (prompt files resolve it inside their folder), a tensor (3, H, W) in [0, 1], or
            a list of these.
    """

    weights: str = "facebook/dinov2-base"
    size: tuple[int, int] | None = None
    use: str = "cls"
    match: str = "position"
    pool: str = "mean"
    k: int = 3
    column: str = COLUMN
    dtype: str = "float32"
    name: str = "dino_similarity"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        family="features",
        summary="resembles the reference image of its prompt",
        range="[-1, 1]",
        licence="Apache-2.0",
        cost="86 M parameters, 0.35 GB; two images a sample",
        columns=("reference",),
        source="DINOv2 (arXiv 2304.07193); as a reward in Adv-GRPO (arXiv 2511.20256)",
    )

    def __post_init__(self) -> None:
        _check(self.name, self.use, self.match, self.pool, self.k)

    @cached_property
    def extractor(self) -> DinoFeatures:
        """What makes the features."""
        return DinoFeatures(self.weights, self.size, self.dtype)

    def files(self) -> tuple[Files, ...]:
        """See `DinoFeatures.files`."""
        return self.extractor.files()

    def prepare(self) -> None:
        """Read the weights."""
        _ = self.extractor.network

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a reference image."""
        for prompt in prompts:
            references_of(prompt, self.column)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [-1, 1] for (B, 3, H, W) in [0, 1].

        Raises:
            RewardError: a prompt has no reference.
        """
        if not len(media):
            return media.new_zeros(0)
        named = [references_of(prompt, self.column) for prompt in prompts]
        unique = {key: value for one in named for key, value in one.items()}  # a group shares its references
        place = {key: index for index, key in enumerate(unique)}
        with torch.no_grad():
            height, width = media.shape[-2:]
            images = [fit(image_tensor(value), height, width).to(media) for value in unique.values()]
            references = self.extractor.features(torch.stack(images))
        features = self.extractor.features(media)
        scores = [
            pooled(
                similarities(features[[i]], references[[place[key] for key in one]], self.use, self.match),
                self.pool,
                self.k,
            )
            for i, one in enumerate(named)
        ]
        return torch.cat(scores)

    @classmethod
    def tiny(cls, folder: Path) -> Mapping[str, Any]:
        """Random weights of a Dinov2 of two layers."""
        return {"weights": str(tiny_dinov2(folder))}


@dataclass(frozen=True, eq=False)
class DinoStyle:
    """How much an image resembles a folder of style images, by DINO features.

    Attributes:
        references: folder (or `shipped:assets/...`, or a hub id) of the style images.
        weights, size, dtype: see `DinoFeatures`.
        use, match: see `similarities`. The default compares what the patches look like, wherever they are.
        pool, k: see `pooled`. The nearest few, because what all references have in common outweighs their style in a
            mean over many (measured on signs, `recipes/signs/README.md`).
    """

    references: str
    weights: str = "facebook/dinov2-base"
    size: tuple[int, int] | None = None
    use: str = "both"
    match: str = "best"
    pool: str = "top_k"
    k: int = 3
    dtype: str = "float32"
    name: str = "dino_style"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        family="features",
        summary="looks like the images of a style folder",
        range="[-1, 1]",
        licence="Apache-2.0",
        cost="86 M parameters, 0.35 GB; the references are encoded once",
        source="DINOv2 (arXiv 2304.07193)",
    )

    def __post_init__(self) -> None:
        _check(self.name, self.use, self.match, self.pool, self.k)

    @cached_property
    def extractor(self) -> DinoFeatures:
        """What makes the features."""
        return DinoFeatures(self.weights, self.size, self.dtype)

    def files(self) -> tuple[Files, ...]:
        """The weights and the style images."""
        return (*self.extractor.files(), Files(self.references, (IMAGES,)))

    @cached_property
    def images(self) -> list[torch.Tensor]:
        """The style images, (3, h, w) in [0, 1], in order of their names."""
        return [image_tensor(load_image(path)) for path in self._paths()]

    def _paths(self) -> list[Path]:
        found = on_disk.locate(Files(self.references, (IMAGES,)))
        endings = tuple(pattern.removeprefix("*") for pattern in IMAGES.split("|"))
        return (
            sorted(path for path in found.rglob("*") if path.name.lower().endswith(endings))
            if found.is_dir()
            else [found]
        )

    def prepare(self) -> None:
        """Read the weights and the style images."""
        _ = self.extractor.network, self.images

    @cached_property
    def _encoded(self) -> dict[tuple[int, int], Features]:
        return {}

    def encoded(self, height: int, width: int, device: torch.device) -> Features:
        """Features of the references, cropped and resized to the size of the images that are scored; made once."""
        if (height, width) not in self._encoded:
            with torch.no_grad():  # one at a time: a folder may hold many
                images = [fit(image, height, width).to(device) for image in self.images]
                made = [self.extractor.features(image.unsqueeze(0)) for image in images]
            cls, patches = torch.cat([one.cls for one in made]), torch.cat([one.patches for one in made])
            self._encoded[height, width] = Features(cls, patches)
        return self._encoded[height, width].to(device)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [-1, 1] for (B, 3, H, W) in [0, 1]; the prompts have no say."""
        if not len(media):
            return media.new_zeros(0)
        references = self.encoded(*media.shape[-2:], device=media.device)
        return pooled(similarities(self.extractor.features(media), references, self.use, self.match), self.pool, self.k)

    def describe(self) -> dict[str, Any]:
        """How many references there are, and the hash of their files."""
        paths = self._paths()
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths))
        return {"references": {"files": len(paths), "sha256": digest.hexdigest()}}

    @classmethod
    def tiny(cls, folder: Path) -> Mapping[str, Any]:
        """Random weights of a Dinov2 of two layers, and two plain style images."""
        from PIL import Image

        (folder / "style").mkdir(parents=True, exist_ok=True)
        for name, colour in (("blue", (40, 70, 180)), ("red", (190, 40, 40))):
            Image.new("RGB", (64, 32), colour).save(folder / "style" / f"{name}.png")
        return {"references": str(folder / "style"), "weights": str(tiny_dinov2(folder / "weights"))}
