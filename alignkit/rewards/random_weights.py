"""Networks with small random weights, the same every time, for trying a reward without its published ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def random_network(build: Callable[[], Network], seed: int = 0) -> Network:
    """What `build` makes, with weights drawn so that its output depends visibly on its input.

    The usual initialisation of a transformer is so small that a tiny one answers almost the same to everything, and
    its zero biases would hide a wrong place in a file of weights. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:  # biases are 0 and norms 1 at first; a scalar is a constant, such as logit_scale
                parameter.add_(0.1 * noise)
    return network
