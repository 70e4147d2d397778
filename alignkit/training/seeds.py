"""Randomness of a run, derived from (seed, purpose, step, index): the same whatever the batch, the rank or a resume."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but `key`."""
    raw = hashlib.blake2b("/".join(str(k) for k in key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(raw, "big") >> 1)


def generators(count: int, *key: int | str, first: int = 0) -> list[torch.Generator]:
    """One generator per sample, by `key` and the sample's global index."""
    return [generator(*key, first + i) for i in range(count)]


def global_state() -> tuple[torch.Tensor, dict[str, Any]]:
    """The state of torch's and Python's global generators, which users' rewards may draw from."""
    version, words, gauss = random.getstate()
    return torch.get_rng_state(), {"version": version, "words": list(words), "gauss": gauss}


def restore_global_state(state: torch.Tensor, python: dict[str, Any]) -> None:
    """Put back what `global_state` returned."""
    torch.set_rng_state(state)
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
