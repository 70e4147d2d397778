"""Encoded latents kept on disk between epochs and runs, under keys that name all they depend on.

A key is the SHA-256 of a file's content, of the frames and the size that were taken of it, and of what encoded them:
the pipeline's class, and class, configuration, tiles and every weight of its VAE. So nothing is ever out of date: what
changed has another key. An entry is one safetensors file, written aside and then renamed, and read when asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from alignkit.data.stored import Medium, contents
from alignkit.errors import DataError

VARIABLE, OFF = "ALIGNKIT_CACHE", "off"
LIMIT = 10 * 2**30
"""Bytes that a cache takes on disk before the entries that were not read for longest are deleted."""
FORMAT = 1  # of what is fitted and encoded; counted up when the same files would give other latents


def default_cache() -> LatentCache | None:
    """The cache in `$ALIGNKIT_CACHE/latents`, else `~/.cache/alignkit/latents`; None for `ALIGNKIT_CACHE=off`."""
    place = os.environ.get(VARIABLE)
    if place == OFF:
        return None
    return LatentCache((Path(place) if place else Path.home() / ".cache" / "alignkit") / "latents")


class LatentCache:
    """Latents by key in a folder, which is made when the first are written.

    Args:
        limit: bytes; beyond it, entries that were not read for longest are deleted.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._unchecked: float = limit  # bytes written since the folder was last measured; at first it never was
        self._works = True

    def file(self, key: str) -> Path:
        """Where the entry of a key lies."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> torch.Tensor | None:
        """(...) the latents as they were written; None where there are none. A damaged entry is said and is none."""
        file = self.file(key)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                latents, said = stored.get_tensor("latents"), (stored.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            return self._damaged(file, str(error))
        if said != _digest(latents):
            return self._damaged(file, "its content is not what was written")
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(file)
        return latents

    def write(self, key: str, latents: torch.Tensor) -> None:
        """Keep latents under a key. A folder that cannot be written is said once, and nothing is kept."""
        if not self._works:
            return
        file, latents = self.file(key), latents.detach().cpu().contiguous()
        aside = file.with_name(f".{file.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({"latents": latents}, aside, metadata={"sha256": _digest(latents)})
                aside.replace(file)
            finally:
                aside.unlink(missing_ok=True)
            self._keep_within(latents.nbytes)
        except (OSError, SafetensorError) as error:
            self._works = False
            warnings.warn(
                f"{self.folder} cannot be written ({error}), so the next run encodes again; name another folder with "
                f"{VARIABLE}, or {VARIABLE}={OFF}",
                stacklevel=2,
            )

    def _damaged(self, file: Path, why: str) -> None:
        warnings.warn(f"{file} is damaged ({why}); its latents are encoded again", stacklevel=3)

    def _keep_within(self, written: int) -> None:
        """Measure the folder now and then, not at every write; also what a killed process left is deleted in turn."""
        self._unchecked += written
        if self._unchecked < self.limit / 10:
            return
        self._unchecked = 0
        entries: list[tuple[float, int, Path]] = []
        for file in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process's
                stat = file.stat()
                entries.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in entries)
        for _, size, file in sorted(entries):
            if total <= self.limit:
                return
            file.unlink(missing_ok=True)
            total -= size


def _digest(latents: torch.Tensor) -> str:
    return hashlib.sha256(_bytes(latents)).hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def latent_key(
    content: str,
    frames: str,
    pixels: Sequence[int],
    latents: Sequence[int],
    encoder: str,
    settings: Mapping[str, Any],
) -> str:
    """The key of one sample's latents.

    Args:
        content: of the file, from `content_hash`.
        frames: how frames were chosen, in words; how many is the T of `pixels`.
        pixels, latents: shapes of one sample, (T, 3, H, W) or (3, H, W), and as the pipeline's loop has it.
        encoder: from `encoder_hash`.
        settings: from `settings_of`, and what else decides how pixels are encoded.
    """
    return _hash([FORMAT, content, frames, list(pixels), list(latents), encoder, dict(settings)])


def content_hash(medium: Medium) -> str:
    """SHA-256 of a file, of all files of a folder of frames, or of a picture inside a table; a piece at a time.

    Raises:
        DataError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        for piece in contents(medium):
            found.update(len(piece).to_bytes(8, "big"))  # so that frames do not run into each other
            found.update(piece)
    except OSError as error:
        raise DataError(f"{medium} cannot be read: {error.strerror or error}") from error
    return found.hexdigest()


def encoder_hash(pipeline: str, modules: Mapping[str, nn.Module]) -> str | None:
    """What decides how pictures become latents; None where weights are not in memory (sequential offload).

    Args:
        pipeline: name of the pipeline's class.
        modules: its components that encode, by name.
    """
    parts: list[Any] = [pipeline]
    for name, module in sorted(modules.items()):
        weights = hashlib.sha256()
        for key, tensor in sorted(module.state_dict().items()):
            if tensor.is_meta:
                return None
            weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            weights.update(_bytes(tensor))
        parts.append([name, type(module).__qualname__, _config(module), weights.hexdigest()])
    return _hash(parts)


def settings_of(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Tiles and chunks of frames in which modules encode: they change latents, and no configuration names them."""
    of_encoding = ("use_tiling", "use_framewise_encoding", "tile_", "num_sample_frames")
    return {
        f"{name}.{setting}": value
        for name, module in modules.items()
        for setting, value in vars(module).items()
        if setting.startswith(of_encoding)
    }


def _config(module: nn.Module) -> dict[str, Any]:
    from diffusers.configuration_utils import ConfigMixin

    if not isinstance(module, ConfigMixin):
        return {}
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
