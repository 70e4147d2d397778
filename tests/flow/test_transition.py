from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow import transition as transitions
from alignkit.flow.path import RectifiedFlow, VariancePreserving
from alignkit.flow.transition import ODE, Noise, Transition, per_sample_generators

KINDS = [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("stepwise", 0.9), ("ddim", 0.5)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some(kind="flow_sde", level=0.7, dtype=torch.float64, mask=None, v=None):
    x = randn(3, 2, 4, dtype=dtype)
    v = randn(3, 2, 4, seed=1, dtype=dtype) if v is None else v
    return Noise(kind, level).build(RectifiedFlow(), x, v, 0.8, 0.65, 0.9, mask)


@pytest.mark.parametrize("kind, level", KINDS)
@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()])
def test_log_prob_is_that_of_torch_normal(kind, level, path):
    x, v = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    transition = Noise(kind, level).build(path, x, v, 0.6, 0.5, 0.9)
    after = transition.sample(rng())
    density = Normal(transition.mean, transition.std).log_prob(after)
    assert_close(transition.log_prob(after, reduce="sum"), density.sum(dim=(1, 2)))
    assert_close(transition.log_prob(after, reduce="mean"), density.mean(dim=(1, 2)))


@pytest.mark.parametrize("kind, level", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_on_policy_is_exactly_one(kind, level, dtype):
    x, v = randn(4, 3, 8, 8, dtype=torch.float32), randn(4, 3, 8, 8, seed=1, dtype=torch.float32).to(dtype)
    noise = Noise(kind, level)
    sampled = noise.build(RectifiedFlow(), x, v, 0.8, 0.65, 0.9)
    after = sampled.sample(per_sample_generators(rng(), 4))
    old = sampled.log_prob(after, reduce="mean")
    again = noise.build(RectifiedFlow(), x, v, 0.8, 0.65, 0.9).log_prob(after, reduce="mean")
    assert torch.equal((again - old).exp(), torch.ones(4))
    # Another micro-batch: within 1e-6.
    alone = noise.build(RectifiedFlow(), x[:1], v[:1], 0.8, 0.65, 0.9).log_prob(after[:1], reduce="mean")
    assert_close((alone - old[:1]).exp(), torch.ones(1), atol=1e-6, rtol=0)


def test_half_precision_is_computed_and_returned_in_float32():
    transition = some(dtype=torch.bfloat16)
    assert transition.mean.dtype == transition.std.dtype == torch.float32
    assert transition.sample(rng()).dtype == torch.float32


def test_samples_have_the_mean_and_std_of_the_transition():
    transition = Transition(torch.full((2, 20000), 3.0), torch.tensor([0.5, 2.0]))
    after = transition.sample(rng())
    assert_close(after.mean(1), torch.full((2,), 3.0), atol=0.05, rtol=0)
    assert_close(after.std(1), torch.tensor([0.5, 2.0]), atol=0, rtol=0.02)


def test_given_noise_is_used_as_it_is():
    transition, noise = some(), randn(3, 2, 4, seed=5)
    assert_close(transition.sample(noise), transition.mean + transition.std * noise)


def test_with_a_generator_each_sample_i_does_not_depend_on_the_batch():
    transition = some()
    whole = transition.sample(per_sample_generators(rng(7), 3))
    for i in range(3):
        own = per_sample_generators(rng(7), i + 1)[i]
        alone = Transition(transition.mean[i : i + 1], transition.std).sample([own])
        assert torch.equal(whole[i : i + 1], alone)
    noise = whole - transition.mean
    assert not torch.allclose(noise[0], noise[1])


def test_a_wrong_number_of_generators_is_refused():
    with pytest.raises(AlignkitError, match="2 generators for 3 samples"):
        some().sample(per_sample_generators(rng(), 2))


@pytest.mark.parametrize("std_shape", [(), (3,), (3, 1, 1)])
def test_a_std_per_sample_scales_its_own_sample_only(std_shape):
    std = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    std = std.reshape(std_shape) if std_shape else std[1]
    mean, after = randn(3, 3, 3), randn(3, 3, 3, seed=1)
    spread = std.reshape(3, 1, 1) if std_shape else std
    want = Independent(Normal(mean, spread), 2).log_prob(after)
    transition = Transition(mean, std)
    assert_close(transition.log_prob(after, reduce="sum"), want)
    assert transition.sample(rng()).shape == mean.shape
    assert_close(transition.sample(after), mean + spread * after)


def test_reductions_keep_the_batch_axis():
    values = randn(3, 2, 4)
    assert_close(transitions.reduce_positions(values, None, "mean"), values.mean(dim=(1, 2)))
    assert transitions.reduce_positions(values[:, 0, 0], None, "mean").shape == (3,)
    with pytest.raises(RecipeError, match="reduce='none'"):
        transitions.reduce_positions(values, None, "none")  # pyright: ignore


def test_the_gaussian_kl_is_that_of_torch():
    policy, reference = some(), some(v=randn(3, 2, 4, seed=2))
    want = kl_divergence(Normal(policy.mean, policy.std), Normal(reference.mean, reference.std))
    assert_close(policy.kl(reference, "sum", "gaussian"), want.sum(dim=(1, 2)))
    assert_close(policy.kl(reference, "mean"), want.mean(dim=(1, 2)))


def test_the_kl_without_dt_is_the_one_of_flow_grpos_code():
    policy, reference = some(), some(v=randn(3, 2, 4, seed=2))
    std_dev_t = math.sqrt(0.8 / (1 - 0.8)) * 0.7  # not multiplied by sqrt(-dt)
    literal = ((policy.mean - reference.mean) ** 2).mean(dim=(1, 2)) / (2 * std_dev_t**2)
    assert_close(policy.kl(reference, "mean", "no_dt"), literal)
    assert_close(policy.kl(reference, "mean", "gaussian") * 0.15, literal)


def test_the_velocity_kl_is_the_squared_velocity_difference():
    v, other = randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)
    found = some(v=v).kl(some(v=other), "sum", "velocity")
    assert_close(found, ((v - other) ** 2).sum(dim=(1, 2)))


