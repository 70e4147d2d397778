"""Hidden states of a denoiser's first blocks: what a reward of noised latents reads (VideoAlign 2501.13918, A3).

Nothing is said per model. The blocks are found by structure, a forward hook on the last wanted one takes its output
and ends the pipeline's call there, so that the rest of the denoiser does not run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy.conditioning import Conditioning

Output = Callable[[torch.Tensor, torch.Tensor | float, Conditioning], torch.Tensor]
"""(latents, timestep, conditioning) -> what the pipeline hands to `scheduler.step`: `Policy.model_output`."""


class Reached(BaseException):
    """Ends a pipeline's call at a block. Not an Exception, so that no handler inside a pipeline swallows it."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__("the wanted block has run")
        self.tokens = tokens


def blocks_of(denoiser: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """The denoiser's blocks in the order in which they run, each as the list that holds it and its place there.

    They are the longest list among the denoiser's own children, and before it the lists named "...blocks" that were
    registered earlier and hold another class (two-stream blocks stand before one-stream ones; refiners of text and
    noise, which have the class of the blocks behind them, are left out). A U-Net's are those on the way down.

    Raises:
        RecipeError: the denoiser has no list of blocks.
    """
    lists = [(name, part) for name, part in denoiser.named_children() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise RecipeError(f"{type(denoiser).__name__} has no list of blocks among its children, so no features")
    longest = max(lists, key=lambda one: len(one[1]))  # of equals the first
    own = type(longest[1][0])
    before = lists[: lists.index(longest)]
    chain = [part for name, part in before if name.endswith("blocks") and type(part[0]) is not own]
    return [(held, place) for held in (*chain, longest[1]) for place in range(len(held))]


def as_tokens(output: Any) -> torch.Tensor:
    """(B, N, D) float32 of what a block returned: a tensor, or a tuple with one for each stream.

    Feature maps (B, C, H, W) and (B, C, T, H, W) become tokens; streams (B, n, D) of one width follow each other in
    the order in which the block returns them.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    maps = [part for part in tensors if part.ndim in (4, 5)]
    if maps:
        return rearrange(maps[0], "b c h w -> b (h w) c" if maps[0].ndim == 4 else "b c t h w -> b (t h w) c").float()
    streams = [part for part in tensors if part.ndim == 3]
    if not streams:
        shapes = [tuple(part.shape) for part in tensors]
        raise PolicyError(f"a block returned {shapes or type(output).__name__}; expected (B, N, D) or a feature map")
    width = max(streams, key=lambda part: part.shape[1]).shape[2]
    return torch.cat([part.float() for part in streams if part.shape[2] == width], dim=1)


def first_blocks(denoisers: Mapping[str, nn.Module], depth: int) -> nn.ModuleList:
    """Copies of the first `depth` blocks of the only denoiser, without adapters, to be trained as a reward.

    Raises:
        RecipeError: several denoisers, or no such depth.
    """
    if len(denoisers) != 1:
        raise RecipeError(
            f"this pipeline has {len(denoisers)} denoisers ({', '.join(denoisers)}); blocks of one's own replace those "
            'of a single denoiser. Use blocks="shared"'
        )
    (denoiser,) = denoisers.values()
    chain = _checked(denoiser, depth)
    return nn.ModuleList(without_adapters(copy.deepcopy(held[place])) for held, place in chain[:depth])


def without_adapters(module: nn.Module) -> nn.Module:
    """The module with the base layer in place of every layer that has adapters; changes `module`."""
    for name, child in list(module.named_children()):
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        setattr(module, name, without_adapters(base))
    return module


def _checked(denoiser: nn.Module, depth: int) -> list[tuple[nn.ModuleList, int]]:
    chain = blocks_of(denoiser)
    if not 1 <= depth <= len(chain):
        raise RecipeError(
            f"depth={depth}; {type(denoiser).__name__} has {len(chain)} blocks, so give 1 to {len(chain)}"
        )
    return chain


@contextmanager
def _ending(denoiser: nn.Module, depth: int, own: nn.ModuleList | None) -> Iterator[None]:
    """Context: calls of the denoiser end after `depth` blocks, by raising `Reached`; `own` stand in for the first."""
    chain = _checked(denoiser, depth)
    if own is not None and len(own) != depth:
        raise RecipeError(f"{len(own)} blocks for depth={depth}; give one for each")
    before = [held[place] for held, place in chain[:depth]]
    blocks = before if own is None else list(own)

    def reached(module: nn.Module, inputs: Any, output: Any) -> None:
        raise Reached(as_tokens(output))

    hook = blocks[-1].register_forward_hook(reached)
    try:
        for (held, place), block in zip(chain[:depth], blocks, strict=True):
            held[place] = block
        with _without_checkpointing(denoiser):
            yield
    finally:
        hook.remove()
        for (held, place), block in zip(chain[:depth], before, strict=True):
            held[place] = block


@contextmanager
def _without_checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """Context: blocks run as they are. A block that ends the call inside a checkpoint would leave that unfinished."""
    own = vars(denoiser).get("gradient_checkpointing")
    if own is None:
        yield
        return
    vars(denoiser)["gradient_checkpointing"] = False
    try:
        yield
    finally:
        vars(denoiser)["gradient_checkpointing"] = own


def features(
    model_output: Output,
    denoisers: Mapping[str, nn.Module],
    x: torch.Tensor,
    t: torch.Tensor | float,
    cond: Conditioning,
    depth: int,
    blocks: nn.ModuleList | None = None,
) -> torch.Tensor:
    """(B, N, D) float32: the hidden states after the first `depth` blocks; see `Policy.features`."""
    plain, times = cond.unguided, torch.as_tensor(t)
    with ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(_ending(denoiser, depth, blocks))
        whole = _tokens(model_output, x, times, plain)
        if len(whole) == len(x):
            return whole
        if times.ndim == 0 or len(whole) > len(x):
            raise PolicyError(f"the denoiser was called with {len(whole)} rows for {len(x)} samples without guidance")
        return _by_time(model_output, x, times, plain)


def _tokens(output: Output, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    try:
        output(x, float(t) if t.ndim == 0 else t, cond)
    except Reached as end:
        return end.tokens
    raise PolicyError("the denoiser's call did not reach its first blocks, so there are no features of it")


def _by_time(output: Output, x: torch.Tensor, times: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    """One call for each distinct time, rows put back in their order."""
    rows: list[torch.Tensor] = [x.new_empty(0)] * len(x)
    for value in times.unique():
        members = [i for i, t in enumerate(times) if t == value]
        found = _tokens(output, x[members], value, cond[members])
        for i, row in zip(members, found, strict=True):
            rows[i] = row
    return torch.stack(rows)
