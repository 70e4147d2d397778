"""A few steps of a reward model on one batch, as tests of what it learns from take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def descent(
    model: torch.nn.Module, loss_of: Callable[..., Any], batch: Any, rng: torch.Generator, steps: int = 6
) -> list[float]:
    """The loss before each of `steps` steps of AdamW on the parameters that are trained."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss, _ = loss_of(model, batch, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
