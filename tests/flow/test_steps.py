"""Every step against a literal transcription of methods in the literature (Flow-GRPO's and DanceGRPO's code,
...)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.flow import path as paths
from alignkit.flow.path import RectifiedFlow, VariancePreserving
from alignkit.flow.transition import ODE, TRANSITIONS, Noise

RF, VP = RectifiedFlow(), VariancePreserving()
STEPS = [(1.0, 0.9), (0.9, 0.7), (0.35, 0.3), (0.2, 0.05)]
SIGMA_MAX = 0.94


def latents(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, 4, generator=rng, dtype=torch.float64) for _ in range(2))


def flow_sde_of_flow_grpo(x, v, sigma, sigma_next, level):
    """Transcribed from flow_grpo's sde_step_with_logprob."""
    dt = sigma_next - sigma
    std_dev_t = math.sqrt(sigma / (1 - (SIGMA_MAX if sigma == 1 else sigma))) * level
    mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std_dev_t * math.sqrt(-dt)


def dance_sde_of_dance_grpo(x, v, sigma, sigma_next, level):
    """Transcribed from DanceGRPO's flux_step."""
    dsigma = sigma_next - sigma
    mean = x + dsigma * v
    pred_original_sample = x - sigma * v
    score = -(x - pred_original_sample * (1 - sigma)) / sigma**2
    return mean - 0.5 * level**2 * score * dsigma, level * math.sqrt(sigma - sigma_next)


def cps_of_flow_cps(x, v, sigma, sigma_next, level):
    """Transcribed from Flow-CPS (2509.05952)."""
    s = sigma_next * math.sin(level * math.pi / 2)
    x0, x1 = x - sigma * v, x + v * (1 - sigma)
    return x0 * (1 - sigma_next) + x1 * math.sqrt(sigma_next**2 - s**2), s


def stepwise_flow_grpo(x, v, sigma, sigma_next, level):
    s = level * sigma_next * math.sqrt(1 - sigma)
    x0, x1 = x - sigma * v, x + v * (1 - sigma)
    return x0 * (1 - sigma_next) + x1 * math.sqrt(sigma_next**2 - s**2), s


LITERAL = {
    "flow_sde": (flow_sde_of_flow_grpo, 0.7),
    "dance_sde": (dance_sde_of_dance_grpo, 0.3),
    "cps": (cps_of_flow_cps, 0.8),
    "stepwise": (stepwise_flow_grpo, 0.9),
}


@pytest.mark.parametrize("kind", LITERAL)
@pytest.mark.parametrize("sigma, sigma_next", STEPS)
def test_rectified_flow_steps_equal_the_published_code(kind, sigma, sigma_next):
    x, v = latents()
    literal, level = LITERAL[kind]
    mean, std = literal(x, v, sigma, sigma_next, level)
    transition = Noise(kind, level).build(RF, x, v, sigma, sigma_next, SIGMA_MAX)
    assert_close(transition.mean, mean)
    assert_close(float(transition.std), std)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma, sigma_next", STEPS[1:])
def test_ddim_of_a_variance_preserving_model_equals_the_paper(eta, sigma, sigma_next):
    x, eps = latents()
    a_t, a_next = 1 - sigma**2, 1 - sigma_next**2  # the paper's alphas: squares of ours
    std = eta * math.sqrt((1 - a_next) / (1 - a_t) * (1 - a_t / a_next))
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    mean = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - std**2) * eps
    v = paths.velocity_from(VP, "epsilon", eps, x, sigma)
    transition = Noise("ddim", eta).build(VP, x, v, sigma, sigma_next, SIGMA_MAX)
    assert_close(transition.mean, mean)
    assert_close(float(transition.std), std)


