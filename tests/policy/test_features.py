"""Hidden states of a denoiser's first blocks, on any pipeline: the pipeline's own, and nothing behind them runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.policy import LoRA, Policy
from alignkit.policy.adapters import denoisers
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.features import as_tokens, blocks_of
from tests.policy.test_untouched import portrait
from tests.policy.zoo import PROMPTS, ZOO, shared

FAMILIES = (
    *("sd15", "sdxl", "sd3", "flux", "qwen_image", "pixart", "sana", "auraflow", "lumina2", "z_image"),
    *("wan_t2v", "wan_two_experts", "ltx_t2v", "ltx_i2v", "hunyuan_video", "cogvideox_t2v"),
)


def conditioned(policy: Policy, name: str) -> Conditioning:
    """With guidance on, where the pipeline has any."""
    return policy.condition(list(PROMPTS), num_steps=6, **ZOO[name].call, **next(iter(ZOO[name].variants.values())))


def started(policy: Policy, cond: Conditioning) -> torch.Tensor:
    return policy.initial_latents(cond, torch.Generator().manual_seed(0))


def chain_of(name: str) -> list[nn.Module]:
    """The blocks of the first denoiser."""
    denoiser = next(iter(denoisers(shared(name)).values()))
    return [held[place] for held, place in blocks_of(denoiser)]


@contextmanager
def counting(modules: list[nn.Module]) -> Iterator[list[Any]]:
    """What each call of these modules returns."""
    seen: list[Any] = []
    hooks = [one.register_forward_hook(lambda module, inputs, output: seen.append(output)) for one in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_pipelines_own_run_computes_there(name: str) -> None:
    policy = Policy(shared(name))
    cond, chain = conditioned(policy, name), chain_of(name)
    x, t = started(policy, cond), float(cond.timesteps[1])
    depth = max(1, len(chain) - 1)
    for block in (blocks_of(one) for one in denoisers(shared(name)).values()):
        assert len(block) == len(chain)
    lasts = [held[place] for one in denoisers(shared(name)).values() for held, place in [blocks_of(one)[depth - 1]]]
    with torch.no_grad(), counting(lasts) as seen:
        policy.model_output(x, t, cond.unguided)
    found = policy.features(x, t, cond, depth)
    assert len(seen) == 1, "without guidance a block runs once"
    assert found.shape[0] == len(PROMPTS) and found.ndim == 3
    assert_close(found, as_tokens(seen[0]), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_the_latents_and_are_finite(name: str) -> None:
    policy = Policy(shared(name))
    cond = conditioned(policy, name)
    x = started(policy, cond).requires_grad_()
    (gradient,) = torch.autograd.grad(policy.features(x, float(cond.timesteps[1]), cond, 1).square().sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_sample_may_have_its_own_time(name: str) -> None:
    policy = Policy(shared(name))
    cond = conditioned(policy, name)[[0, 1, 0]]
    x, times = started(policy, cond), cond.timesteps[[4, 0, 0]]
    mixed = policy.features(x, times, cond, 1)
    late, early = (policy.features(x, float(t), cond, 1) for t in times[:2])
    assert_close(mixed, torch.stack([late[0], early[1], early[2]]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], early[0])


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "wan_t2v", "z_image"])
def test_the_blocks_behind_do_not_run(name: str) -> None:
    policy = Policy(shared(name))
    cond, chain = conditioned(policy, name), chain_of(name)
    x = started(policy, cond)
    for depth in range(1, len(chain) + 1):
        with counting(chain) as seen:
            policy.features(x, float(cond.timesteps[1]), cond, depth)
        assert len(seen) == depth


@pytest.mark.parametrize("name", ["sd3", "sdxl", "ltx_i2v"])
def test_the_policy_works_as_before_afterwards(name: str) -> None:
    policy = Policy(shared(name))
    cond = conditioned(policy, name)
    x, t = started(policy, cond), float(cond.timesteps[1])
    before, picture = policy.model_output(x, t, cond), portrait(policy.pipe)
    policy.features(x, cond.timesteps[[1, 2]], cond, 1, policy.first_blocks(1))
    assert torch.equal(policy.model_output(x, t, cond), before)
    assert portrait(policy.pipe) == picture


def test_blocks_of_ones_own_stand_in_for_the_first_and_learn() -> None:
    policy = Policy(ZOO["qwen_image"].build())
    cond = conditioned(policy, "qwen_image")
    x, t = started(policy, cond), float(cond.timesteps[1])
    own: Any = policy.first_blocks(2).requires_grad_(True)
    assert torch.equal(policy.features(x, t, cond, 2, own), policy.features(x, t, cond, 2))
    policy.features(x, t, cond, 2, own).square().mean().backward()
    assert all(block.attn.to_q.weight.grad.abs().sum() > 0 for block in own)
    with torch.no_grad():
        own[0].attn.to_q.weight.mul_(-1)
    assert not torch.allclose(policy.features(x, t, cond, 2, own), policy.features(x, t, cond, 2))
    assert not any(p.grad is not None for p in policy.pipe.transformer.transformer_blocks.parameters())


def test_copied_blocks_have_no_adapters() -> None:
    with Policy(ZOO["sd3"].build(), train=LoRA(rank=2)) as policy:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.fill_(0.1)
        cond = conditioned(policy, "sd3")
        x, t = started(policy, cond), float(cond.timesteps[1])
        own = policy.first_blocks(1)
        assert not any("lora" in name for name, _ in own.named_parameters())
        with policy.reference():
            plain = policy.features(x, t, cond, 1)
        assert_close(policy.features(x, t, cond, 1, own), plain, rtol=0, atol=0)
        assert not torch.allclose(policy.features(x, t, cond, 1), plain)


def test_gradient_checkpointing_of_the_denoiser_changes_nothing() -> None:
    pipe = ZOO["sd3"].build()
    policy = Policy(pipe)
    cond = conditioned(policy, "sd3")
    x = started(policy, cond).requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(policy.features(x, float(cond.timesteps[1]), cond, 2).square().sum(), x)[0]

    plain = gradient()
    pipe.transformer.enable_gradient_checkpointing()
    assert_close(gradient(), plain)
    assert pipe.transformer.gradient_checkpointing


@pytest.mark.parametrize("depth", [0, 3])
def test_a_depth_that_the_denoiser_does_not_have_is_refused_with_the_number_of_its_blocks(depth: int) -> None:
    policy = Policy(shared("sd3"))
    cond = conditioned(policy, "sd3")
    with pytest.raises(RecipeError, match="has 2 blocks, so give 1 to 2"):
        policy.features(started(policy, cond), 500.0, cond, depth)


def test_one_block_for_each_place_is_asked_for() -> None:
    policy = Policy(shared("sd3"))
    cond = conditioned(policy, "sd3")
    with pytest.raises(RecipeError, match="1 blocks for depth=2"):
        policy.features(started(policy, cond), 500.0, cond, 2, policy.first_blocks(1))


def test_two_stream_blocks_come_before_one_stream_blocks_and_refiners_do_not_count() -> None:
    class Two(nn.Linear): ...

    class One(nn.Linear): ...

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.caption_projection = nn.ModuleList([nn.Identity()])
            self.noise_blocks = nn.ModuleList([One(1, 1)])
            self.transformer_blocks = nn.ModuleList([Two(1, 1), Two(1, 1)])
            self.single_transformer_blocks = nn.ModuleList([One(1, 1) for _ in range(4)])

    model = Model()
    found = [held[place] for held, place in blocks_of(model)]
    assert found == [*model.transformer_blocks, *model.single_transformer_blocks]


def test_a_denoiser_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="Linear has no list of blocks"):
        blocks_of(nn.Linear(1, 1))


def test_streams_of_one_width_are_joined_and_maps_become_tokens() -> None:
    text, image, other = torch.zeros(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 2, 7)
    assert_close(as_tokens((text, image, other)), torch.cat([text, image], dim=1))
    picture = torch.arange(24.0).reshape(1, 4, 2, 3)
    assert_close(as_tokens((picture, (picture,)))[0, 4], picture[0, :, 1, 1])
    clip = torch.arange(48.0).reshape(1, 4, 2, 2, 3)
    assert_close(as_tokens(clip)[0, 7], clip[0, :, 1, 0, 1])
