"""A head that judges noised latents by hidden states of the generator's own first blocks, and its files.

The latent reward of VideoAlign (2501.13918, section 5 and Table 5): a few early blocks, the noise level, one number for
each dimension. Tokens are read by learnable queries, as in PRFL (2511.21541).
"""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import nn

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.tensor_files import read_tensors
from alignkit.rewards.weights import on

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FREQUENCIES = 64


class ShowsFeatures(Protocol):
    """What a head needs of the generator; `alignkit.Policy` has it."""

    pipe: Any

    def timestep_of(self, sigma: torch.Tensor | float) -> torch.Tensor: ...

    def features(self, x: torch.Tensor, t: torch.Tensor, cond: Any, depth: int, blocks: Any = None) -> torch.Tensor: ...

    def first_blocks(self, depth: int) -> nn.ModuleList: ...

    def reference(self) -> Any: ...


@dataclass(frozen=True)
class HeadConfig:
    """What config.json says.

    Attributes:
        pipeline: class of the pipeline whose blocks it reads.
        dimensions: what it judges, one number each.
        width: of the blocks' tokens.
        depth: how many blocks run.
        blocks: "own": its own copies of these blocks, trained with it; "shared": the generator's.
        tokens: how many of the last tokens it reads; None: all. Text that is padded to the longest prompt of a batch
            stands before the picture's tokens in some models, and would make a score depend on the batch.
        noise: (low, high) noise levels it was trained on; None: clean latents only.
        hidden, queries, heads: of the attention that reads the tokens.
    """

    pipeline: str
    dimensions: tuple[str, ...]
    width: int
    depth: int = 2
    blocks: Literal["own", "shared"] = "shared"
    tokens: int | None = None
    noise: tuple[float, float] | None = (0.0, 0.95)
    hidden: int = 128
    queries: int = 4
    heads: int = 4
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not self.dimensions or len(set(self.dimensions)) != len(self.dimensions):
            raise RecipeError(f"dimensions={self.dimensions}; give each of them a name of its own")
        if self.blocks not in ("own", "shared"):
            raise RecipeError(f'blocks={self.blocks!r}; choose "own" or "shared"')
        if self.hidden % self.heads:
            raise RecipeError(f"hidden={self.hidden} does not split over heads={self.heads}")

    @classmethod
    def read(cls, file: Path) -> HeadConfig:
        """Raises RewardError where the file is no such config, or of another format."""
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or found.get("format") != FORMAT or found.keys() != names:
            raise RewardError(
                f"{file} is no head of noised latents of format {FORMAT}; expected exactly the fields {sorted(names)}"
            )
        tuples = {name: None if found[name] is None else tuple(found[name]) for name in ("dimensions", "noise")}
        return cls(**{**found, **tuples})

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def level_embedding(sigma: torch.Tensor) -> torch.Tensor:
    """(B, 2 FREQUENCIES) float32 sines and cosines of noise levels (B,) in [0, 1]."""
    rates = torch.exp(torch.linspace(math.log(1.0), math.log(1000.0), FREQUENCIES, device=sigma.device))
    angles = torch.einsum("b,f->bf", sigma.float(), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Head(nn.Module):
    """(B, N, width) tokens and (B,) noise levels -> (B, D): for each dimension queries read the tokens, an MLP says
    how good what they read is."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden, count = config.hidden, len(config.dimensions)
        self.heads = config.heads
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.norm = nn.LayerNorm(config.width)
        self.enter = nn.Linear(config.width, hidden)
        self.inner = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU())
        self.inner.append(nn.Linear(2 * hidden, hidden))
        self.ready = nn.LayerNorm(hidden)
        self.keys, self.values = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.queries = nn.Parameter(torch.randn(count, config.queries, hidden) * hidden**-0.5)
        read = config.queries * hidden
        self.first = nn.Parameter(torch.randn(count, read, hidden) * read**-0.5)
        self.bias = nn.Parameter(torch.zeros(count, hidden))
        self.last = nn.Parameter(torch.randn(count, hidden) * hidden**-0.5)

    def forward(self, tokens: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = self.level(level_embedding(sigma))
        x = self.enter(self.norm(tokens)) + rearrange(level, "b d -> b 1 d")
        x = self.ready(x + self.inner(x))
        keys, values = (rearrange(f(x), "b n (h e) -> b h n e", h=self.heads) for f in (self.keys, self.values))
        asked = rearrange(self.queries, "d q (h e) -> h (d q) e", h=self.heads)
        asked = repeat(asked, "h m e -> b h m e", b=len(x))
        read = nn.functional.scaled_dot_product_attention(asked, keys, values)
        read = rearrange(read, "b h (d q) e -> b d (q h e)", d=len(self.queries))
        inner = torch.einsum("bdr,drk->bdk", read, self.first) + self.bias + rearrange(level, "b k -> b 1 k")
        return torch.einsum("bdk,dk->bd", nn.functional.gelu(inner), self.last)


class NoisyScorer(nn.Module):
    """A head with the blocks it reads.

    Attributes:
        config: what it judges and reads.
        head: from tokens to numbers.
        blocks: its own blocks; None: the generator's.
    """

    def __init__(self, config: HeadConfig, blocks: nn.ModuleList | None) -> None:
        super().__init__()
        self.config, self.head, self.blocks = config, Head(config), blocks
        self._recent: Recent | None = None

    @classmethod
    def of(cls, config: HeadConfig, policy: ShowsFeatures) -> NoisyScorer:
        """An untrained one for this generator; its own blocks start as the generator's.

        Raises:
            RecipeError: the config is for another pipeline.
        """
        own = type(policy.pipe).__name__
        if config.pipeline != own:
            raise RecipeError(
                f"this head reads the blocks of {config.pipeline}, and the generator is a {own}; blocks of another "
                "model say nothing to it. Train one on this generator (recipes/sign_noisy.py shows how)"
            )
        if config.blocks == "shared":
            return cls(config, None)
        with policy.reference():
            return cls(config, policy.first_blocks(config.depth).requires_grad_(True))

    def scores(self, policy: ShowsFeatures, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """(B, D) of latents (B, ...) at noise levels (B,); gradients flow to the latents. The blocks are the
        reference's: adapters that the policy trains do not take part. A head that was trained on clean latents takes
        all for clean.

        Raises:
            RewardError: the tokens have another width than those it was trained on.
        """
        on(self, latents.device)
        sigma = torch.zeros_like(sigma) if self.config.noise is None else sigma
        with policy.reference():
            t = policy.timestep_of(sigma)
            tokens = policy.features(latents, t, cond, self.config.depth, self.blocks)
        if tokens.shape[-1] != self.config.width:
            raise RewardError(
                f"the blocks give tokens of width {tokens.shape[-1]}, and this head was trained on {self.config.width}:"
                f" another model of class {self.config.pipeline}"
            )
        if self.config.tokens is not None:
            tokens = tokens[:, -self.config.tokens :]
        return self.head(tokens, sigma.to(latents.device))

    def once(self, policy: ShowsFeatures, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """`scores`, not computed again for the same latents: several dimensions share one forward, and one graph.
        After a backward through it, the next call begins anew: sum dimensions before you differentiate."""
        if latents.is_inference():  # such tensors count no versions
            return self.scores(policy, latents, sigma, cond)
        asked, recent = Recent.of(policy, latents, sigma, cond), self._recent
        if recent is not None and recent.scores is not None and recent.answers(asked):
            return recent.scores
        found = self.scores(policy, latents, sigma, cond)
        self._recent = dataclasses.replace(asked, scores=found)
        if found.requires_grad:
            found.register_hook(self._spent)
        return found

    def _spent(self, gradient: torch.Tensor) -> None:
        self._recent = None

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors, float16. Of its own blocks only what was trained."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        kept = {n: v for n, v in self.state_dict().items() if n in trained or n.startswith("head.")}
        halves = {name: value.detach().cpu().half().contiguous() for name, value in kept.items()}
        save_file(halves, str(folder / WEIGHTS), metadata={"format": "pt"})
        self.config.write(folder / CONFIG)

    @classmethod
    def load(cls, folder: Path, policy: ShowsFeatures) -> NoisyScorer:
        """A saved one, frozen, for this generator. Blocks' tensors that the file leaves out are the generator's.

        Raises:
            RecipeError: it was trained on another pipeline.
            RewardError: a file that is no such head, or tensors that do not fit.
        """
        scorer = cls.of(HeadConfig.read(folder / CONFIG), policy)
        scorer.fill(read_tensors(folder, WEIGHTS), folder)
        return scorer.eval().requires_grad_(False)

    def fill(self, state: Mapping[str, torch.Tensor], source: Path) -> None:
        """Take over the tensors of a file. Raises RewardError naming the first that is missing or does not fit."""
        own = self.state_dict()
        needed = {name for name in own if name.startswith("head.")}
        for name in sorted(needed | state.keys()):
            given, held = state.get(name), own.get(name)
            if given is None or held is None or given.shape != held.shape:
                shapes = [None if v is None else tuple(v.shape) for v in (given, held)]
                raise RewardError(f"{source / WEIGHTS}: {name!r} has shape {shapes[0]}, expected {shapes[1]}")
        self.load_state_dict(dict(state), strict=False)


@dataclass(frozen=True)
class Recent:
    """What was last asked of a head, and its answer."""

    policy: weakref.ref[Any]
    latents: weakref.ref[torch.Tensor]
    version: int
    cond: Any
    sigma: torch.Tensor
    grad: bool
    scores: torch.Tensor | None = None

    @classmethod
    def of(cls, policy: Any, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> Recent:
        grad = torch.is_grad_enabled() and latents.requires_grad
        return cls(weakref.ref(policy), weakref.ref(latents), latents._version, cond, sigma.detach().clone(), grad)

    def answers(self, asked: Recent) -> bool:
        """Whether it is for this very tensor, unchanged since, at these levels under this conditioning."""
        same = self.latents() is not None and self.latents() is asked.latents() and self.policy() is asked.policy()
        same = same and (self.version, self.grad) == (asked.version, asked.grad) and self.cond is asked.cond
        return same and torch.equal(self.sigma, asked.sigma)
