from __future__ import annotations

import torch
from torch.testing import assert_close

from alignkit.flow.path import RectifiedFlow
from alignkit.flow.transition import Noise
from alignkit.objectives.kl import kl_divergence


def test_the_named_forms_differ_by_the_known_factors():
    rng = torch.Generator().manual_seed(0)
    x, v, other = (torch.randn(2, 3, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    sigma, sigma_next, level = 0.7, 0.55, 0.7
    noise, path = Noise("flow_sde", level), RectifiedFlow()
    policy, reference = (noise.build(path, x, one, sigma, sigma_next, 0.9) for one in (v, other))
    gaussian = kl_divergence(policy, reference, "mean", "gaussian")
    without_dt = kl_divergence(policy, reference, "mean", "no_dt")
    velocity = kl_divergence(policy, reference, "mean", "velocity")
    assert_close(without_dt, gaussian * (sigma - sigma_next))
    coefficient = noise.coefficients(path, sigma, sigma_next, 0.9).velocity
    assert_close(gaussian, velocity * coefficient**2 / (2 * policy.std**2))
    assert (velocity > 0.5).all()
