"""Experience from a file: preference pairs or scored samples that were made before, by anybody."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from diffusers.image_processor import VaeImageProcessor
from torchvision.transforms.functional import center_crop, resize

from alignkit.data.latent_cache import (
    LatentCache,
    content_hash,
    default_cache,
    encoder_hash,
    latent_key,
    settings_of,
)
from alignkit.data.preferences import Found, Pair, ScoredSample, load_pairs, load_samples, value_of
from alignkit.data.stored import Medium, StoredLatents, read_image
from alignkit.data.video import read_video
from alignkit.errors import DataError
from alignkit.policy import Conditioning, Policy
from alignkit.policy.memory import decoders
from alignkit.training.experience import Experience
from alignkit.training.seeds import generator
from alignkit.types import Prompt, Rollouts, Scores

KEPT = 2**30
"""Bytes of encoded samples that are kept in memory, on the CPU; the rest are read from the cache on disk."""


class OfflineData:
    """Pairs or scored samples of a file, by prompt.

    Args:
        path: file or folder of any format of `preference_formats.FORMATS`.
        kind: "pairs", or "samples": both sides of pairs are samples then.
        cache: where encoded latents are kept between runs; None: `latent_cache.default_cache()`.

    Attributes:
        prompts: the file's prompts, each once; their ids are the file's own where it has whole numbers.
        found: what was read, and what was left out and why; `found.sentence()` says it.

    Raises:
        DataError: nothing usable, or a damaged row; names it.
    """

    def __init__(self, path: str | Path, kind: Literal["pairs", "samples"], cache: LatentCache | None = None) -> None:
        self.kind = kind
        self._cache = default_cache() if cache is None else cache
        self.found: Found = load_pairs(path) if kind == "pairs" else load_samples(path)
        self.prompts: list[Prompt] = self.found.prompts
        self._rows: dict[int, list[Any]] = {}
        for row in self.found.rows:
            self._rows.setdefault(row.prompt.id, []).append(row)
        samples = self.found.rows if kind == "samples" else ()
        # of all rows: a round's parts are joined over prompts, and need the same names
        self._rewards = tuple(dict.fromkeys(name for row in samples for name in row.rewards))
        self._sizes: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._encoded: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        self._contents: dict[Medium, str] = {}
        self._encoders: WeakKeyDictionary[Policy, str | None] = WeakKeyDictionary()

    def sentence(self, group_size: int = 1) -> str:
        """What a user should know before training on it."""
        few = sum(len(rows) < group_size for rows in self._rows.values()) if self.kind == "samples" else 0
        rest = (
            f". {few} prompts have fewer than {group_size} samples: theirs are repeated within a group" if few else ""
        )
        return self.found.sentence() + rest

    @property
    def distinct(self) -> bool:
        """Whether some prompt has samples of different rewards."""
        return self.kind == "samples" and any(len({value_of(row) for row in rows}) > 1 for rows in self._rows.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, without the media: changes when the file does."""
        rows = [(r.prompt.id, str(r.prompt), r.where, _values(r)) for r in self.found.rows]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def experience(self, policy: Policy, cond: Conditioning, group_size: int, rng: torch.Generator) -> Experience:
        """Rows of these prompts, in their order.

        Pairs: one of each prompt; `rollouts.x0` is the chosen side, `losers` the rejected one, `scores.total` the row's
        weight, and the parts are `margin` (NaN where the file has none) and `weight`. Samples: `group_size` of each,
        none twice as long as there are enough; `scores.total` is the reward, the parts are all rewards of the file (NaN
        where a row lacks one) and `label` (1, 0, NaN for none).

        Latents of the file are used where the same pipeline class made them and they have the right shape; everything
        else is fitted to the pipeline's size (scaled, centre cropped) and encoded.

        Args:
            cond: one sample per prompt, all of one shape.
            rng: which rows are drawn; what a prompt gets depends on its seed and the prompt alone.
        """
        seed = rng.initial_seed()
        count = 1 if self.kind == "pairs" else group_size
        drawn = [row for p in cond.prompts for row in self._draw(p, count, generator(seed, p.id))]
        whole = cond.repeat(count)
        groups = torch.arange(len(cond)).repeat_interleave(count)
        if self.kind == "pairs":
            chosen = [(row.chosen, row.kind, row.chosen_latents, row.where) for row in drawn]
            rejected = [(row.rejected, row.kind, row.rejected_latents, row.where) for row in drawn]
            both = self._latents(policy, whole + whole, chosen + rejected)
            x0, losers = both.chunk(2)
            return Experience(whole, Rollouts(x0, (), cond.sigmas), _pair_scores(drawn), groups, losers=losers)
        x0 = self._latents(policy, whole, [(row.medium, row.kind, row.latents, row.where) for row in drawn])
        return Experience(whole, Rollouts(x0, (), cond.sigmas), _sample_scores(drawn, self._rewards), groups)

    def _draw(self, prompt: Prompt, count: int, rng: torch.Generator) -> list[Any]:
        """`count` of a prompt's rows, all of them before one comes again."""
        if prompt.id not in self._rows:
            raise DataError(f"{self.found.path} has no {self.kind} of prompt {prompt.id} {str(prompt)!r}")
        rows = self._rows[prompt.id]
        order = [i for _ in range(-(-count // len(rows))) for i in torch.randperm(len(rows), generator=rng).tolist()]
        return [rows[i] for i in order[:count]]

    def _latents(
        self, policy: Policy, cond: Conditioning, media: Sequence[tuple[Medium, str, StoredLatents | None, str]]
    ) -> torch.Tensor:
        """(B, ...) float32 on the policy's device."""
        shape, pixels = self._size(policy, cond)
        made_by = type(policy.pipe).__name__
        settings = self._settings(policy)
        found: list[torch.Tensor] = []
        for i, (medium, kind, stored, where) in enumerate(media):
            key = (medium, shape, pixels, *settings.items())
            latents = None if stored is None else stored.read(made_by)
            if latents is None or latents.shape != shape:
                if key not in self._encoded:
                    self._encoded[key] = self._cached(policy, cond[[i]], medium, kind, where, settings)
                self._encoded.move_to_end(key)
                latents = self._encoded[key]
            found.append(latents)
        while sum(kept.nbytes for kept in self._encoded.values()) > KEPT:
            self._encoded.popitem(last=False)
        return torch.stack(found).to(policy.driver.device)

    def _cached(
        self,
        policy: Policy,
        cond: Conditioning,
        medium: Medium,
        kind: str,
        where: str,
        settings: Mapping[str, Any],
    ) -> torch.Tensor:
        """One sample's latents: as an earlier epoch or run encoded them, else encoded now."""
        shape, pixels = self._size(policy, cond)
        encoder = None if self._cache is None else self._encoder(policy)
        if self._cache is None or encoder is None:
            return _encoded(policy, cond, medium, kind, pixels, where)
        if medium not in self._contents:
            self._contents[medium] = content_hash(medium)
        frames = "spread evenly" if kind == "video" else "one"
        key = latent_key(self._contents[medium], frames, pixels, shape, encoder, settings)
        latents = self._cache.read(key)
        if latents is None:
            latents = _encoded(policy, cond, medium, kind, pixels, where)
            self._cache.write(key, latents)
        return latents

    def _encoder(self, policy: Policy) -> str | None:
        if policy not in self._encoders:
            self._encoders[policy] = encoder_hash(type(policy.pipe).__name__, decoders(policy.pipe))
        return self._encoders[policy]

    def _settings(self, policy: Policy) -> dict[str, Any]:
        """What changes latents and may be switched at any time, so that it is asked for every time."""
        ranges = {n: part for n, part in vars(policy.pipe).items() if isinstance(part, VaeImageProcessor)}
        found = {f"{name}.do_normalize": part.config["do_normalize"] for name, part in sorted(ranges.items())}
        device = policy.driver.device.type
        if torch.is_autocast_enabled(device):
            found["autocast"] = str(torch.get_autocast_dtype(device))
        return found | settings_of(decoders(policy.pipe))

    def _size(self, policy: Policy, cond: Conditioning) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one sample's latents and of its pixels under a conditioning."""
        key = tuple(cond.shared.get(name) for name in ("height", "width", "num_frames"))
        if key not in self._sizes:
            with torch.no_grad():
                latents = policy.initial_latents(cond[[0]], torch.Generator().manual_seed(0))
                pixels = policy.decode(torch.zeros_like(latents), cond[[0]])
            self._sizes[key] = (tuple(latents.shape[1:]), tuple(pixels.shape[1:]))
        return self._sizes[key]


@torch.no_grad()
def _encoded(
    policy: Policy, cond: Conditioning, medium: Medium, kind: str, pixels: tuple[int, ...], where: str
) -> torch.Tensor:
    # alone: beside others its last bits would depend on what is kept, and so on where a run began
    picture = _fitted(medium, kind, pixels, where)[None].to(policy.driver.device)
    return policy.encode(picture, cond)[0].float().cpu()


def _fitted(medium: Medium, kind: str, size: tuple[int, ...], where: str) -> torch.Tensor:
    """A picture or video in the pipeline's pixels: scaled to cover them, then centre cropped."""
    if (kind == "video") != (len(size) == 4):
        wanted = f"videos of {size[0]} frames" if len(size) == 4 else "images"
        raise DataError(f"{where}: {medium} is a{'n' if kind == 'image' else ''} {kind}; this pipeline makes {wanted}")
    try:
        media = read_video(Path(str(medium)), size[0]) if kind == "video" else read_image(medium)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return fitted(media, size[-2], size[-1])


def fitted(media: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., 3, height, width) in [0, 1]: scaled to cover, antialiased, then centre cropped; unchanged if it fits."""
    high, wide = media.shape[-2:]
    if (high, wide) == (height, width):
        return media
    scale = max(height / high, width / wide)
    size = [max(height, math.floor(high * scale + 0.5)), max(width, math.floor(wide * scale + 0.5))]
    return center_crop(resize(media, size, antialias=True), [height, width]).clamp(0, 1)


def _pair_scores(pairs: Sequence[Pair]) -> Scores:
    weight = torch.tensor([pair.weight for pair in pairs])
    margin = torch.tensor([math.nan if pair.margin is None else pair.margin for pair in pairs])
    return Scores(weight, {"margin": margin, "weight": weight})


def _sample_scores(samples: Sequence[ScoredSample], names: Sequence[str]) -> Scores:
    parts = {name: torch.tensor([one.rewards.get(name, math.nan) for one in samples]) for name in names}
    parts["label"] = torch.tensor([math.nan if one.label is None else float(one.label) for one in samples])
    values = [value_of(one) for one in samples]
    return Scores(torch.tensor([math.nan if value is None else value for value in values]), parts)


def _values(row: Pair | ScoredSample) -> tuple[Any, ...]:
    if isinstance(row, Pair):
        return (row.margin, row.weight, Path(str(row.chosen)).name, Path(str(row.rejected)).name)
    return (row.reward, row.label, Path(str(row.medium)).name)
