"""Trained, reference, old and EMA weights on one base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy import Full, LoRA, Policy
from alignkit.policy.adapters import denoisers, linear_targets
from alignkit.policy.conditioning import Conditioning
from tests.policy.zoo import PROMPTS, ZOO

SD3 = {**ZOO["sd3"].call, "guidance_scale": 1.0}


def sd3() -> DiffusionPipeline:
    return ZOO["sd3"].build()


def inputs(policy: Policy) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Latents, a timestep of the grid, and the conditioning they belong to."""
    cond = policy.condition(list(PROMPTS), num_steps=3, **SD3)
    return policy.initial_latents(cond, torch.Generator().manual_seed(0)), cond.timesteps[1], cond


def move(policy: Policy, seed: int = 1) -> None:
    """Give every trained adapter weight another value, as an optimizer would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))


def flags(policy: Policy) -> list[bool]:
    return [p.requires_grad for p in policy.parameters()]


def load_user_lora(pipe: DiffusionPipeline, name: str = "style") -> None:
    """A LoRA of the user's own, loaded as users do, on two layers only."""
    rng = torch.Generator().manual_seed(7)
    layers = [f"transformer_blocks.{i}.attn.to_q" for i in range(2)]
    width = pipe.transformer.get_submodule(layers[0]).weight.shape
    state = {}
    for layer in layers:
        state[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, width[1], generator=rng)
        state[f"transformer.{layer}.lora_B.weight"] = torch.randn(width[0], 2, generator=rng)
    pipe.load_lora_weights(state, adapter_name=name)


