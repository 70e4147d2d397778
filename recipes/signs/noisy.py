"""A head that judges noised latents of signs: are they legible as the prompt's word, and in its colour?

What `recipes/sign_noisy.py` trains: the scorer, its examples, and how well it tells signs apart at each noise level.

    python recipes/signs/noisy.py noised=runs/sign_noisy/model clean=... shuffled=... --out accuracy.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from alignkit import Policy, Prompt
from alignkit.flow.plan import deterministic
from alignkit.rewards.loading import load, load_file
from alignkit.rewards.noisy_head import HeadConfig, NoisyScorer
from alignkit.shipped import path
from alignkit.training.examples import PairBatch

preference = load_file(path("recipes", "signs", "preference.py"))
world = preference.world
heads = load_file(path("recipes", "worlds", "heads.py"))

DIMENSIONS = ("legibility", "colour")
LEGIBILITY, COLOUR = range(2)
CALL = {"height": world.HEIGHT, "width": world.WIDTH, "true_cfg_scale": 1.0}
TOKENS = 24  # of a sign: 3 x 8 patches of 8 x 8 pixels
LEVELS = heads.LEVELS
# Of the blocks: how the noise level enters, which would double the file, and what the last one does to the text.
FROZEN = ("_mod.", "{last}.txt_mlp.", "{last}.attn.add_q_proj.", "{last}.attn.to_add_out.")
SPELLING, LOOKS = ("misspelt", "transposed", "other word"), ("defocused", "low contrast")
# Pictures of one prompt: right, wrong to read in two ways, of another colour, both.
RIGHT, MISSPELT, UNCLEAR, COLOURED, BOTH = range(5)
# (winner, loser, preferred in legibility, preferred in colour, share): the pair differs in what it is judged by, and
# what it is not judged by is right in both, or wrong in both.
CONTESTS = (
    (RIGHT, MISSPELT, 1, 0, 0.35),
    (COLOURED, BOTH, 1, 0, 0.20),
    (RIGHT, UNCLEAR, 1, 0, 0.15),
    (RIGHT, COLOURED, 0, 1, 0.12),
    (MISSPELT, BOTH, 0, 1, 0.12),
    (MISSPELT, COLOURED, -1, 1, 0.06),
)


@cache
def generator() -> Policy:
    """The shipped generator."""
    return heads.frozen("shipped:assets/signs/generator")


class Signs(nn.Module):
    """The head in training."""

    def __init__(self, noise: tuple[float, float] | None, depth: int) -> None:
        super().__init__()
        config = HeadConfig(
            type(generator().pipe).__name__, DIMENSIONS, 128, depth, "own", tokens=TOKENS, noise=noise, hidden=128
        )
        self.scorer = NoisyScorer.of(config, generator())
        frozen = [part.format(last=f"blocks.{depth - 1}") for part in FROZEN]
        for name, value in self.scorer.named_parameters():
            value.requires_grad_(not any(part in name for part in frozen))

    def forward(self, media: Tensor, prompts: Sequence[Prompt], sigma: Tensor | None = None) -> Tensor:
        """(B, 2) of latents at noise levels; None: clean."""
        level = torch.zeros(len(media)) if sigma is None else sigma
        return self.scorer.scores(generator(), media, level, conditions(prompts))

    def save(self, folder: Path) -> None:
        self.scorer.save(folder)


def scorer(noise: tuple[float, float] | None = (0.0, 0.95), depth: int = 2) -> Signs:
    return Signs(noise, depth)


def conditions(prompts: Sequence[Prompt]) -> Any:
    """The conditioning of signs. Those of `drawn` carry it, encoded once for all."""
    every = prompts[0].columns.get("cond")
    if every is None:
        return generator().condition(list(prompts), num_steps=2, **CALL)
    return every[[prompt.id for prompt in prompts]]


def five(word: str, colour: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The pictures of one prompt, (H, W, 3) uint8, in the order of RIGHT to BOTH. Each has its own font, shade and
    offset; a misspelt word is the same in both pictures of it."""
    others = [name for name in world.COLOURS if name != colour]
    other = others[rng.integers(len(others))]
    wrong, _ = preference.flawed(SPELLING[rng.choice(3, p=(0.45, 0.45, 0.1))], word, colour, rng)
    unclear = preference.flawed(LOOKS[rng.integers(2)], word, colour, rng)[1]
    shown = ((word, colour), (wrong.word, colour), (word, other), (wrong.word, other))
    right, misspelt, coloured, both = (world.draw(world.random_sign(rng, *one)) for one in shown)
    return [right, misspelt, unclear, coloured, both]


