"""The pipeline handed in is the same before and after, whatever happens inside; no policy call moves the global RNG."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from alignkit.flow.plan import full
from alignkit.flow.transition import Noise
from alignkit.policy import LoRA, Policy
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.memory import components
from tests.policy.test_adapters import tree
from tests.policy.test_attention import processors
from tests.policy.zoo import PROMPTS, ZOO, own_steps

NAMES = ("sd3", "sdxl", "qwen_image", "wan_i2v", "ltx_i2v")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class StopsThere(Exception):
    """Raised from inside a rollout by a poll."""


def plain(value: Any) -> Any:
    """A value that compares by content: tensors and arrays as lists, modules and other objects by identity."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else id(value)


def hooks(module: torch.nn.Module) -> list[int]:
    """Hooks by identity, but for those that transformers' encoders give themselves at their first call."""
    found = [hook for kind in HOOKS for hook in vars(module)[kind].values()]
    return [id(hook) for hook in found if "transformers" not in str(inspect.getmodule(hook))]


def portrait(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything of a pipeline that a run could leave changed."""
    found: dict[str, Any] = {"class": type(pipe), "attributes": plain(dict(vars(pipe)))}
    found["config"] = plain(dict(pipe.config))
    found["scheduler class"] = type(pipe.scheduler)
    found["scheduler"] = plain({k: v for k, v in vars(pipe.scheduler).items() if k != "_internal_dict"})
    found["scheduler config"] = plain(dict(pipe.scheduler.config))
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            found[name] = plain(vars(part)) if name.startswith("tokenizer") is False and part is not None else id(part)
            continue
        found[f"{name} modules"] = [(n, id(m), m.training) for n, m in part.named_modules()]
        found[f"{name} hooks"] = [(n, hooks(m)) for n, m in part.named_modules()]
        found[f"{name} shadows"] = [n for n, m in part.named_modules() if "forward" in vars(m) or "encode" in vars(m)]
        found[f"{name} values"] = [float(p.detach().double().sum()) for p in part.parameters()]
        found[f"{name} flags"] = [(p.requires_grad, p.grad is None) for p in part.parameters()]
    return found | tree(pipe) | {"processors": processors(pipe)}


def conditioned(policy: Policy, name: str, num_steps: int = 3) -> Conditioning:
    variant = next(iter(ZOO[name].variants.values()))
    return policy.condition(list(PROMPTS), num_steps=num_steps, **{**ZOO[name].call, **variant})


def plan(cond: Conditioning) -> Any:
    return full(len(cond.timesteps), Noise("flow_sde", 0.5))


def use(policy: Policy, name: str) -> None:
    """One call of everything."""
    cond = conditioned(policy, name)
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    policy.model_output(x, cond.timesteps[1], cond)
    policy.model_output(x, cond.timesteps[:2], cond)
    with policy.reference():
        policy.velocity(x, cond.timesteps[0], cond)
    rolls = policy.rollout(cond[[1]], plan(cond), torch.Generator().manual_seed(1))
    policy.decode(rolls.x0, cond[[1]])
    _ = cond.unguided


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_is_the_same_before_and_after(name: str) -> None:
    pipe = ZOO[name].build()
    before = portrait(pipe)
    with Policy(pipe, LoRA(rank=2)) as policy:
        policy.snapshot("ema")
        use(policy, name)
    assert portrait(pipe) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_pipelines_own_sampling_is_the_same_before_and_after(name: str) -> None:
    pipe = ZOO[name].build()
    call = {**ZOO[name].call, **next(iter(ZOO[name].variants.values()))}
    before = own_steps(pipe, num_steps=2, **call)
    with Policy(pipe, LoRA(rank=2)) as policy:
        cond = conditioned(policy, name)
        policy.rollout(cond, plan(cond), torch.Generator().manual_seed(0))
    after = own_steps(pipe, num_steps=2, **call)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.model_output, other.model_output)
        assert torch.equal(one.sample, other.sample)


@pytest.mark.parametrize("error", [StopsThere, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["sd3", "ltx_i2v"])
def test_an_exception_inside_a_rollout_leaves_nothing_and_the_policy_goes_on(
    name: str, error: type[BaseException]
) -> None:
    pipe = ZOO[name].build()
    before = portrait(pipe)
    with Policy(pipe, LoRA(rank=2)) as policy:
        cond = conditioned(policy, name)
        inside = portrait(pipe)
        polls: list[None] = []

        def poll() -> None:
            polls.append(None)
            if len(polls) == 2:
                raise error

        state = torch.get_rng_state()
        with pytest.raises(error):
            policy.rollout(cond, plan(cond), torch.Generator().manual_seed(0), poll=poll)
        assert len(polls) == 2
        assert portrait(pipe) == inside
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_grad_enabled()
        again = policy.rollout(cond, plan(cond), torch.Generator().manual_seed(0))
        fresh = policy.rollout(conditioned(policy, name), plan(cond), torch.Generator().manual_seed(0))
        assert torch.equal(again.x0, fresh.x0)
    assert portrait(pipe) == before


def test_an_exception_inside_the_denoiser_leaves_nothing() -> None:
    pipe = ZOO["sd3"].build()
    policy = Policy(pipe, LoRA(rank=2))
    cond = conditioned(policy, "sd3")
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    before = portrait(pipe)
    expected = policy.model_output(x, cond.timesteps[0], cond)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), policy.reference():
        policy.model_output(x, cond.timesteps[0], cond)
    handle.remove()
    assert portrait(pipe) == before
    assert torch.equal(policy.model_output(x, cond.timesteps[0], cond), expected)


def test_an_exception_inside_the_with_block_closes_the_policy() -> None:
    pipe = ZOO["sd3"].build()
    before = portrait(pipe)
    policy = Policy(pipe, LoRA(rank=2), attention="_native_math")
    assert portrait(pipe) != before
    with pytest.raises(KeyboardInterrupt), policy:
        raise KeyboardInterrupt
    assert portrait(pipe) == before


def test_offload_hooks_of_the_pipeline_run_when_a_call_ends_early() -> None:
    class Hook:
        def __init__(self) -> None:
            self.offloads = 0

        def offload(self) -> None:
            self.offloads += 1

    pipe = ZOO["sd3"].build()
    policy = Policy(pipe)
    cond = conditioned(policy, "sd3")
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    freed: list[None] = []
    pipe._all_hooks = [Hook()]
    pipe.maybe_free_model_hooks = lambda: freed.append(None)
    policy.model_output(x, cond.timesteps[0], cond)
    assert freed


# random numbers


@pytest.mark.parametrize("name", ["sd3", "sd15", "flux_kontext", "wan_i2v"])
def test_no_call_moves_or_reads_the_global_generator(name: str) -> None:
    pipe = ZOO[name].build()

    def run(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the legacy generator is the one that must not move)
        state, legacy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        results = []
        with Policy(pipe, LoRA(rank=2)) as policy:
            calls: list[Callable[[], Any]] = [
                lambda: results.append(policy.initial_latents(cond, torch.Generator().manual_seed(3))),
                lambda: results.append(policy.model_output(results[0], cond.timesteps[1], cond).detach()),
                lambda: results.append(policy.model_output(results[0], cond.timesteps[:2], cond).detach()),
                lambda: results.append(policy.rollout(cond, plan(cond), torch.Generator().manual_seed(4)).x0),
                lambda: results.append(policy.decode(results[-1], cond).detach()),
                lambda: policy.snapshot("old"),
            ]
            cond = conditioned(policy, name)
            assert torch.equal(torch.get_rng_state(), state)
            for number, call in enumerate(calls):
                call()
                assert torch.equal(torch.get_rng_state(), state), f"call {number}"
            assert np.random.get_state()[1].tolist() == legacy  # noqa: NPY002
        return results

    first, second = run(1), run(2)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["sd3", "sdxl", "qwen_image", "wan_t2v"])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(name: str) -> None:
    policy = Policy(ZOO[name].build())
    cond = conditioned(policy, name)
    both = policy.initial_latents(cond, torch.Generator().manual_seed(3))
    first = policy.initial_latents(cond[[0]], torch.Generator().manual_seed(3))
    assert torch.equal(both[:1], first)
    assert not torch.equal(both[0], both[1])
    rolls = policy.rollout(cond, plan(cond), torch.Generator().manual_seed(4))
    alone = policy.rollout(cond[[0]], plan(cond), torch.Generator().manual_seed(4))
    torch.testing.assert_close(rolls.x0[:1], alone.x0, rtol=1e-4, atol=1e-4)
    for one, other in zip(rolls.steps, alone.steps, strict=True):
        torch.testing.assert_close(one.next_latents[:1], other.next_latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.log_prob[:1], other.log_prob, rtol=1e-4, atol=1e-4)


def test_one_generator_per_sample_gives_each_sample_its_own_stream() -> None:
    policy = Policy(ZOO["sd3"].build())
    cond = conditioned(policy, "sd3")

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    whole = policy.rollout(cond, plan(cond), generators(1, 2))
    swapped = policy.rollout(cond[[1, 0]], plan(cond), generators(2, 1))
    torch.testing.assert_close(whole.x0[[1, 0]], swapped.x0, rtol=1e-4, atol=1e-4)


def test_shallow_copies_share_modules_and_nothing_else() -> None:
    pipe = ZOO["sd3"].build()
    policy = Policy(pipe)
    session = policy.driver.session(conditioned(policy, "sd3"), visits=())
    assert session.copy is not pipe and session.copy.scheduler is not pipe.scheduler
    for name, module in components(pipe).items():
        twin = session.copy.components[name]
        assert {id(p) for p in twin.parameters()} == {id(p) for p in module.parameters()}
    assert isinstance(session.copy.scheduler, type(pipe.scheduler))
    assert copy.copy(pipe).scheduler is pipe.scheduler
