"""What the papers promise of the reward transforms, on policies of one or two numbers, with the transform left out.

A policy is a Gaussian with a mean per prompt; the gradient of its log-probability is exact and a step takes
microseconds. These are checks of mechanisms at toy scale, not of the papers' numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from alignkit.objectives.advantages import Scale, group_advantages, per_reward_advantages
from alignkit.objectives.buffer import SelectiveBuffer
from alignkit.objectives.pareto import non_dominated
from alignkit.objectives.shaping import log_sigmoid
from alignkit.objectives.win_rates import win_rates

Advantages = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(samples (B, D), groups (B,), rng) -> (B,)."""


def climb(mean: Tensor, advantages: Advantages, steps: int, *, group: int = 8, std: float, lr: float) -> Tensor:
    """(P, D) means after policy gradient steps on samples from N(mean, std)."""
    rng = torch.Generator().manual_seed(0)
    groups = torch.arange(len(mean)).repeat_interleave(group)
    for _ in range(steps):
        samples = mean[groups] + std * normal(len(groups), mean.shape[1], rng)
        weight = advantages(samples, groups, rng)[:, None]
        score = weight * (samples - mean[groups]) / std**2
        mean = mean + lr / group * torch.zeros_like(mean).index_add(0, groups, score)
    return mean


def normal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64)


def start(prompts: int, *position: float) -> Tensor:
    return torch.tensor([position] * prompts, dtype=torch.float64)