def tree(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a policy could leave behind in the denoisers: modules, parameters, flags, peft's own records."""
    found: dict[str, Any] = {}
    for part, module in denoisers(pipe).items():
        found[part] = [(name, id(layer), layer.training) for name, layer in module.named_modules()]
        found[f"{part} parameters"] = [(n, id(p), p.requires_grad) for n, p in module.named_parameters()]
        found[f"{part} peft"] = {
            k: sorted(v) if k == "peft_config" else v for k, v in vars(module).items() if "peft" in k
        }
        found[f"{part} active"] = [
            (n, vars(layer)["_active_adapter"], vars(layer).get("_disable_adapters"))
            for n, layer in module.named_modules()
            if "_active_adapter" in vars(layer)
        ]
    return found


def test_before_training_the_trained_output_is_the_bases_bit_for_bit() -> None:
    plain, adapted = Policy(sd3()), Policy(sd3(), LoRA(rank=4))
    x, t, cond = inputs(plain)
    own = adapted.condition(list(PROMPTS), num_steps=3, **SD3)
    base = plain.model_output(x, t, cond)
    torch.testing.assert_close(adapted.model_output(x, t, own), base, rtol=0, atol=0)
    move(adapted)
    trained = adapted.model_output(x, t, own)
    assert not torch.equal(trained, base)
    with adapted.reference():
        torch.testing.assert_close(adapted.model_output(x, t, own), base, rtol=0, atol=0)
    torch.testing.assert_close(adapted.model_output(x, t, own), trained, rtol=0, atol=0)


def test_the_reference_lets_gradients_to_the_latents_and_none_to_the_adapter() -> None:
    policy = Policy(sd3(), LoRA(rank=4))
    move(policy)
    x, t, cond = inputs(policy)
    x.requires_grad_()
    with policy.reference():
        policy.model_output(x, t, cond).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("train", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_what_is_trained_requires_grad_after_every_context_and_snapshot(train: LoRA | Full) -> None:
    policy = Policy(sd3(), train)
    assert flags(policy) and all(flags(policy))
    for name in ("old", "ema"):
        policy.snapshot(name, decay=0.5)
        assert all(flags(policy)), f"after the snapshot {name}"
    for context in (policy.reference, policy.old, policy.ema):
        with context():
            pass
        assert all(flags(policy)), f"after {context.__name__}"
        with pytest.raises(ZeroDivisionError), context():
            raise ZeroDivisionError
        assert all(flags(policy)), f"after an exception in {context.__name__}"
    x, t, cond = inputs(policy)
    policy.model_output(x, t, cond).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


@pytest.mark.parametrize("train", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_only_what_the_optimizer_sees_requires_grad(train: LoRA | Full) -> None:
    policy = Policy(sd3(), train)
    policy.snapshot("old")
    seen = {id(p) for p in policy.parameters()}
    others = [n for n, p in policy.pipe.transformer.named_parameters() if p.requires_grad and id(p) not in seen]
    assert not others


@pytest.mark.parametrize("name", ["old", "ema"])
@pytest.mark.parametrize("train", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_companions_follow_the_trained_weights_by_the_decay_and_give_no_gradients(
    train: LoRA | Full, name: str
) -> None:
    policy = Policy(sd3(), train)
    companion: Callable[[], Any] = {"old": policy.old, "ema": policy.ema}[name]
    x, t, cond = inputs(policy)
    policy.snapshot(name, decay=0.9)  # the first is a copy, whatever the decay
    before = [p.detach().clone() for p in policy.parameters()]
    first = policy.model_output(x, t, cond).detach()
    move(policy)
    after = [p.detach().clone() for p in policy.parameters()]
    with companion():
        output = policy.model_output(x.clone().requires_grad_(), t, cond)
        assert not output.requires_grad
        torch.testing.assert_close(output, first, rtol=0, atol=0)
    assert not torch.equal(policy.model_output(x, t, cond), first)  # the trained weights are back
    policy.snapshot(name, decay=0.75)
    with torch.no_grad():
        for parameter, a, b in zip(policy.parameters(), before, after, strict=True):
            parameter.copy_(0.75 * a + 0.25 * b)
    with companion():
        moved = policy.model_output(x, t, cond)
    torch.testing.assert_close(moved, policy.model_output(x, t, cond).detach())


def test_a_companion_that_was_never_taken_is_an_error_that_says_how() -> None:
    policy = Policy(sd3(), LoRA(rank=4))
    with pytest.raises(PolicyError, match=r'policy\.snapshot\("old"\)'), policy.old():
        pass


def test_the_reference_of_full_fine_tuning_is_the_base_as_it_was() -> None:
    policy = Policy(sd3(), Full())
    x, t, cond = inputs(policy)
    base = policy.model_output(x, t, cond).detach()
    move(policy)
    trained = policy.model_output(x, t, cond).detach()
    assert not torch.equal(trained, base)
    with policy.reference():
        torch.testing.assert_close(policy.model_output(x, t, cond), base, rtol=0, atol=0)
    torch.testing.assert_close(policy.model_output(x, t, cond).detach(), trained, rtol=0, atol=0)


@pytest.mark.parametrize("train", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_saved_weights_and_companions_come_back_in_another_policy(train: LoRA | Full) -> None:
    policy, other = Policy(sd3(), train), Policy(sd3(), train)
    move(policy, seed=1)
    policy.snapshot("ema")
    move(policy, seed=2)
    state = {key: tensor.clone() for key, tensor in policy.weights.state().items()}
    other.weights.load(state)
    x, t, cond = inputs(policy)
    own = other.condition(list(PROMPTS), num_steps=3, **SD3)
    assert torch.equal(other.model_output(x, t, own), policy.model_output(x, t, cond))
    with policy.ema(), other.ema():
        assert torch.equal(other.model_output(x, t, own), policy.model_output(x, t, cond))
    assert all(flags(other))


def test_a_lora_of_the_users_stays_active_and_frozen_beside_the_trained_one() -> None:
    pipe = sd3()
    load_user_lora(pipe)
    plain = Policy(pipe)
    x, t, cond = inputs(plain)
    styled = plain.model_output(x, t, cond).detach()
    before = tree(pipe)
    with Policy(pipe, LoRA(rank=4)) as policy:
        own = policy.condition(list(PROMPTS), num_steps=3, **SD3)
        torch.testing.assert_close(policy.model_output(x, t, own), styled, rtol=0, atol=0)
        move(policy)
        assert not torch.equal(policy.model_output(x, t, own), styled)
        with policy.reference():
            torch.testing.assert_close(policy.model_output(x, t, own), styled, rtol=0, atol=0)
        policy.snapshot("old")
        style = [p for n, p in pipe.transformer.named_parameters() if ".style." in n]
        assert style and not any(p.requires_grad for p in style)
    assert tree(pipe) == before
    torch.testing.assert_close(plain.model_output(x, t, cond), styled, rtol=0, atol=0)


def test_a_lora_that_the_user_switched_off_stays_off() -> None:
    pipe = sd3()
    plain = Policy(pipe)
    x, t, cond = inputs(plain)
    base = plain.model_output(x, t, cond).detach()
    load_user_lora(pipe)
    pipe.disable_lora()
    before = tree(pipe)
    with Policy(pipe, LoRA(rank=4)) as policy:
        own = policy.condition(list(PROMPTS), num_steps=3, **SD3)
        torch.testing.assert_close(policy.model_output(x, t, own), base, rtol=0, atol=0)
    assert tree(pipe) == before


def test_a_fused_lora_that_would_hide_the_trained_one_is_refused() -> None:
    pipe = sd3()
    load_user_lora(pipe)
    pipe.fuse_lora()
    before = tree(pipe)
    with pytest.raises(RecipeError, match=r"unload_lora_weights"):
        Policy(pipe, LoRA(rank=4))
    assert tree(pipe) == before
    pipe.unload_lora_weights()
    Policy(pipe, LoRA(rank=4)).close()


@pytest.mark.parametrize("train", [LoRA(rank=4), LoRA(rank=2, targets="all"), Full(), None], ids=str)
def test_close_leaves_modules_flags_and_records_as_they_were(train: LoRA | Full | None) -> None:
    pipe = sd3()
    pipe.transformer.pos_embed.requires_grad_(False)
    before = tree(pipe)
    policy = Policy(pipe, train)
    if train is not None:
        policy.snapshot("old")
        policy.snapshot("ema")
        with policy.old():
            pass
        assert tree(pipe) != before
    policy.close()
    assert tree(pipe) == before
    policy.close()


def test_a_policy_that_could_not_be_built_leaves_nothing(tmp_path: Path) -> None:
    pipe = sd3()
    before = tree(pipe)
    with pytest.raises(RecipeError, match="match no linear layer"):
        Policy(pipe, LoRA(targets=("no_such_layer",)))
    with pytest.raises(RecipeError, match="no LoRA at"):
        Policy(pipe, LoRA(), init_lora=tmp_path / "missing")
    with pytest.raises(RecipeError, match="xformers"):
        Policy(pipe, LoRA(), attention="xformers")
    assert tree(pipe) == before


def test_equal_seeds_give_equal_adapters_and_leave_the_global_generator_alone() -> None:
    pipes = [sd3() for _ in range(3)]
    state = torch.get_rng_state()
    first, second, other = (Policy(p, LoRA(rank=4, seed=s)) for p, s in zip(pipes, (5, 5, 6), strict=True))
    first.snapshot("ema")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_targets_choose_linear_layers_by_kind_or_by_ending() -> None:
    module = sd3().transformer
    attention = linear_targets(module, "attention")
    assert attention and all("attn" in name for name in attention)
    assert set(attention) < set(linear_targets(module, "all"))
    assert all(n.endswith(".to_q") for n in linear_targets(module, ("to_q",)))
    with pytest.raises(RecipeError, match="it has .*to_q"):
        linear_targets(module, ("q_projection",))
    with pytest.raises(RecipeError, match="expected"):
        linear_targets(module, "attn")


def test_the_parameter_count_is_what_rank_and_layer_sizes_say() -> None:
    policy = Policy(sd3(), LoRA(rank=3))
    layers = linear_targets(policy.pipe.transformer, "attention")
    sizes = [policy.pipe.transformer.get_submodule(name).base_layer.weight.shape for name in layers]
    assert sum(p.numel() for p in policy.parameters()) == sum(3 * (o + i) for o, i in sizes)


def test_an_old_unet_pipeline_trains_and_closes_alike() -> None:
    pipe = ZOO["sd15"].build()
    before = tree(pipe)
    with Policy(pipe, LoRA(rank=2)) as policy:
        assert flags(policy)
        policy.snapshot("old")
        with policy.reference(), policy.old():
            pass
        assert all(flags(policy))
    assert tree(pipe) == before
