from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import RecipeError
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


def test_v_prediction_guidance_of_a_variance_preserving_model_is_the_epsilon_one():
    x, output, gradient = tensors(3)
    which, sigma, alpha, weight = VariancePreserving(), 0.6, 0.8, 1.7
    eps = sigma * x + alpha * output - weight * sigma * gradient
    x0 = (x - sigma * eps) / alpha
    v = path.velocity_from(which, "v_prediction", output, x, sigma)
    guided = guidance.with_score_gradient(which, v, gradient, sigma, weight)
    assert_close(guided, path.velocity_from(which, "v_prediction", alpha * eps - sigma * x0, x, sigma))


def test_a_normalised_change_has_the_norm_of_the_velocity_and_its_own_direction():
    change, v = tensors(2)
    change[1] = 0.0
    bounded = guidance.normalised(1e-6 * change, v)
    for i in (0, 2):
        assert_close(bounded[i], change[i] / change[i].norm() * v[i].norm())
    assert (bounded[1] == 0).all()


def test_a_clip_shortens_what_is_too_long_sample_by_sample_and_leaves_the_rest():
    change, v = tensors(2)
    change[0] = 100 * v[0]
    change[1] = 0.01 * v[1]
    bounded = guidance.clipped(change, v, 0.5)
    assert_close(bounded[0], 0.5 * v[0])
    assert (bounded[1] == change[1]).all()


def test_schedules_are_ramps_between_the_first_and_the_last_guided_share():
    shares = [0.0, 0.1, 0.5, 0.9]
    assert [guidance.scheduled("constant", p, 0.1, 0.9) for p in shares] == [0.0, 1.0, 1.0, 0.0]
    assert [guidance.scheduled("rising", p, 0.1, 0.9) for p in shares] == [0.0, 0.0, pytest.approx(0.5), 0.0]
    assert [guidance.scheduled("falling", p, 0.1, 0.9) for p in shares] == [0.0, 1.0, pytest.approx(0.5), 0.0]


def test_a_strength_says_the_weight_of_a_step_and_bounds_the_change():
    v, gradient = tensors(2)
    strength = guidance.Strength(weight=3.0, start=0.2, clip=0.1)
    assert strength.at(1, 10, 0.5) == 0.0
    assert strength.at(2, 10, 0.5) == 3.0
    assert strength.at(2, 10, 0.9995) == 0.0
    change = strength.guided(RectifiedFlow(), v, gradient, 0.9, 3.0) - v
    assert_close(guidance.norms(change), 0.1 * guidance.norms(v))
    plain = guidance.Strength(weight=3.0).guided(RectifiedFlow(), v, gradient, 0.9, 3.0)
    assert_close(plain, v - 3.0 * 0.9 / (1 - 0.9) * gradient)
    normal = guidance.Strength(weight=3.0, normalise=True).guided(RectifiedFlow(), v, gradient, 0.9, 3.0)
    assert_close(guidance.norms(normal - v), 3.0 * guidance.norms(v))


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": float("inf")},
        {"start": 0.5, "stop": 0.5},
        {"stop": 1.5},
        {"clip": 0.0},
        {"sigma_singular": 1.5},
        {"schedule": "cosine"},
    ],
)
def test_a_strength_that_cannot_be_is_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        guidance.Strength(**wrong)


@pytest.mark.parametrize("which", [RectifiedFlow(), VariancePreserving()])
def test_posterior_spread_and_slope_are_those_of_data_of_unit_variance(which):
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha = which.alpha(sigma)
    gain = alpha / (alpha**2 + sigma**2)  # regression of x0 on alpha x0 + sigma eps, Var x0 = 1
    assert_close(guidance.posterior_slope(which, sigma), gain)
    assert_close(guidance.posterior_std(which, sigma) ** 2, 1 - gain * alpha)


@pytest.mark.parametrize("which", [RectifiedFlow(), VariancePreserving()])
def test_a_velocity_with_a_changed_clean_estimate_has_it_and_the_published_epsilon(which):
    x, v, change = tensors(3)
    changed = guidance.with_x0_change(which, v, change, 0.6)
    x0 = path.x0_from_velocity(which, v, x, 0.6)
    assert_close(path.x0_from_velocity(which, changed, x, 0.6), x0 + change)
    eps = path.eps_from_velocity(which, v, x, 0.6)
    literal = eps - which.alpha(0.6) / 0.6 * change
    assert_close(path.eps_from_velocity(which, changed, x, 0.6), literal)
