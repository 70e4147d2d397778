"""Encoders run once: results of encoder calls, addressed by the content of their arguments, row by row.

A call on a batch is stored whole and its rows are remembered, so that a later call on a subset, a shuffle or a
repetition of known rows is answered by indexing, and the very same batch by the very same tensors (bit for bit).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch.utils._pytree import tree_map

from alignkit.errors import PolicyError


def digest(value: Any) -> str:
    """A content hash of nested arguments: text, numbers, tensors, arrays, pictures, lists and mappings."""
    h = hashlib.sha256()
    _feed(h, value)
    return h.hexdigest()


def _feed(h: Any, value: Any) -> None:
    match value:
        case torch.Tensor():
            h.update(f"tensor{tuple(value.shape)}{value.dtype}{value.device}".encode())
            h.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        case np.ndarray():
            h.update(f"array{value.shape}{value.dtype}".encode())
            h.update(np.ascontiguousarray(value))
        case Image.Image():
            h.update(f"picture{value.size}{value.mode}".encode())
            h.update(value.tobytes())
        case dict():
            for key in sorted(value, key=str):
                h.update(f"key{key}".encode())
                _feed(h, value[key])
        case list() | tuple():
            h.update(f"list{len(value)}".encode())
            for item in value:
                _feed(h, item)
        case None | str() | int() | float() | torch.device() | torch.dtype():
            h.update(f"{type(value).__name__}:{value!s};".encode())
        case _:
            raise PolicyError(
                f"an encoder was given a {type(value).__name__}, which has no content hash; "
                "pass text, numbers, tensors, arrays or PIL images"
            )


def is_per_sample(value: Any, batch: int) -> bool:
    """Whether an argument holds one entry per sample: a list of texts or media, or a tensor of media."""
    if isinstance(value, torch.Tensor):
        return value.ndim >= 3 and value.shape[0] == batch
    media = (str, torch.Tensor, np.ndarray, Image.Image)
    return isinstance(value, list | tuple) and len(value) == batch and all(isinstance(v, media) for v in value)


def _leaves(result: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, result)
    return found


def _is_position_ids(leaf: torch.Tensor, leaves: list[torch.Tensor]) -> bool:
    """Position ids (length, 2..4) belong to no sample, even where the length happens to equal the batch."""
    if leaf.ndim != 2 or leaf.shape[1] > 4:
        return False
    return any(other.ndim == 3 and other.shape[1] == leaf.shape[0] for other in leaves)


def take_rows(result: Any, rows: Sequence[int], batch: int) -> Any:
    """`result` of a call on `batch` samples, restricted to `rows` (with repetitions); what has no batch axis stays."""
    leaves = _leaves(result)

    def take(value: Any) -> Any:
        if isinstance(value, DiagonalGaussianDistribution):
            return type(value)(take(value.parameters), value.deterministic)
        if isinstance(value, torch.Tensor):
            blocks, rest = divmod(value.shape[0], batch) if value.ndim else (0, 1)
            if rest or blocks not in (1, 2) or _is_position_ids(value, leaves):
                return value
            index = torch.tensor([block * batch + row for block in range(blocks) for row in rows])
            return value.index_select(0, index.to(value.device))
        if isinstance(value, list) and len(value) == batch:
            return [value[row] for row in rows]
        if isinstance(value, list | tuple):
            return type(value)(take(v) for v in value)
        if isinstance(value, dict):
            return type(value)({key: take(v) for key, v in value.items()})
        return value

    return take(result)


def join_rows(results: Sequence[Any]) -> Any:
    """Concatenate per-sample results along the batch; shorter sequences are padded with zeros (their masks say 0)."""
    first = results[0]
    if isinstance(first, DiagonalGaussianDistribution):
        return type(first)(join_rows([r.parameters for r in results]), first.deterministic)
    if isinstance(first, dict):
        return type(first)({key: join_rows([r[key] for r in results]) for key in first})
    if isinstance(first, torch.Tensor):
        tensors = list(results)
        if len({t.shape[1:] for t in tensors}) == 1:
            return torch.cat(tensors) if first.shape[0] == 1 or first.ndim > 2 else _same_or_cat(tensors)
        length = max(t.shape[1] for t in tensors)
        pads = [(0, 0) * (t.ndim - 2) + (0, length - t.shape[1]) for t in tensors]
        return torch.cat([torch.nn.functional.pad(t, pad) for t, pad in zip(tensors, pads, strict=True)])
    if isinstance(first, list | tuple):
        if isinstance(first, list) and len(first) == 1:
            return [item for result in results for item in result]
        return type(first)(join_rows(items) for items in zip(*results, strict=True))
    return first


def _same_or_cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    same = all(t.shape == tensors[0].shape and torch.equal(t, tensors[0]) for t in tensors)
    return tensors[0] if same else torch.cat(tensors)


def _to(result: Any, device: torch.device | str) -> Any:
    def move(leaf: Any) -> Any:
        if isinstance(leaf, DiagonalGaussianDistribution):
            return type(leaf)(leaf.parameters.to(device), leaf.deterministic)
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(move, result)


class Memo:
    """Results of encoder calls by content. `calls` counts the batches that really ran."""

    def __init__(self) -> None:
        self.batches: dict[str, Any] = {}
        self.rows: dict[str, tuple[str, int, int]] = {}  # row key -> (batch key, batch size, row)
        self.calls = 0

    def __call__(self, name: str, shared: Any, samples: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Answer `name(shared, samples)`; `samples` maps argument names to sequences of one entry per sample."""
        prefix = f"{name}:{digest(shared)}"
        count = len(next(iter(samples.values()))) if samples else 0
        keys = [f"{prefix}:{digest({k: v[i] for k, v in samples.items()})}" for i in range(count)]
        whole = f"{prefix}:{digest(keys)}"
        if whole in self.batches:
            return self.batches[whole]
        if keys and all(key in self.rows for key in keys):
            return self._assemble(keys)
        with torch.no_grad():
            result = run()
        self.calls += 1
        self.batches[whole] = result
        for row, key in enumerate(keys):
            self.rows.setdefault(key, (whole, count, row))
        return result

    def _assemble(self, keys: list[str]) -> Any:
        homes = [self.rows[key] for key in keys]
        whole, batch, _ = homes[0]
        if all(home[0] == whole for home in homes):
            return take_rows(self.batches[whole], [home[2] for home in homes], batch)
        return join_rows([take_rows(self.batches[home[0]], [home[2]], home[1]) for home in homes])

    def to(self, device: torch.device | str) -> Memo:
        """The same results on another device."""
        moved = Memo()
        moved.rows, moved.calls = dict(self.rows), self.calls
        moved.batches = {key: _to(value, device) for key, value in self.batches.items()}
        return moved

    def joined(self, other: Memo) -> Memo:
        """Both memories in one; nothing is encoded again."""
        both = Memo()
        both.batches = {**self.batches, **other.batches}
        both.rows = {**self.rows, **other.rows}
        both.calls = self.calls + other.calls
        return both
