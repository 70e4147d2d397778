"""What claim 15 measures, and how it judges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recipes.mixture import claims_particles
from recipes.mixture.claims_particles import BASELINES, BUDGET, SECTORS, coverage
from recipes.mixture.world import CORNERS


def around(mode: int, directions: int) -> torch.Tensor:
    """One point in each of the first so many directions of a mode."""
    angle = 2.0 * math.pi * (torch.arange(directions) + 0.5) / SECTORS
    return torch.tensor(CORNERS[mode]) + 0.3 * torch.stack([angle.cos(), angle.sin()], dim=-1)


def test_coverage_is_the_share_of_modes_and_directions_that_are_used_alike() -> None:
    everywhere = torch.cat([around(mode, SECTORS) for mode in range(4)])
    assert_close(coverage(everywhere), 1.0)
    assert_close(coverage(around(2, SECTORS)), 0.25)
    assert_close(coverage(around(1, 1)), 1 / 32)


def test_every_arm_spends_the_denoiser_calls_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_particles, "PROMPTS", 3)
    for arm in claims_particles.arms():
        row = claims_particles._drawn("ring", arm, 0)[0]
        assert row["calls"] == (1 if arm == "unguided" else BUDGET)


@pytest.mark.parametrize(
    ("reward", "covered", "verdict"),
    [(0.9, 0.8, "ahead"), (0.9, 0.9, "ahead"), (0.9, 0.5, "a trade"), (0.8, 0.9, "a trade"), (0.8, 0.8, "behind")],
)
def test_a_method_is_ahead_with_more_reward_and_no_less_coverage(reward: float, covered: float, verdict: str) -> None:
    def rows(arm: str, reward: float, covered: float) -> list[dict[str, Any]]:
        return [
            {"reward_name": "ring", "arm": arm, "reward": reward + s / 1000, "coverage": covered - s / 1000}
            for s in range(3)
        ]

    every = [row for name in BASELINES for row in rows(name, 0.8, 0.8)] + rows("fk 10", reward, covered)
    assert claims_particles._against_baselines(every, "ring", "fk 10") == verdict
