"""Guidance by gradients on real diffusers pipelines with random weights: rectified flow, epsilon, video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import alignkit
from alignkit.flow.guidance import Strength
from alignkit.flow.path import eps_from_velocity
from alignkit.flow.plan import deterministic
from alignkit.inference.gradients import DPS, NRG
from alignkit.inference.method import BestOfN
from alignkit.inference.steering import noisy_reward_steering
from alignkit.policy import Policy
from alignkit.policy.adapters import denoisers
from alignkit.types import Prompt, Step
from tests.policy.test_untouched import portrait
from tests.policy.zoo import PROMPTS, ZOO, shared

GUIDED = ("sd3", "sd15", "wan_t2v")


class Bright:
    """Mean pixel."""

    name, differentiable = "bright", True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return media.flatten(1).mean(1)


def low(latents: Tensor, sigma: Tensor, cond: Any) -> Tensor:
    """Minus the mean of the latents."""
    return -latents.flatten(1).mean(1)


low.noise_aware = True


def guide(name: str, reward: Any, method: Any, budget: float = 1.0) -> Any:
    options: dict[str, Any] = {"num_steps": 4, **ZOO[name].call}
    rng = torch.Generator().manual_seed(0)
    return alignkit.guide(shared(name), PROMPTS, reward, method, budget, rng, **options)


@pytest.mark.parametrize("name", GUIDED)
def test_a_pipeline_is_steered_to_what_a_noise_aware_reward_prefers(name: str) -> None:
    plain = guide(name, low, BestOfN())
    guided = guide(name, low, NRG(weight=300.0))
    assert bool((guided.rewards > plain.rewards + 0.01).all())
    assert_close(guide(name, low, NRG(weight=300.0, gradient_batch=1)).latents, guided.latents, rtol=1e-4, atol=1e-4)
    capped = guide(name, low, NRG(weight=300.0, clip=0.01))
    assert all(step["change"] <= 0.0101 for step in capped.trace["guidance"])


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("through", ["x0", "denoiser"])
def test_a_pipeline_is_steered_to_what_the_clean_reward_prefers(name: str, through: Any) -> None:
    reward = Bright("video" if ZOO[name].video else "image")
    before = portrait(shared(name))
    plain = guide(name, reward, BestOfN())
    guided = guide(name, reward, DPS(weight=0.3, normalise=True, through=through), budget=2.0)
    assert bool((guided.rewards > plain.rewards).all())
    after = portrait(shared(name))
    assert [key for key in before | after if before.get(key) != after.get(key)] == []


def test_recomputing_activations_gives_the_same_samples_and_is_switched_off_again() -> None:
    options = {"weight": 100.0, "through": "denoiser"}
    kept = guide("sd3", Bright("image"), DPS(**options), budget=2.0)
    again = guide("sd3", Bright("image"), DPS(**options, checkpointing=True), budget=2.0)
    assert_close(again.latents, kept.latents)
    assert not any(module.is_gradient_checkpointing for module in denoisers(shared("sd3")).values())


def test_what_a_real_epsilon_model_predicts_is_guided_by_minus_sigma_times_the_gradient() -> None:
    with Policy(shared("sd15")) as policy:
        cond = policy.condition(PROMPTS, num_steps=4, **ZOO["sd15"].call)
        assert policy.prediction == "epsilon"
        steer = noisy_reward_steering(
            lambda x, sigma, own: -10.0 * x.flatten(1).square().sum(1), cond, policy.path, 4, Strength(0.5)
        )
        changes: list[Tensor] = []

        def watched(step: Step) -> Step:
            after = steer(step)
            eps = [eps_from_velocity(policy.path, one.velocity, step.latents, step.sigma) for one in (step, after)]
            changes.append(eps[1] - eps[0] - 0.5 * step.sigma * 20.0 * step.latents)
            return step

        policy.rollout(cond, deterministic(4), torch.Generator().manual_seed(0), steer=watched)
    assert len(changes) == 4
    assert_close(torch.stack(changes), torch.zeros_like(torch.stack(changes)), rtol=0.0, atol=1e-3)
