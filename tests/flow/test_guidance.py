from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from alignkit.flow import guidance, path
from alignkit.flow.path import RectifiedFlow, VariancePreserving


def tensors(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(count)]


def test_classifier_free_guidance_extrapolates_from_the_unconditional_velocity():
    uncond, cond = tensors(2)
    assert_close(guidance.classifier_free(uncond, cond, 4.5), uncond + 4.5 * (cond - uncond))
    assert_close(guidance.classifier_free(uncond, cond, 1.0), cond)
    scales = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    mixed = guidance.classifier_free(uncond, cond, scales)
    assert_close(mixed[0], uncond[0])
    assert_close(mixed[2], 2 * cond[2] - uncond[2])


def test_rectified_flow_guidance_has_flow_nrgs_factor():
    v, gradient = tensors(2)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    literal = v - 2.0 * (t / (1 - t))[:, None, None] * gradient
    assert_close(guidance.with_score_gradient(RectifiedFlow(), v, gradient, t, 2.0), literal)


@pytest.mark.parametrize("which", [RectifiedFlow(), VariancePreserving()])
def test_the_guided_velocity_has_the_score_plus_the_weighted_gradient(which):
    x, v, gradient = tensors(3)
    guided = guidance.with_score_gradient(which, v, gradient, 0.6, 1.7)
    before = path.score_from_velocity(which, v, x, 0.6)
    after = path.score_from_velocity(which, guided, x, 0.6)
    assert_close(after, before + 1.7 * gradient)


def test_epsilon_guidance_of_a_variance_preserving_model_is_the_published_one():
    x, eps, gradient = tensors(3)
    which, sigma = VariancePreserving(), 0.6
    v = path.velocity_from(which, "epsilon", eps, x, sigma)
    guided = guidance.with_score_gradient(which, v, gradient, sigma, 1.0)
    assert_close(path.eps_from_velocity(which, guided, x, sigma), eps - sigma * gradient)


def test_the_singular_step_is_left_unguided_and_stays_finite():
    v, gradient = tensors(2)
    sigma = torch.tensor([1.0, 0.95, 0.5], dtype=torch.float64)
    assert_close(guidance.with_score_gradient(RectifiedFlow(), v, gradient, sigma, 3.0)[0], v[0])
    guided = guidance.with_score_gradient(RectifiedFlow(), v, gradient, sigma, 3.0, sigma_singular=0.95)
    assert_close(guided[:2], v[:2])
    assert (guided[2] - v[2]).abs().max() > 0.1