@torch.no_grad()
def latents_of(pictures: np.ndarray, prompts: Sequence[Prompt], batch: int = 64) -> Tensor:
    """(N, G, ...) clean latents of (N, G, H, W, 3) uint8, the pictures of N prompts."""
    media, found = preference.as_media(pictures), []
    for start in range(0, len(media), batch):
        rows = slice(start, start + batch)
        cond = conditions(prompts[rows]).repeat(media.shape[1])
        encoded = generator().encode(rearrange(media[rows], "n g c h w -> (n g) c h w"), cond)
        found.append(rearrange(encoded, "(n g) ... -> n g ...", g=media.shape[1]))
    return torch.cat(found)


class Contests:
    """Pairs of clean latents of one prompt, from signs drawn and encoded once.

    Args:
        prompts: how many, of training words and of random letters.
        shuffled: the control: which sign of a pair is preferred is drawn at random.
        held_out_words: how many words the measures use.
        noised: whether the measures on the way are of noised latents.
    """

    def __init__(
        self, prompts: int = 4000, shuffled: bool = False, held_out_words: int = 120, noised: bool = True
    ) -> None:
        self.shuffled, self.noised = shuffled, noised
        rng, names = np.random.default_rng([7, 0]), list(world.COLOURS)
        asked = [(preference.training_word(rng), names[rng.integers(len(names))]) for _ in range(prompts)]
        self.prompts, self.latents = drawn(asked, rng)
        self.held_out = held_out_signs(held_out_words)

    def batch(self, size: int, rng: torch.Generator) -> PairBatch:
        rows = torch.randint(len(self.prompts), (size,), generator=rng)
        shares = torch.tensor([one[-1] for one in CONTESTS])
        kinds = torch.multinomial(shares, size, replacement=True, generator=rng)
        table = torch.tensor([one[:-1] for one in CONTESTS])[kinds]
        preferred = table[:, 2:]
        if self.shuffled:
            preferred = preferred * (2 * torch.randint(2, (size, 1), generator=rng) - 1)
        chosen = [self.prompts[row] for row in rows.tolist()]
        winners, losers = (self.latents[rows, table[:, side]] for side in (0, 1))
        return PairBatch(winners, losers, chosen, preferred=preferred)

    def measure(self, model: Any) -> dict[str, float]:
        """Share of held-out pairs in the right order, by dimension and noise level; strictly."""
        found = {}
        for level in LEVELS if self.noised else (0.0,):
            for name, value in accuracies(model, self.held_out, level).items():
                found[f"{name} at {level:g}"] = value
        return found


Drawn = tuple[list[Prompt], Tensor]
"""Prompts, and (N, 5, ...) the latents of their pictures."""


