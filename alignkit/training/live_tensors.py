"""The bytes of all tensors that are alive, counted where PyTorch hands them out, and their peak."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in existing:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def weights_of(pipe: Any) -> list[torch.Tensor]:
    """Parameters and buffers of all components of a pipeline."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def peak_bytes(pipe: Any, work: Callable[[], Any]) -> int:
    """Peak of live tensor bytes during `work`, the pipeline's weights included."""
    gc.collect()
    with LiveTensors(weights_of(pipe)) as live:
        work()
    return live.peak