def test_the_sdes_of_a_variance_preserving_model_follow_the_score():
    x, v = latents()
    sigma, sigma_next = 0.6, 0.5
    ode = ODE.build(VP, x, v, sigma, sigma_next, SIGMA_MAX)
    score = paths.score_from_velocity(VP, v, x, sigma)
    for kind, g_squared in (("dance_sde", 0.25), ("flow_sde", 0.25 * sigma / (1 - sigma**2))):
        transition = Noise(kind, 0.5).build(VP, x, v, sigma, sigma_next, SIGMA_MAX)
        assert_close(transition.mean, ode.mean - 0.5 * g_squared * score * (sigma_next - sigma))
        assert_close(float(transition.std), math.sqrt(g_squared * (sigma - sigma_next)))


@pytest.mark.parametrize("path", [RF, VP])
@pytest.mark.parametrize("kind", TRANSITIONS)
def test_level_zero_of_every_kind_is_the_ode(path, kind):
    x, v = latents()
    for sigma, sigma_next in STEPS[1:]:
        transition = Noise(kind, 0.0).build(path, x, v, sigma, sigma_next, SIGMA_MAX)
        x0 = paths.x0_from_velocity(path, v, x, sigma)
        eps = paths.eps_from_velocity(path, v, x, sigma)
        assert_close(transition.mean, path.alpha(sigma_next) * x0 + sigma_next * eps)
        assert float(transition.std) == 0.0


def test_the_ode_of_rectified_flow_is_an_euler_step_and_lands_on_x0():
    x, v = latents()
    assert_close(ODE.build(RF, x, v, 0.8, 0.5, 1.0).mean, x + (0.5 - 0.8) * v)
    assert_close(ODE.build(RF, x, v, 0.8, 0.0, 1.0).mean, x - 0.8 * v)


def test_the_first_step_is_guarded_by_the_argument_and_not_by_equality_with_one():
    x, v = latents()
    noise = Noise("flow_sde", 0.7)
    first = noise.build(RF, x, v, 1.0, 0.9, sigma_max=0.9)
    almost = noise.build(RF, x, v, 0.9999, 0.9, sigma_max=0.9)
    assert_close(first.std, almost.std, rtol=1e-3, atol=0)
    assert_close(first.mean, almost.mean, rtol=0, atol=1e-2)
    # From the second step on the guard changes nothing.
    second = noise.build(RF, x, v, 0.9, 0.8, sigma_max=0.9)
    assert_close(second.mean, noise.build(RF, x, v, 0.9, 0.8, sigma_max=1.0).mean)


def test_a_batch_of_different_steps_equals_each_step_alone():
    x, v = latents()
    sigma, after = torch.tensor([1.0, 0.4]), torch.tensor([0.9, 0.3])
    for kind, (_, level) in LITERAL.items():
        noise = Noise(kind, level)
        both = noise.build(RF, x, v, sigma, after, SIGMA_MAX)
        for i in range(2):
            alone = noise.build(RF, x[i : i + 1], v[i : i + 1], sigma[i], after[i], SIGMA_MAX)
            assert_close(both.mean[i : i + 1], alone.mean)
            assert_close(both.std[i], alone.std)


def test_a_step_towards_noise_is_refused():
    x, v = latents()
    with pytest.raises(RecipeError, match="towards data"):
        ODE.build(RF, x, v, 0.5, 0.6, 1.0)


def test_more_noise_than_the_next_level_holds_is_refused():
    x, v = latents()
    with pytest.raises(RecipeError, match="more noise than sigma_next holds"):
        Noise("ddim", 1.0).build(RF, x, v, 0.5, 0.4, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("flow_sd", 0.7), "nearest: 'flow_sde'"),
        (("flow_sde", -0.1), "at least 0"),
        (("flow_sde", math.nan), "at least 0"),
        (("ode", 0.7), "use level=0"),
        (("cps", 1.2), r"outside \[0, 1\]"),
        (("flow_sde", 0.7, False), "scoring of 'cps' only"),
    ],
)
def test_impossible_noise_is_refused_with_a_reason(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Noise(*arguments)