@pytest.mark.parametrize("form", transitions.KL_FORMS)
def test_every_kl_is_zero_at_the_start_and_then_has_a_gradient(form):
    v = randn(3, 2, 4, seed=1).requires_grad_(True)
    assert_close(some(v=v).kl(some(), "mean", form).detach(), torch.zeros(3, dtype=torch.float64))
    some(v=v + 0.1).kl(some(), "mean", form).sum().backward()
    assert v.grad is not None and (v.grad > 0).all()


def test_kl_between_different_steps_is_refused():
    with pytest.raises(AlignkitError, match="differ in std"):
        some().kl(some(level=0.6), "mean")


def test_kl_forms_that_lack_what_they_need_say_so():
    bare = Transition(randn(2, 3), torch.tensor(1.0))
    with pytest.raises(AlignkitError, match="carries its dt|carry"):
        bare.kl(bare, "mean", "no_dt")
    with pytest.raises(AlignkitError, match="velocity"):
        bare.kl(bare, "mean", "velocity")
    with pytest.raises(RecipeError, match="no_dt"):
        bare.kl(bare, "mean", "nodt")  # pyright: ignore


def test_a_step_without_noise_has_no_density():
    x = randn(2, 3)
    with pytest.raises(AlignkitError, match="std is 0"):
        ODE.build(RectifiedFlow(), x, x, 0.5, 0.4, 0.9).log_prob(x, reduce="mean")
    with pytest.raises(AlignkitError, match="std is 0"):
        Noise("cps", 0.8).build(RectifiedFlow(), x, x, 0.5, 0.0, 0.9).log_prob(x, reduce="mean")


def test_published_cps_scores_the_plain_squared_distance():
    x, v = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    published = Noise("cps", 0.8, scaled=False).build(RectifiedFlow(), x, v, 0.8, 0.6, 0.9)
    after = published.sample(rng())
    literal = -((after - published.mean) ** 2).mean(dim=(1, 2))
    assert_close(published.log_prob(after, reduce="mean"), literal)
    scaled = Noise("cps", 0.8).build(RectifiedFlow(), x, v, 0.8, 0.6, 0.9)
    assert torch.equal(scaled.mean, published.mean)
    assert_close(
        scaled.log_prob(after, "mean"), Normal(scaled.mean, scaled.std).log_prob(after).mean(dim=(1, 2))
    )


@pytest.mark.parametrize("as_float", [False, True])
def test_fixed_positions_get_no_noise_and_leave_every_mean(as_float):
    mask = torch.zeros(1, 1, 4, dtype=torch.bool)
    mask[..., 1:3] = True
    mask = mask.double() if as_float else mask
    free = slice(1, 3)
    policy, reference = some(mask=mask), some(mask=mask, v=randn(3, 2, 4, seed=2))
    after = policy.sample(rng())
    assert_close(after[..., [0, 3]], policy.mean[..., [0, 3]])
    assert (after[..., free] != policy.mean[..., free]).all()
    density = Normal(policy.mean, policy.std).log_prob(after)[..., free]
    assert_close(policy.log_prob(after, "mean"), density.mean(dim=(1, 2)))
    assert_close(policy.log_prob(after, "sum"), density.sum(dim=(1, 2)))
    squared = ((policy.mean - reference.mean) ** 2)[..., free].mean(dim=(1, 2))
    assert_close(policy.kl(reference, "mean"), squared / (2 * policy.std**2))


def test_what_the_pipeline_puts_at_fixed_positions_does_not_change_the_score():
    mask = torch.zeros(3, 2, 4)
    mask[:, 0] = 1
    policy = some(mask=mask)
    after = policy.sample(rng())
    blended = after.clone()
    blended[:, 1] = float("inf")
    assert_close(policy.log_prob(blended, "mean"), policy.log_prob(after, "mean"))


def test_a_mask_that_fixes_everything_or_does_not_fit_is_refused():
    after = some().sample(rng())
    with pytest.raises(AlignkitError, match="no free position"):
        some(mask=torch.zeros(3, 1, 1)).log_prob(after, "mean")
    with pytest.raises(RecipeError, match="same number of axes"):
        some(mask=torch.ones(3, 4))


def test_latents_of_another_shape_are_refused():
    with pytest.raises(AlignkitError, match="shape"):
        some().log_prob(randn(3, 2, 1), reduce="mean")
    with pytest.raises(AlignkitError, match="shape"):
        Noise().build(RectifiedFlow(), randn(3, 2, 4), randn(3, 1, 4), 0.5, 0.4, 0.9)


def test_the_named_builders_are_the_noise_kinds():
    x, v = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    arguments = (RectifiedFlow(), x, v, 0.8, 0.65)
    pairs = [
        (transitions.ode(*arguments), ODE),
        (transitions.flow_sde(*arguments, 0.7, 0.9), Noise("flow_sde", 0.7)),
        (transitions.dance_sde(*arguments, 0.3), Noise("dance_sde", 0.3)),
        (transitions.cps(*arguments, 0.8, scaled=False), Noise("cps", 0.8, scaled=False)),
        (transitions.ddim(*arguments, 0.5), Noise("ddim", 0.5)),
    ]
    for built, noise in pairs:
        want = noise.build(*arguments, sigma_max=0.9)
        assert torch.equal(built.mean, want.mean)
        assert torch.equal(built.std, want.std)
        assert built.unscaled == want.unscaled
