"""Claims about noisy reward guidance: a reward must have seen noise (13), and which target is the right one (14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.flow.guidance import velocity_change
from alignkit.flow.path import RectifiedFlow, noise
from recipes.mixture.claims_matching import judged_pairs
from recipes.mixture.finding import Finding, Verdict, at_level, column, mean_error, shown, together
from recipes.mixture.measure import frontier, tilted
from recipes.mixture.noised import Noised
from recipes.mixture.policy import Correction
from recipes.mixture.world import FOUR, Function, bimodal, linear, quadratic

SEEDS = (0, 1, 2)
COUNT, STEPS = 512, 50
"""Points of a measurement, and Euler steps of the sampler."""
TRAIN = {"updates": 3000, "batch": 256, "lr": 1e-3}
TEMPERATURE = 0.25
"""Of the Bradley-Terry labels: a reward learnt from them is the true one divided by it, and is multiplied by it to
guide, so that weight w asks for the tilt with lambda = w."""
PAIRS = 4096
WEIGHTS = (0.5, 1.0, 2.0, 10.0)
BEGINS = {0.0: 0.999, 0.2: 0.81}
"""Share of the steps without guidance -> the noise level from which there is none."""

Loss = Callable[[Noised, torch.Generator], Tensor]


# what guidance does to the distribution


def drawn(
    reward: Noised, weight: float, start: Tensor, steps: int = STEPS, sigma_singular: float = BEGINS[0.0]
) -> tuple[Tensor, Tensor]:
    """Points (B, 2) that noisy reward guidance draws from noises `start` (B, 2), and their exact log-density (B,).

    The sampler is a chain of Euler steps, so the density is that of the noise over the determinants of the steps.
    """
    path, x = RectifiedFlow(), start
    log_p = -start.square().sum(-1) / 2.0 - math.log(2.0 * math.pi)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    for sigma, following in pairwise(sigmas):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            level = sigma.expand(len(x))
            (gradient,) = torch.autograd.grad(reward(x, level, None).sum(), x, create_graph=True)
            change = weight * velocity_change(path, gradient, sigma, sigma_singular)
            after = x + (following - sigma) * (FOUR.velocity(x, sigma) + change)
            one, two = (torch.autograd.grad(after[:, i].sum(), x, retain_graph=i == 0)[0] for i in range(2))
        log_p = log_p - (one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]).abs().log()
        x = after.detach()
    return x, log_p


def row_of(
    reward: Noised, gold: Function, weight: float, strength: float, seed: int, begin: float = 0.0, **named: Any
) -> dict[str, Any]:
    """One measurement: E[r], KL to the mixture, and the objective E[r] - KL / lambda that the weight stands for."""
    start = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1000 + seed))
    x, log_p = drawn(reward, weight, start, sigma_singular=BEGINS[begin])
    values, kl = gold(x), float((log_p - FOUR.log_prob(x)).mean())
    row = {**named, "seed": seed, "weight": weight, "begin": begin, "reward": float(values.mean()), "kl": kl}
    row |= {"objective": row["reward"] - kl / strength, "shares": FOUR.shares_of(x).tolist()}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "shares"}, flush=True)
    return row


def nothing(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
    """No reward."""
    return 0.0 * x.sum(-1)


# rewards that are trained


def trained(loss: Loss, seed: int, at_clean: bool = False) -> Noised:
    """A small network of (points, sigma), trained on `loss`; `at_clean`: it is told sigma 0 whatever the noise."""
    network = Correction(2, 64, 3, seed)

    def reward(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return network(x, torch.zeros_like(sigma) if at_clean else sigma)[:, 0]

    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=TRAIN["lr"])
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(TRAIN["updates"]))
    for _ in range(int(TRAIN["updates"])):
        optimizer.zero_grad()
        loss(reward, rng).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay.step()
    network.requires_grad_(False)
    return reward


def same_noise_pairs(winners: Tensor, losers: Tensor, noised: bool, reward: Noised, rng: torch.Generator) -> Tensor:
    """Bradley-Terry loss of a batch of pairs (N, 2); both sides get the same noise at the same level (methods A3)."""
    rows = torch.randint(len(winners), (int(TRAIN["batch"]),), generator=rng)
    sigma = torch.rand(len(rows), generator=rng) * float(noised)
    eps = torch.randn(len(rows), 2, generator=rng)
    better, worse = (reward(noise(RectifiedFlow(), x[rows], eps, sigma), sigma, None) for x in (winners, losers))
    return -F.logsigmoid(better - worse).mean()


def mean_target(gold: Function, strength: float, reward: Noised, rng: torch.Generator) -> Tensor:
    """Squared error to strength r(x0): its least is strength E[r(x0) | x_sigma]."""
    return (_excess(gold, strength, reward, rng) ** 2).mean()


def log_mean_exp_target(gold: Function, strength: float, reward: Noised, rng: torch.Generator) -> Tensor:
    """exp(d) - d - 1 of d = strength r(x0) - h: its least is h = log E[exp(strength r(x0)) | x_sigma]."""
    d = _excess(gold, strength, reward, rng)
    return (d.clamp_max(8.0).exp() - d - 1.0).mean()


def _excess(gold: Function, strength: float, reward: Noised, rng: torch.Generator) -> Tensor:
    x0 = FOUR.sample(int(TRAIN["batch"]), rng)
    sigma = torch.rand(len(x0), generator=rng)
    x = noise(RectifiedFlow(), x0, torch.randn(len(x0), 2, generator=rng), sigma)
    return strength * gold(x0) - reward(x, sigma, None)


# 13


def claim_13(workers: int = 1) -> Finding:
    """A Bradley-Terry reward that has seen noise, one that has not, and no guidance, over weights."""
    jobs = [partial(_guided_by_pairs, seed, arm) for seed in SEEDS for arm in ("noised", "clean", "none")]
    settings = {"pairs": PAIRS, "temperature": TEMPERATURE, **TRAIN, "weights": WEIGHTS, "begins": list(BEGINS)}
    return _noise_needed(together(jobs, workers), {**settings, "steps": STEPS, "seeds": SEEDS})


def _guided_by_pairs(seed: int, arm: str) -> list[dict[str, Any]]:
    if arm == "none":
        return [row_of(nothing, bimodal, 0.0, 1.0, seed, begin, arm=arm) for begin in BEGINS]
    winners, losers = judged_pairs(PAIRS, TEMPERATURE, seed)
    reward = trained(partial(same_noise_pairs, winners, losers, arm == "noised"), seed, at_clean=arm == "clean")

    def scaled(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return TEMPERATURE * reward(x, sigma, cond)

    return [row_of(scaled, bimodal, w, w, seed, begin, arm=arm) for begin in BEGINS for w in WEIGHTS]


LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def _noise_needed(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Finding:
    ahead, told = [], []
    best = {w: tilted(FOUR, bimodal, w, 150) for w in WEIGHTS}
    for begin in BEGINS:
        gaps: dict[float, tuple[float, float]] = {}
        for level in LEVELS:
            curves = {arm: [_curve(rows, arm=arm, begin=begin, seed=seed) for seed in SEEDS] for arm in ARMS}
            found = [(at_level(a, level), at_level(b, level)) for a, b in zip(*curves.values(), strict=True)]
            both = [a - b for a, b in found if a is not None and b is not None]
            if len(both) == len(SEEDS):
                gaps[level] = mean_error(both)
        ahead += [gap > 2 * error for gap, error in gaps.values()]
        shown_gaps = ", ".join(f"{level}: {gap:+.3f} +- {error:.3f}" for level, (gap, error) in gaps.items())
        told.append(f"guided after {begin:.0%} of the steps, E[r] of noised less clean by KL {shown_gaps}")
        for w in WEIGHTS:
            arms = "; ".join(
                f"{arm} E[r] {shown(column(rows, 'reward', arm=arm, weight=w, begin=begin))} at KL "
                f"{shown(column(rows, 'kl', arm=arm, weight=w, begin=begin))}"
                for arm in ARMS
            )
            told.append(f"w {w:g} (the tilt: {best[w][0]:.3f} at {best[w][1]:.3f}): {arms}")
    verdict: Verdict = "undecided" if not ahead else "holds" if sum(ahead) > len(ahead) / 2 else "fails"

    def draw(axes: Any) -> None:
        for arm, colour in zip(ARMS, ("C0", "C1"), strict=True):
            for begin, marker in zip(BEGINS, ("o", "x"), strict=True):
                points = (column(rows, name, arm=arm, begin=begin) for name in ("kl", "reward"))
                axes.plot(*points, marker, color=colour, label=f"{arm}, after {begin:.0%}")
        reached = [(kl, best) for kl, best in frontier(FOUR, bimodal) if kl <= 4.0]
        axes.plot(*zip(*reached, strict=True), "k-", label="tilt (best possible)")
        axes.set(xlabel="KL to the reference (nats)", ylabel="E[r]")
        axes.set_xscale("symlog", linthresh=1.0)
        axes.legend()

    return Finding(
        13,
        "guidance by a reward that has seen noise > by one that has not > none",
        "the clean reward ties the noised one (at matched KL)",
        settings,
        rows,
        verdict,
        f"without guidance E[r] {shown(column(rows, 'reward', arm='none', begin=0.0))}. {'. '.join(told)}",
        draw,
    )


ARMS = ("noised", "clean")


def _curve(rows: list[dict[str, Any]], **where: Any) -> list[tuple[float, float]]:
    """(KL, E[r]) from no guidance upwards."""
    none = {**where, "arm": "none"}
    return [
        *zip(column(rows, "kl", **none), column(rows, "reward", **none), strict=True),
        *zip(column(rows, "kl", **where), column(rows, "reward", **where), strict=True),
    ]


# 14

BEDS: dict[str, tuple[Function, float]] = {
    "bimodal": (bimodal, 4.0),
    "linear": (linear, 1.0),
    "quadratic": (quadratic, 4.0),
}
"""Rewards and the lambda of the tilt."""
TARGETS = {"log mean exp": log_mean_exp_target, "mean": mean_target}


def claim_14(workers: int = 1) -> Finding:
    """Noised rewards trained on two targets, guiding at the weight that each stands for."""
    jobs = [partial(_guided_by, bed, target, seed) for bed in BEDS for seed in SEEDS for target in TARGETS]
    beds = {bed: strength for bed, (_, strength) in BEDS.items()}
    return _targets(together(jobs, workers), {"lambda": beds, **TRAIN, "steps": STEPS, "seeds": SEEDS})


def _guided_by(bed: str, target: str, seed: int) -> list[dict[str, Any]]:
    gold, strength = BEDS[bed]
    reward = trained(partial(TARGETS[target], gold, strength), seed)
    return [row_of(reward, gold, 1.0, strength, seed, bed=bed, target=target)]


def _targets(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Finding:
    ahead, apart, told = [], [], []
    for bed, (gold, strength) in BEDS.items():
        best = tilted(FOUR, gold, strength, 150)
        gaps = {}
        for name in ("objective", "reward"):
            first, second = (column(rows, name, bed=bed, target=target) for target in TARGETS)
            gaps[name] = mean_error([a - b for a, b in zip(first, second, strict=True)])
        ahead.append(gaps["objective"][0] > 2 * gaps["objective"][1])
        apart.append(abs(gaps["reward"][0]) > 2 * gaps["reward"][1])
        arms = "; ".join(
            f"{target} E[r] {shown(column(rows, 'reward', bed=bed, target=target))} at KL "
            f"{shown(column(rows, 'kl', bed=bed, target=target))}, objective "
            f"{shown(column(rows, 'objective', bed=bed, target=target))}"
            for target in TARGETS
        )
        told.append(
            f"{bed}, lambda {strength:g} (the tilt: {best[0]:.3f} at KL {best[1]:.3f}, objective "
            f"{best[0] - best[1] / strength:.3f}): {arms}"
        )
    verdict: Verdict = "fails" if not any(apart) else "holds" if all(ahead) else "undecided"

    def draw(axes: Any) -> None:
        for number, (bed, (gold, _)) in enumerate(BEDS.items()):
            for target, marker in zip(TARGETS, ("o", "x"), strict=True):
                points = (column(rows, name, bed=bed, target=target) for name in ("kl", "reward"))
                axes.plot(*points, marker, color=f"C{number}", label=f"{bed}, {target}")
            reached = [(kl, best) for kl, best in frontier(FOUR, gold) if kl <= 3.0]
            axes.plot(*zip(*reached, strict=True), "-", color=f"C{number}")
        axes.set(xlabel="KL to the reference (nats)", ylabel="E[r]; lines: best possible")
        axes.legend(fontsize=7)

    return Finding(
        14,
        "a target of log E[exp] guides better than a target of the mean",
        "E[r] is equal (the rest of the claim: E[r] - KL / lambda is larger on every bed)",
        settings,
        rows,
        verdict,
        ". ".join(told),
        draw,
    )
