"""SOLACE: its formula, probes shared in a group, and what it measures on a mixture whose velocity is known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import einsum

from alignkit.errors import RecipeError
from alignkit.flow.path import RectifiedFlow, VariancePreserving
from alignkit.rewards.base import evaluate
from alignkit.rewards.solace import Solace, probes, self_confidence
from alignkit.types import Prompt

MEANS = torch.tensor([(2.0, 2.0), (2.0, -2.0), (-2.0, 2.0), (-2.0, -2.0)], dtype=torch.float64)
SPREAD = 0.35


def mixture_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[eps - x0 | x_sigma = x] of four Gaussians of standard deviation 0.35: exact."""
    a, variance = 1 - sigma, (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    offset = x[:, None] - a * MEANS
    share = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=1)
    x0 = MEANS + a * SPREAD**2 / variance * offset
    eps = sigma / variance * offset
    return einsum(share, eps - x0, "b k, b k d -> b d")


def mixture_log_density(x: torch.Tensor) -> torch.Tensor:
    squared = (x[:, None] - MEANS).square().sum(-1) / SPREAD**2
    return torch.logsumexp(-squared / 2, dim=1) - math.log(4 * 2 * math.pi * SPREAD**2)


class MixturePolicy:
    """A policy of the exact mixture; counts what it is asked."""

    def __init__(self, path: Any = None) -> None:
        self.path = path or RectifiedFlow()
        self.conditioned: list[dict[str, Any]] = []
        self.unguided = self

    def condition(self, prompts: Any, num_steps: int = 28, seed: Any = 0, **call: Any) -> MixturePolicy:
        self.conditioned.append(call)
        return self

    def timestep_of(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return torch.as_tensor(sigma) * 1000

    def velocity(self, x: torch.Tensor, t: torch.Tensor | float, cond: Any) -> torch.Tensor:
        assert cond is self.unguided
        return mixture_velocity(x.double(), float(t) / 1000).float()


def points(count: int = 300) -> torch.Tensor:
    """Half from the mixture, half spread over the plane."""
    rng = torch.Generator().manual_seed(0)
    pick = torch.randint(4, (count // 2,), generator=rng)
    likely = MEANS[pick] + SPREAD * torch.randn(count // 2, 2, generator=rng).double()
    return torch.cat([likely, 8 * torch.rand(count // 2, 2, generator=rng).double() - 4])


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def test_it_is_the_papers_formula() -> None:
    rng = torch.Generator().manual_seed(1)
    z0, eps = torch.randn(3, 2, generator=rng).double(), torch.randn(3, 4, 2, generator=rng).double()
    sigma, delta = 0.4, 1e-3
    found = self_confidence(mixture_velocity, z0, eps, sigma, delta)
    for b in range(3):
        total = 0.0
        for m in range(4):
            z_t = (1 - sigma) * z0[b] + sigma * eps[b, m]
            v = mixture_velocity(z_t[None], sigma)[0]
            total += float(((v + z0[b] - eps[b, m]) ** 2).mean())
        torch.testing.assert_close(found[b].item(), -math.log(total / 4 + delta))


def test_confidence_rises_with_the_log_density_of_the_base_model() -> None:
    z0 = points()
    eps = probes(Prompt("x"), 0, 8, (2,)).double().expand(len(z0), -1, -1)
    found = self_confidence(mixture_velocity, z0, eps, 0.5)
    assert correlation(found, mixture_log_density(z0)) > 0.6
    shuffled = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    assert abs(correlation(shuffled, mixture_log_density(z0))) < 0.2


def test_its_maximum_can_be_hacked_one_point_beats_the_samples_of_the_base_model() -> None:
    eps = probes(Prompt("x"), 0, 8, (2,)).double()
    likely = points()[:150]
    x = likely[:1].clone().requires_grad_()
    for _ in range(60):
        score = self_confidence(mixture_velocity, x, eps[None], 0.5)
        (slope,) = torch.autograd.grad(score.sum(), x)
        x = (x + 0.02 * slope).detach().requires_grad_()
    samples = self_confidence(mixture_velocity, likely, eps.expand(150, -1, -1), 0.5)
    assert self_confidence(mixture_velocity, x.detach(), eps[None], 0.5).item() > samples.quantile(0.9).item()


def test_probes_come_in_opposite_pairs_and_are_the_same_for_a_group() -> None:
    first = probes(Prompt("a", id=1), 0, 8, (3, 4))
    torch.testing.assert_close(first[:4], -first[4:])
    assert torch.equal(first, probes(Prompt("a", id=1), 0, 8, (3, 4)))
    assert not torch.equal(first, probes(Prompt("a", id=2), 0, 8, (3, 4)))
    assert not torch.equal(first, probes(Prompt("a", id=1), 1, 8, (3, 4)))


def test_a_bound_reward_averages_its_noise_levels_without_guidance() -> None:
    policy, z0 = MixturePolicy(), points(20).float()
    prompts = [Prompt(f"p{i}", id=i) for i in range(20)]
    reward = Solace(sigmas=(0.3, 0.6), call={"height": 8}).bind(policy)
    found = reward(z0, prompts)
    eps = torch.stack([probes(p, 0, 8, (2,)) for p in prompts])
    levels = [self_confidence(mixture_velocity, z0.double(), eps.double(), s) for s in (0.3, 0.6)]
    torch.testing.assert_close(found, torch.stack(levels).mean(0).float(), rtol=1e-4, atol=1e-4)
    assert policy.conditioned == [{"height": 8}]
    alone = torch.cat([reward(z0[i : i + 1], prompts[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_guidance_is_off() -> None:
    policy = MixturePolicy()
    policy.unguided = MixturePolicy()
    with pytest.raises(AssertionError):
        policy.velocity(torch.zeros(1, 2), 500.0, policy)
    Solace().bind(policy)(torch.zeros(1, 2), [Prompt("a")])


def test_unbound_it_says_who_binds_it_and_other_paths_are_refused() -> None:
    with pytest.raises(RecipeError, match="a run binds it"):
        evaluate(Solace(), torch.zeros(1, 2), ["a"])
    with pytest.raises(RecipeError, match="VariancePreserving"):
        Solace().bind(MixturePolicy(VariancePreserving()))


@pytest.mark.parametrize("options", [{"probes": 3}, {"probes": 0}, {"sigmas": ()}, {"sigmas": (0.0, 0.5)}])
def test_odd_probes_and_noise_levels_without_noise_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Solace(**options)