def held_out_signs(count: int) -> Drawn:
    """Signs of up to 120 held-out words, of all lengths."""
    words, names = world.split_words()[1], list(world.COLOURS)
    words = words[:: max(1, len(words) // count)][:count]
    asked = [(word, names[i % len(names)]) for i, word in enumerate(words)]
    return drawn(asked, np.random.default_rng([7, 1]))


def drawn(asked: Sequence[tuple[str, str]], rng: np.random.Generator) -> Drawn:
    """Signs of (word, colour); the prompts have their number as id and the conditioning of all as column."""
    plain = [Prompt(world.prompt_for(*one), i) for i, one in enumerate(asked)]
    cond = generator().condition(plain, num_steps=2, **CALL)
    prompts = [Prompt(one, one.id, {"cond": cond}) for one in plain]
    pictures = np.stack([np.stack(five(*one, rng)) for one in asked])
    return prompts, latents_of(pictures, prompts)


ASKED = (
    ("spelling", RIGHT, MISSPELT, LEGIBILITY),
    ("sharpness", RIGHT, UNCLEAR, LEGIBILITY),
    ("colour of words", RIGHT, COLOURED, COLOUR),
    ("colour of wrong words", MISSPELT, BOTH, COLOUR),
)
"""What is measured: its name, winner, loser, and by which dimension."""


@torch.no_grad()
def accuracies(model: Any, signs: Drawn, level: float, same_noise: bool = True) -> dict[str, float]:
    """Share of pairs in the right order at one noise level; strictly.

    Args:
        same_noise: both sides of a pair have the same noise, so that a score has only to tell which way it changes
            from one to the other; what guides sampling. False: each has its own, and the pair is told apart only by
            what is left of the picture.
    """
    prompts, latents = signs
    shape = latents[:, :1].shape if same_noise else latents.shape
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noised, sigma = (1 - level) * latents + level * eps, torch.full((len(prompts),), level)
    scores = torch.stack([model(side, prompts, sigma) for side in noised.unbind(dim=1)])
    share = {name: float((scores[a, :, d] > scores[b, :, d]).float().mean()) for name, a, b, d in ASKED}
    colour = (share["colour of words"] + share["colour of wrong words"]) / 2
    return {name: share[name] for name in ("spelling", "sharpness")} | {"colour": colour}


@dataclass(frozen=True)
class Samples:
    """The generator's own signs, several for each held-out prompt.

    Attributes:
        prompts: N prompts.
        latents: (N, G, ...) clean.
        exact: (N, G) whether OCR reads exactly the prompt's word.
    """

    prompts: list[Prompt]
    latents: Tensor
    exact: Tensor


@torch.no_grad()
def own_samples(prompts: Sequence[Prompt], group: int = 4, num_steps: int = 8) -> Samples:
    """Draw signs without guidance and have OCR read them."""
    policy, asked = generator(), [Prompt(str(prompt), i) for i, prompt in enumerate(prompts)]
    cond = policy.condition(asked, num_steps=num_steps, **CALL).repeat(group)
    x0 = policy.rollout(cond, deterministic(num_steps), torch.Generator().manual_seed(0)).x0
    exact = load("ocr")(policy.decode(x0, cond), cond.prompts) == 1.0
    return Samples(list(prompts), *(rearrange(one, "(n g) ... -> n g ...", g=group) for one in (x0, exact)))


@torch.no_grad()
def order_of_samples(model: Any, samples: Samples, level: float) -> float:
    """Among samples of one prompt, share of (exact, not exact) that legibility puts in this order at a noise level;
    all samples of a prompt have the same noise."""
    eps = torch.randn(samples.latents[:, :1].shape, generator=torch.Generator().manual_seed(0))
    noised, sigma = (1 - level) * samples.latents + level * eps, torch.full((len(samples.prompts),), level)
    scores = torch.stack([model(x, samples.prompts, sigma)[:, LEGIBILITY] for x in noised.unbind(dim=1)], dim=1)
    pairs = rearrange(samples.exact, "n g -> n g 1") & ~rearrange(samples.exact, "n g -> n 1 g")
    ahead = rearrange(scores, "n g -> n g 1") > rearrange(scores, "n g -> n 1 g")
    return float(ahead[pairs].float().mean())


# the command


def trained(folder: Path) -> Any:
    """A saved head, as the measures call it."""
    scorer = NoisyScorer.load(folder, generator())
    return lambda latents, prompts, sigma: scorer.scores(generator(), latents, sigma, conditions(prompts))


def curves(model: Any, signs: Drawn, samples: Samples) -> Any:
    """Each measure at every level of LEVELS."""
    rows = []
    for level in LEVELS:
        own = {f"{name}, own noise": v for name, v in accuracies(model, signs, level, same_noise=False).items()}
        rows.append(accuracies(model, signs, level) | own | {"own samples": order_of_samples(model, samples, level)})
    return heads.by_measure(rows)


def measured(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The curves of trained heads, by name."""
    signs = held_out_signs(120)
    samples = own_samples(signs[0])
    print(f"{len(signs[0])} held-out words; {int(samples.exact.sum())} of {samples.exact.numel()} samples exact")
    return {name: curves(trained(folder), signs, samples) for name, folder in folders.items()}


PANELS = {
    "spelling": "legibility: right word above wrong",
    "colour": "colour: right above another",
    "own samples": "legibility: OCR reads it above not",
}

if __name__ == "__main__":
    heads.command(__doc__, measured, PANELS, lowest=0.0)
