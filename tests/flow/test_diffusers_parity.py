"""Our steps beside those of diffusers' schedulers, on the same tensors, at every step of a run."""

# diffusers annotates its schedulers more narrowly than it calls them.
# pyright: reportArgumentType=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Literal

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from alignkit.flow import path as paths
from alignkit.flow.path import RectifiedFlow, VariancePreserving
from alignkit.flow.transition import ODE, Noise

DDIMPrediction = Literal["epsilon", "sample", "v_prediction"]


def randn(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_ode_is_the_flow_match_euler_scheduler_step_for_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    x = theirs = randn(0)
    for k, timestep in enumerate(scheduler.timesteps):
        v = randn(k + 1)
        theirs = scheduler.step(v, timestep, theirs, return_dict=False)[0]
        sigma, after = scheduler.sigmas[k], scheduler.sigmas[k + 1]
        x = ODE.build(RectifiedFlow(), x, v, sigma, after, scheduler.sigmas[1]).mean
        assert_close(x, theirs, atol=2e-6, rtol=1e-5)


def test_our_shift_is_the_one_of_the_flow_match_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert_close(paths.shift_sigma(torch.as_tensor(plain.sigmas), 3.0).float(), scheduler.sigmas)


def ddim_scheduler(prediction: DDIMPrediction, zero_snr: bool = False) -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=0 if zero_snr else 1,
    )
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_our_ddim_is_the_ddim_scheduler_step_for_step(prediction, eta):
    check_ddim(ddim_scheduler(prediction), prediction, eta, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_our_ddim_follows_a_zero_terminal_snr_schedule_from_its_first_step(eta):
    check_ddim(ddim_scheduler("v_prediction", zero_snr=True), "v_prediction", eta, atol=2e-4)


def check_ddim(scheduler: DDIMScheduler, prediction: DDIMPrediction, eta: float, atol: float) -> None:
    path, x = VariancePreserving(), randn(0)
    theirs = x
    stride = 1000 // 10
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        output, z = randn(k + 1), randn(100 + k)
        before = timestep - stride
        alphas = scheduler.alphas_cumprod.double()
        sigma = (1 - alphas[timestep]).sqrt()
        after = (1 - (alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double())).sqrt()
        noise = z if eta > 0 else None
        theirs = scheduler.step(output, timestep, theirs, eta=eta, variance_noise=noise, return_dict=False)[0]
        v = paths.velocity_from(path, prediction, output, x, sigma)
        x = Noise("ddim", eta).build(path, x, v, sigma, after, sigma).sample(z)
        assert_close(x, theirs, atol=atol, rtol=1e-4)
