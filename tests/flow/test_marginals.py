"""Which samplers keep the marginal: a 1-D mixture of two Gaussians (modes +-2, sd 0.35) with the exact
velocity."""

from __future__ import annotations

import pytest
import torch

from alignkit.flow import plan as plans
from alignkit.flow.path import Path, RectifiedFlow, VariancePreserving, velocity_from_x0_eps
from alignkit.flow.transition import ODE, Noise

MODE, DEVIATION = 2.0, 0.35
RF, VP = RectifiedFlow(), VariancePreserving()


def exact_velocity(path: Path, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The marginal velocity alpha_dot E[x0 | x] + E[eps | x] of the mixture; x (B,)."""
    alpha = float(path.alpha(sigma))
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    right = torch.sigmoid(2 * alpha * MODE * x / variance)  # posterior of the right mode
    mean = MODE * (2 * right - 1)
    x0 = mean + alpha * DEVIATION**2 / variance * (x - alpha * mean)
    return velocity_from_x0_eps(path, x0, (x - alpha * x0) / sigma, sigma)


def endpoints(path: Path, noise: Noise, num_steps: int, count: int = 20000) -> tuple[float, float, float]:
    """Mass of the right mode, mean and sd within the modes (folded onto one) of `count` samples."""
    rng = torch.Generator().manual_seed(0)
    first = 1.0 if isinstance(path, RectifiedFlow) else 0.9999
    sigmas = torch.linspace(first, 0.0, num_steps + 1, dtype=torch.float64).tolist()
    plan = plans.deterministic(num_steps) if noise == ODE else plans.full(num_steps, noise)
    x = torch.randn(count, generator=rng, dtype=torch.float64)
    for k in range(num_steps):
        v = exact_velocity(path, x, sigmas[k])
        x = plan.noise_at(k).build(path, x, v, sigmas[k], sigmas[k + 1], sigmas[1]).sample(rng)
    folded = x.abs()
    return float((x > 0).double().mean()), float(folded.mean()), float(folded.std())


@pytest.mark.parametrize(
    "path, noise",
    [
        (RF, ODE),
        (RF, Noise("flow_sde", 0.7)),
        (RF, Noise("dance_sde", 0.3)),
        (VP, ODE),
        (VP, Noise("ddim", 1.0)),
        (VP, Noise("dance_sde", 0.3)),
    ],
)
def test_these_samplers_keep_the_marginal_as_steps_grow(path, noise):
    mass, mean, deviation = endpoints(path, noise, 200)
    assert abs(mass - 0.5) < 0.015
    assert abs(mean - MODE) < 0.02
    assert abs(deviation / DEVIATION - 1) < 0.05


@pytest.mark.parametrize("num_steps", [10, 200])
def test_cps_is_under_dispersed_at_any_number_of_steps(num_steps):
    mass, mean, deviation = endpoints(RF, Noise("cps", 0.8), num_steps)
    assert abs(mass - 0.5) < 0.015
    assert abs(mean - MODE) < 0.06
    assert 0.7 < deviation / DEVIATION < 0.85


def test_the_ode_converges_at_first_order():
    # Halving the step halves the error at the endpoint of fixed starting points.
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def run(num_steps: int) -> torch.Tensor:
        sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64).tolist()
        x = start
        for k in range(num_steps):
            v = exact_velocity(RF, x, sigmas[k])
            x = ODE.build(RF, x, v, sigmas[k], sigmas[k + 1], sigmas[1]).mean
        return x

    limit = run(1600)
    errors = [float((run(n) - limit).abs().mean()) for n in (100, 200, 400)]
    assert 1.7 < errors[0] / errors[1] < 2.5
    assert 1.7 < errors[1] / errors[2] < 2.5
