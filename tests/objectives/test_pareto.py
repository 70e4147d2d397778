from __future__ import annotations

import pytest
import torch

from alignkit.errors import AlignkitError
from alignkit.objectives.pareto import non_dominated


def written_out(rewards: torch.Tensor, groups: torch.Tensor) -> list[bool]:
    """Parrot's set, sample by sample: keep i if no j has all(R_j >= R_i) and any(R_j > R_i)."""
    kept = []
    for i in range(len(rewards)):
        others = [j for j in range(len(rewards)) if groups[j] == groups[i] and j != i]
        kept.append(not any(bool((rewards[j] >= rewards[i]).all() and (rewards[j] > rewards[i]).any()) for j in others))
    return kept


@pytest.mark.parametrize("rewards_count", [1, 2, 3])
def test_the_set_is_parrots_within_each_group(rewards_count: int) -> None:
    rng = torch.Generator().manual_seed(rewards_count)
    rewards = torch.randint(0, 4, (30, rewards_count), generator=rng).double()
    groups = torch.randint(0, 3, (30,), generator=rng)
    assert non_dominated(rewards, groups).tolist() == written_out(rewards, groups)
    assert non_dominated(rewards).tolist() == written_out(rewards, torch.zeros(30, dtype=torch.int64))


def test_one_reward_keeps_only_the_best_and_equal_samples_are_all_kept() -> None:
    assert non_dominated(torch.tensor([[0.1], [0.9], [0.9], [0.5]])).tolist() == [False, True, True, False]


def test_scales_do_not_matter() -> None:
    rewards = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(non_dominated(rewards), non_dominated(rewards * torch.tensor([1e4, 1.0, 1e-4])))


def test_a_sample_without_a_score_is_left_out_and_dominates_nothing() -> None:
    rewards = torch.tensor([[9.0, float("nan")], [1.0, 1.0], [0.0, 0.0]])
    assert non_dominated(rewards).tolist() == [False, True, False]


def test_rewards_that_are_no_table_are_refused() -> None:
    with pytest.raises(AlignkitError, match=r"\(N, K\)"):
        non_dominated(torch.zeros(3))