def drift(scale: Scale) -> tuple[float, float]:
    """How far prompts with a signal move, and those whose reward is noise alone."""

    def advantages(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
        noise = 0.02 * normal(len(x), 1, rng)[:, 0]
        return group_advantages(torch.where(groups % 2 == 0, x[:, 0], 0.0) + noise, groups, scale)[0]

    mean = climb(start(40, 0.0), advantages, 60, std=1.0, lr=0.05)
    return float(mean[::2].mean()), float(mean[1::2].pow(2).mean().sqrt())


def test_claim_7_dividing_by_a_groups_own_std_trains_on_the_noise_of_flat_groups() -> None:
    learned, noise = drift("group")
    for scale in ("batch", "none"):
        own_learned, own_noise = drift(scale)
        assert own_learned > 0.9 * learned
        assert own_noise < 0.1 * noise


def pointwise(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
    """A compressive reward model with noise, asked as often per sample as the judge of a group of 8 is."""
    noise = 0.2 * normal(len(x), 7, rng).mean(dim=1)
    return group_advantages(torch.tanh(x[:, 0] / 8) + noise, groups)[0]


def pairwise(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
    """Sampled verdicts of a judge, both orders, 56 calls for a group of 8."""
    rates = torch.zeros(len(x), dtype=torch.float64)
    for group in groups.unique():
        gold = x[groups == group, 0]
        rates[groups == group] = win_rates(torch.bernoulli(torch.sigmoid(gold[:, None] - gold[None, :]), generator=rng))
    return group_advantages(rates, groups)[0]


def test_claim_8_win_rates_go_on_where_a_compressive_reward_model_no_longer_tells_samples_apart() -> None:
    gains = [float(climb(start(4, 10.0), way, 100, std=1.0, lr=0.1).mean()) - 10 for way in (pointwise, pairwise)]
    assert gains[1] > 2 * gains[0] > 0


def conflict(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two rewards on scales of 5 and 1: they agree on the second coordinate and pull the first one apart."""
    shared = (x[:, 1] - 1.5) ** 2
    return 5 * (x[:, 0] - shared), -x[:, 0] - shared


def both_good(combine: Callable[[tuple[Tensor, Tensor]], Tensor] | None, weights: tuple[float, float]) -> float:
    """P(both rewards beat the base's 85 % quantile) after training; `combine` None: the sum of log-sigmoids."""
    rng = torch.Generator().manual_seed(1)
    base = conflict(0.7 * normal(4000, 2, rng))
    good, spread = [r.quantile(0.85) for r in base], [float(r.std()) / 4 for r in base]

    def log_sigmoids(rewards: tuple[Tensor, Tensor]) -> Tensor:
        parts = zip(weights, rewards, good, spread, strict=True)
        return torch.stack([w * log_sigmoid(r, g.expand_as(r), s) for w, r, g, s in parts]).sum(dim=0)

    total = combine or log_sigmoids
    mean = climb(start(8, 0.0, 0.0), lambda x, g, _: group_advantages(total(conflict(x)), g)[0], 200, std=0.5, lr=0.02)
    after = conflict(mean[0] + 0.5 * normal(4000, 2, rng))
    return float(((after[0] > good[0]) & (after[1] > good[1])).double().mean())


def test_claim_16_the_sum_of_log_sigmoids_is_a_logical_and_of_conflicting_rewards() -> None:
    equal = (1.0, 1.0)
    assert both_good(None, equal) > 0.4
    assert both_good(lambda rewards: rewards[0] + rewards[1], equal) < 0.05


def test_claim_16_is_more_than_putting_the_rewards_on_one_scale() -> None:
    assert both_good(None, (2.0, 1.0)) > 0.3
    assert both_good(lambda rewards: 2 * rewards[0] / 11.5 + rewards[1] / 2.3, (2.0, 1.0)) < 0.05


def test_claim_17_rewards_on_different_scales_need_to_be_normalised_before_they_are_summed() -> None:
    def rewards(x: Tensor) -> dict[str, Tensor]:
        return {"small": -((x[:, 0] - 2) ** 2), "large": -100 * (x[:, 1] - 2) ** 2}

    def summed(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
        return group_advantages(sum(rewards(x).values(), torch.zeros(len(x))), groups)[0]

    def normalised(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
        return per_reward_advantages(rewards(x), {"small": 1.0, "large": 1.0}, groups)[0]

    raw, balanced = (climb(start(8, 0.0, 0.0), way, 50, std=0.5, lr=0.02).mean(dim=0) for way in (summed, normalised))
    assert raw[0] < 0.2 < 1.5 < raw[1]
    assert balanced.min() > 1.0


CORNERS = torch.tensor([[0.0, 2.0], [-1.7, -1.0], [1.7, -1.0]], dtype=torch.float64)
SCALES = torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64)


def three(x: Tensor) -> Tensor:
    """(B, 3) rewards, each best in its own corner; the first on ten times the scale."""
    return SCALES * torch.exp(-((x[:, None] - CORNERS) ** 2).sum(dim=-1) / 8)


def weighted_sum(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
    return group_advantages(three(x).sum(dim=1), groups)[0]


def membership(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
    """What `advantage="pareto"` does: being in the set is the reward."""
    return group_advantages(non_dominated(three(x), groups).double(), groups)[0]


def parrot(x: Tensor, groups: Tensor, rng: torch.Generator) -> Tensor:
    """The paper's: the reward that was drawn for a sample, raw, for the samples in the set, over the set's size."""
    drawn = torch.randint(3, (len(x), 1), generator=rng)
    kept = non_dominated(three(x), groups)
    size = torch.zeros(len(groups.unique()), dtype=torch.float64).index_add(0, groups, kept.double())[groups]
    return torch.where(kept, (three(x) / SCALES).gather(1, drawn)[:, 0], 0.0) / size * 16


@pytest.mark.parametrize("way", [membership, parrot])
def test_claim_18_reinforcing_the_non_dominated_improves_the_worst_reward_over_the_weighted_sum(
    way: Advantages,
) -> None:
    ours, theirs = (
        (three(climb(start(8, 0.0, 0.0), w, 200, group=16, std=0.5, lr=0.03)) / SCALES).mean(dim=0)
        for w in (way, weighted_sum)
    )
    assert theirs.min() < 0.3 and theirs.max() > 0.95
    assert ours.min() > 0.5


def sparse(buffered: bool, seed: int) -> tuple[float, float]:
    """Share of a round's groups that train something, and the final probability of success, with a box as reward."""
    rng = torch.Generator().manual_seed(seed)
    mean, groups = start(8, 0.0), torch.arange(8).repeat_interleave(8)
    buffer: SelectiveBuffer[tuple[int, Tensor, Tensor, Tensor]] = SelectiveBuffer(capacity=64, rounds=4)
    shares = []
    for step in range(60):
        x = mean[groups] + normal(64, 1, rng)
        advantage, live = group_advantages(((x[:, 0] - 2.5).abs() < 0.3).double(), groups)
        own = [p for p in range(8) if bool(live[groups == p].any())]
        used = [(p, x[groups == p], advantage[groups == p], mean[p]) for p in own]
        if buffered:
            fresh = list(used)
            used = used + [k.item for k in buffer.draw(8 - len(own), step, rng)]
            buffer.add(fresh, [float(item[2].abs().mean()) for item in fresh], step)
        shares.append(len(used) / 8)
        mean = mean + 0.03 / 8 * clipped_gradient(mean, used)
    reach = Normal(mean[:, 0], 1.0)
    success = reach.cdf(torch.tensor(2.8, dtype=torch.float64)) - reach.cdf(torch.tensor(2.2, dtype=torch.float64))
    return sum(shares[5:]) / len(shares[5:]), float(success.mean())


def clipped_gradient(mean: Tensor, used: list[tuple[int, Tensor, Tensor, Tensor]]) -> Tensor:
    """PPO's gradient with clip 0.2; the ratio is to the mean each group was sampled with."""
    total = torch.zeros_like(mean)
    for prompt, x, advantage, old in used:
        ratio = (((x - old) ** 2 - (x - mean[prompt]) ** 2)[:, 0] / 2).exp()
        inside = ~(((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8)))
        total[prompt] += (advantage * ratio * inside) @ (x - mean[prompt])
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_34_the_buffer_keeps_rounds_of_a_sparse_reward_alive_and_learns_more_from_them(seed: int) -> None:
    with_buffer, success = sparse(True, seed)
    without, plain = sparse(False, seed)
    assert without < 0.2 and with_buffer > 0.6
    assert success > 2 * plain


def test_claim_40_one_order_is_biased_by_position_and_two_orders_are_not() -> None:
    rng = torch.Generator().manual_seed(0)
    single, double = [], []
    for _ in range(400):
        gold = torch.randn(8, generator=rng, dtype=torch.float64)
        truth = torch.sigmoid(gold[:, None] - gold[None, :]).fill_diagonal_(0.0)
        verdicts = torch.bernoulli((truth + 0.1).clamp(0, 1), generator=rng).fill_diagonal_(0.5)
        upper = verdicts.triu(1)  # asked once per pair, the earlier sample first
        one_order = (upper + (1 - upper.T).tril(-1)).sum(dim=1) / 7
        single.append(one_order - truth.sum(dim=1) / 7)
        double.append(win_rates(verdicts) - truth.sum(dim=1) / 7)
    bias_single, bias_double = torch.stack(single).mean(dim=0), torch.stack(double).mean(dim=0)
    assert bias_single[0] > 0.07 and bias_single[-1] < -0.07
    assert bias_double.abs().max() < 0.02
