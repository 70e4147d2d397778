"""Every pipeline of the zoo, driven one step at a time, against its own untouched loop.

The recorded steps come from the pipeline's own scheduler and loop (`zoo.own_steps`). A pipeline that draws before its
loop (an encoded picture's posterior) draws in both cases first from generators with the seeds of the conditioning, so
these draws coincide; the latents that follow differ, which does not matter: each recorded sample is fed to the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import alignkit
from alignkit.flow.plan import deterministic, explicit, full
from alignkit.policy.adapters import denoisers
from tests.policy.zoo import PROMPTS, ZOO, cases, own_steps, shared

STEPS = 10
SEED = 5
CASES = [pytest.param(name, variant, id=f"{name}-{variant}") for name, variant in cases()]
NAMES = list(ZOO)


def keywords(name: str, variant: str | None = None) -> dict[str, Any]:
    """All keywords of one variant, by default of the entry's first."""
    entry = ZOO[name]
    return {**entry.call, **entry.variants[variant or next(iter(entry.variants))]}


@pytest.fixture
def policy(name: str) -> Iterator[alignkit.Policy]:
    with alignkit.Policy(shared(name)) as made:
        yield made


def noise(shape: torch.Size, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(policy: alignkit.Policy, name: str) -> tuple[Any, torch.Tensor]:
    """A conditioning of the entry's first variant and its initial latents."""
    cond = policy.condition(PROMPTS, num_steps=STEPS, seed=SEED, **keywords(name))
    return cond, policy.initial_latents(cond, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_step_equals_the_pipelines_own(policy: alignkit.Policy, name: str, variant: str) -> None:
    call = keywords(name, variant)
    cond = policy.condition(PROMPTS, num_steps=STEPS, seed=SEED, **call)
    own = own_steps(shared(name), PROMPTS, STEPS, seeds=cond.seeds, **call)
    assert {float(step.timestep) for step in own} == {float(t) for t in cond.timesteps}
    for step in own:
        with torch.no_grad():
            output = policy.model_output(step.scaled_sample, step.timestep, cond)
        assert torch.equal(output, step.model_output), f"step {step.index} of {len(own)}"


@pytest.mark.parametrize("name", NAMES)
def test_the_variants_are_different_computations(name: str) -> None:
    runs = [own_steps(shared(name), PROMPTS, STEPS, seed=SEED, **keywords(name, v)) for v in ZOO[name].variants]
    for i, one in enumerate(runs):
        for other in runs[i + 1 :]:
            assert any(not torch.equal(a.model_output, b.model_output) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_latents_time_and_prompt_each_change_the_output(policy: alignkit.Policy, name: str) -> None:
    cond, x = start(policy, name)
    t, later = cond.timesteps[3], cond.timesteps[6]
    other = policy.condition(("a green sign", "on the grass"), num_steps=STEPS, seed=SEED, **keywords(name))
    output = policy.model_output(x, t, cond)
    assert torch.isfinite(output).all()
    assert torch.equal(policy.model_output(x, t, cond), output)
    for changed in (
        policy.model_output(x + 0.1 * noise(x.shape), t, cond),
        policy.model_output(x, later, cond),
        policy.model_output(x, t, other),
    ):
        per_sample = (changed - output).flatten(1).abs().amax(1)
        assert (per_sample > 1e-4).all()


PLAIN = {"guided": "unguided", "true_cfg": "embedded"}  # a variant with guidance, the same without
GUIDED = [n for n in NAMES if any({a, b} <= ZOO[n].variants.keys() for a, b in PLAIN.items())]


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_unguided_is_the_pipelines_own_without_guidance(policy: alignkit.Policy, name: str) -> None:
    guided, plain = next((a, b) for a, b in PLAIN.items() if {a, b} <= ZOO[name].variants.keys())
    cond = policy.condition(PROMPTS, num_steps=STEPS, seed=SEED, **keywords(name, guided)).unguided
    for step in own_steps(shared(name), PROMPTS, STEPS, seeds=cond.seeds, **keywords(name, plain))[::4]:
        output = policy.model_output(step.scaled_sample, step.timestep, cond)
        assert torch.equal(output, step.model_output), f"step {step.index}"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_denoiser_and_the_latents(name: str) -> None:
    pipe = ZOO[name].build()
    with alignkit.Policy(pipe, train=alignkit.Full()) as policy:
        cond, x = start(policy, name)
        x.requires_grad_(True)
        output = policy.model_output(x, cond.timesteps[4], cond)
        (output * noise(output.shape)).sum().backward()
        modules = [list(m.parameters()) for m in denoisers(pipe).values()]
        ran = [m for m in modules if any(p.grad is not None for p in m)]  # one expert of two
        assert ran
        for parameters in ran:
            gradients = [p.grad for p in parameters if p.grad is not None]
            assert all(torch.isfinite(g).all() for g in gradients)
            assert sum(bool(g.abs().max() > 0) for g in gradients) >= 0.8 * len(parameters)
        assert x.grad is not None
        assert (x.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_decoded_media_are_pixels_in_the_unit_range_with_a_gradient(policy: alignkit.Policy, name: str) -> None:
    cond, x = start(policy, name)
    media = policy.decode(x.requires_grad_(True), cond)
    assert media.dtype == torch.float32
    assert media.shape[0] == len(PROMPTS)
    assert media.ndim == (5 if ZOO[name].video else 4)
    assert media.shape[-3] == 3
    assert tuple(media.shape[-2:]) == (ZOO[name].call["height"], ZOO[name].call["width"])
    assert media.min() >= 0
    assert media.max() <= 1
    assert media.std() > 0.01
    (media * noise(media.shape)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_decoding_is_the_pipelines_own(policy: alignkit.Policy, name: str) -> None:
    pipe, call = shared(name), keywords(name)
    cond = policy.condition(PROMPTS, num_steps=2, seed=SEED, **call)
    generators = [torch.Generator().manual_seed(s) for s in cond.seeds]
    last: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0]]
        return result

    pipe.scheduler.step = keep
    try:
        run = pipe(prompt=list(PROMPTS), num_inference_steps=2, generator=generators, output_type="pt",
                   return_dict=False, **call)  # fmt: skip
    finally:
        del pipe.scheduler.step
    own = run[0] if isinstance(run[0], torch.Tensor) else torch.stack(list(run[0]))
    torch.testing.assert_close(policy.decode(last[0], cond), own.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_initial_latents_are_what_the_pipelines_loop_starts_from(policy: alignkit.Policy, name: str) -> None:
    call = keywords(name)
    cond = policy.condition(PROMPTS, num_steps=STEPS, seed=SEED, **call)
    own = own_steps(shared(name), PROMPTS, STEPS, seeds=cond.seeds, **call)[0].scaled_sample
    x = policy.initial_latents(cond, [torch.Generator().manual_seed(s) for s in cond.seeds])
    assert x.shape == own.shape
    if ZOO[name].image:  # the pipeline's own generators have already drawn the picture's posterior
        torch.testing.assert_close(x.std(), own.std(), rtol=0.2, atol=0)
    else:
        torch.testing.assert_close(x, own, rtol=1e-6, atol=1e-6)


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest value: another batch size rounds differently, and guidance amplifies it."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_one_timestep_per_sample_equals_one_call_each(policy: alignkit.Policy, name: str) -> None:
    cond, x = start(policy, name)
    t = cond.timesteps[[2, 7]]
    rows = [policy.model_output(x, t[i], cond)[[i]] for i in range(2)]
    agree(policy.model_output(x, t, cond), torch.cat(rows))


@pytest.mark.parametrize("name", [n for n in NAMES if not ZOO[n].draws_per_batch])
@torch.no_grad()
def test_a_subset_agrees_with_its_rows_of_the_batch(policy: alignkit.Policy, name: str) -> None:
    cond, x = start(policy, name)
    t = cond.timesteps[4]
    whole = policy.model_output(x, t, cond)
    agree(policy.model_output(x[[1]], t, cond[[1]]), whole[[1]])
    agree(policy.model_output(x[[1, 0]], t, cond[[1, 0]]), whole[[1, 0]])


OTHER_SOLVERS = {
    *("sd15", "sd15_pndm", "sd15_controlnet", "sd15_inpaint", "sd15_inpaint_blend", "sdxl", "animatediff", "latte"),
    *("pixart", "sana", "sana_video", "wan_t2v_unipc", "cogvideox_t2v", "cogvideox_i2v"),
}
FLOW_EULER = [n for n in NAMES if n not in OTHER_SOLVERS]  # a first-order flow solver, as ours


@pytest.mark.parametrize("name", FLOW_EULER)
@torch.no_grad()
def test_a_deterministic_rollout_is_the_pipelines_own_run(policy: alignkit.Policy, name: str) -> None:
    call = keywords(name)
    cond = policy.condition(PROMPTS, num_steps=STEPS, seed=SEED, **call)
    own = own_steps(shared(name), PROMPTS, STEPS, seeds=cond.seeds, **call)
    generators = [torch.Generator().manual_seed(s) for s in cond.seeds]
    rolled = policy.rollout(cond, deterministic(STEPS), generators)
    assert rolled.steps == ()
    if not ZOO[name].image:  # else the initial latents are other draws of the same generators
        torch.testing.assert_close(rolled.x0, own[-1].next_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_recorded_step_scored_again_has_ratio_one(policy: alignkit.Policy, name: str) -> None:
    cond, _ = start(policy, name)
    plan = explicit(STEPS, [0, 4], alignkit.Noise("cps", 0.5))
    rolled = policy.rollout(cond, plan, torch.Generator().manual_seed(0))
    assert [record.index for record in rolled.steps] == [0, 4]
    for record in rolled.steps:
        again = policy.transition(record.latents, record.index, cond, plan.noise, record.mask)
        log_prob = again.log_prob(record.next_latents, reduce="mean")
        assert torch.equal(log_prob, record.log_prob)


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that driving it could change."""
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        "attributes": {k: id(v) for k, v in vars(pipe).items()},
        "config": dict(pipe.config),
        "scheduler": copy.deepcopy(vars(pipe.scheduler)),
        "weights": {k: {n: t.clone() for n, t in m.state_dict().items()} for k, m in modules.items()},
        "flags": {k: [p.requires_grad for p in m.parameters()] for k, m in modules.items()},
        "modes": {k: [part.training for part in m.modules()] for k, m in modules.items()},
        "module attributes": {k: [sorted(vars(part)) for part in m.modules()] for k, m in modules.items()},
        "hooks": {k: [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in m.modules()]
                  for k, m in modules.items()},
    }  # fmt: skip


def differences(before: Any, after: Any, path: str = "pipe") -> list[str]:
    """Where two nested states differ; tensors and arrays are compared bit for bit."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        return [d for k in before for d in differences(before[k], after[k], f"{path}.{k}")]
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return [] if torch.equal(before, after) else [path]
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return [] if np.array_equal(before, after) else [path]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, (a, b) in enumerate(zip(before, after)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if before == after else [path]


class Interruption(Exception):
    """What a user's callback raises in the middle of a run."""


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_is_the_same_afterwards(name: str) -> None:
    pipe = shared(name)
    own_steps(pipe, PROMPTS, 2, **keywords(name))  # what the pipeline itself leaves behind is not ours
    before, drawn = state_of(pipe), torch.get_rng_state()
    with alignkit.Policy(pipe, train=alignkit.LoRA(rank=2, alpha=2)) as policy:
        cond, x = start(policy, name)
        policy.model_output(x, cond.timesteps[0], cond).sum().backward()
        policy.decode(x, cond)
        with pytest.raises(Interruption):
            plan, rng = full(STEPS, alignkit.Noise("cps", 0.5)), torch.Generator().manual_seed(0)
            policy.rollout(cond, plan, rng, poll=interrupt_at(2))
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(torch.get_rng_state(), drawn)


def interrupt_at(count: int) -> Any:
    """A poll that raises at its `count`-th call."""
    calls: list[int] = []

    def poll() -> None:
        calls.append(1)
        if len(calls) == count:
            raise Interruption

    return poll
