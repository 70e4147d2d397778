from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.flow import path as paths
from alignkit.flow.path import RectifiedFlow, VariancePreserving

PATHS = [RectifiedFlow(), VariancePreserving()]
SIGMAS = torch.tensor([0.05, 0.3, 0.7, 0.97], dtype=torch.float64)


def pair(shape=(4, 3, 2), dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=dtype), torch.randn(shape, generator=rng, dtype=dtype)


@pytest.mark.parametrize("path", PATHS)
def test_alpha_dot_is_the_derivative_of_alpha(path):
    sigma = SIGMAS.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(path.alpha(sigma).sum(), sigma)
    assert_close(path.alpha_dot(SIGMAS), slope)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_of_the_noised_latents(path):
    x0, eps = pair()
    step = 1e-6
    above, below = (paths.noise(path, x0, eps, SIGMAS + sign * step) for sign in (1, -1))
    velocity = (above - below) / (2 * step)
    assert_close(paths.velocity_from_x0_eps(path, x0, eps, SIGMAS), velocity, atol=1e-6, rtol=0)


def test_rectified_flow_conversions_are_the_published_ones():
    x, v = pair()
    t = SIGMAS[:, None, None]
    path = RectifiedFlow()
    assert_close(paths.x0_from_velocity(path, v, x, SIGMAS), x - t * v)
    assert_close(paths.eps_from_velocity(path, v, x, SIGMAS), x + (1 - t) * v)
    assert_close(paths.score_from_velocity(path, v, x, SIGMAS), -(x + (1 - t) * v) / t)


def test_variance_preserving_conversions_are_the_published_ones():
    x, output = pair()
    sigma = SIGMAS[:, None, None]
    alpha = (1 - sigma**2).sqrt()
    path = VariancePreserving()
    x0, eps = paths.x0_eps_from(path, "epsilon", output, x, SIGMAS)
    assert_close(x0, (x - sigma * output) / alpha)
    assert_close(eps, output)
    x0, eps = paths.x0_eps_from(path, "v_prediction", output, x, SIGMAS)
    assert_close(x0, alpha * x - sigma * output)
    assert_close(eps, sigma * x + alpha * output)
    velocity = paths.velocity_from(path, "epsilon", output, x, SIGMAS)
    assert_close(paths.score_from_velocity(path, velocity, x, SIGMAS), -output / sigma)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_every_prediction_of_the_same_pair_is_the_same_velocity(path, prediction):
    x0, eps = pair()
    sigma = SIGMAS[:, None, None]
    x = paths.noise(path, x0, eps, SIGMAS)
    velocity = paths.velocity_from_x0_eps(path, x0, eps, SIGMAS)
    alpha = path.alpha(SIGMAS)[:, None, None]
    outputs = {"velocity": velocity, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
    assert_close(paths.velocity_from(path, prediction, outputs[prediction], x, SIGMAS), velocity)
    found_x0, found_eps = paths.x0_eps_from(path, prediction, outputs[prediction], x, SIGMAS)
    assert_close(found_x0, x0)
    assert_close(found_eps, eps)
    assert_close(paths.x0_from_velocity(path, velocity, x, SIGMAS), x0)
    assert_close(paths.eps_from_velocity(path, velocity, x, SIGMAS), eps)


def test_the_score_is_that_of_the_marginal():
    # x0 ~ N(m, d^2): p_sigma = N(alpha m, alpha^2 d^2 + sigma^2), and the exact velocity is linear in x.
    mean, deviation = 0.8, 0.5
    x, _ = pair()
    for path in PATHS:
        alpha, sigma = path.alpha(SIGMAS)[:, None, None], SIGMAS[:, None, None]
        variance = alpha**2 * deviation**2 + sigma**2
        x0 = mean + alpha * deviation**2 * (x - alpha * mean) / variance
        eps = sigma * (x - alpha * mean) / variance
        v = paths.velocity_from_x0_eps(path, x0, eps, SIGMAS)
        assert_close(paths.score_from_velocity(path, v, x, SIGMAS), -(x - alpha * mean) / variance)


def test_zero_terminal_signal_keeps_a_finite_and_accurate_velocity():
    x, output = pair(dtype=torch.float32)
    path = VariancePreserving()
    v = paths.velocity_from(path, "v_prediction", output, x, 1.0)
    assert v.isfinite().all()
    assert_close(paths.x0_from_velocity(path, v, x, 1.0), -output, atol=1e-4, rtol=0)
    assert_close(paths.eps_from_velocity(path, v, x, 1.0), x, atol=1e-4, rtol=0)


def test_half_precision_inputs_are_computed_in_float32():
    x0, eps = pair(dtype=torch.bfloat16)
    found = paths.noise(RectifiedFlow(), x0, eps, SIGMAS)
    assert found.dtype == torch.float32
    assert_close(found, paths.noise(RectifiedFlow(), x0.float(), eps.float(), SIGMAS))


def test_a_float_a_scalar_and_a_batch_of_sigmas_agree():
    x0, eps = pair()
    want = 0.7 * x0 + 0.3 * eps
    for sigma in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)):
        assert_close(paths.noise(RectifiedFlow(), x0, eps, sigma), want)


def test_per_sample_coefficients_never_broadcast_over_the_batch():
    x = torch.zeros(4, 1, 1, 1)
    assert paths.expand_to(torch.arange(4.0), x).shape == (4, 1, 1, 1)
    assert (paths.expand_to(torch.arange(4.0), x) * x).shape == x.shape


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 2, 2, 2, 2)])
def test_a_coefficient_that_does_not_fit_is_refused(shape):
    with pytest.raises(RecipeError, match="does not fit latents"):
        paths.expand_to(torch.zeros(shape), torch.zeros(4, 3, 2, 2))


def test_logit_normal_times_have_the_asked_logits():
    times = paths.logit_normal(20000, 0.4, 1.5, torch.Generator().manual_seed(0))
    assert_close(times.logit().mean(), torch.tensor(0.4), atol=0.04, rtol=0)
    assert_close(times.logit().std(), torch.tensor(1.5), atol=0.04, rtol=0)
    assert times.min() > 0 and times.max() < 1


def test_shift_moves_levels_towards_noise_and_keeps_the_ends():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = paths.shift_sigma(sigma, 3.0)
    assert_close(shifted, 3 * sigma / (1 + 2 * sigma))
    assert (shifted[1:-1] > sigma[1:-1]).all()
    assert_close(shifted[[0, -1]], sigma[[0, -1]])


def test_an_unknown_prediction_names_the_known_ones():
    with pytest.raises(RecipeError, match="v_prediction"):
        paths.velocity_from(RectifiedFlow(), "eps", torch.zeros(1, 2), torch.zeros(1, 2), 0.5)  # pyright: ignore
