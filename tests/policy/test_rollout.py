"""Runs that begin late, end early, or share what comes first."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import alignkit
from alignkit.flow.plan import deterministic, explicit
from tests.policy.zoo import PROMPTS, ZOO, shared

STEPS, BRANCH = 6, 3
NAMES = [
    *("sd3", "flux", "sd15", "sdxl", "sana", "qwen_image", "hunyuan_image", "wan_two_experts", "latte"),
    *("sd15_inpaint_blend", "ltx_i2v", "cogvideox_i2v", "omnigen"),
]


def conditioned(policy: alignkit.Policy, name: str) -> Any:
    call = {**ZOO[name].call, **next(iter(ZOO[name].variants.values()))}
    return policy.condition(PROMPTS, num_steps=STEPS, seed=5, **call)


def generators(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_stops_and_goes_on_is_the_uninterrupted_run(name: str) -> None:
    plan = explicit(STEPS, [1, 4], alignkit.Noise("cps", 0.5))
    late = dataclasses.replace(plan, start=BRANCH, stochastic=frozenset({4}))
    with alignkit.Policy(shared(name)) as policy:
        cond = conditioned(policy, name)
        whole = policy.rollout(cond, plan, generators())
        rng = generators()
        first = policy.rollout(cond, plan, rng, stop=BRANCH)
        rest = policy.rollout(cond, late, rng, latents=first.x0)
    assert [record.index for record in first.steps] == [1] and [record.index for record in rest.steps] == [4]
    assert torch.equal(rest.x0, whole.x0) and not torch.equal(first.x0, whole.x0)
    for one, other in zip([*first.steps, *rest.steps], whole.steps, strict=True):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.log_prob, other.log_prob)


@torch.no_grad()
def test_half_precision_keeps_full_precision_latents_over_the_break() -> None:
    pipe: Any = ZOO["sd3"].build().to(torch.bfloat16)
    with alignkit.Policy(pipe) as policy:
        cond = conditioned(policy, "sd3")
        whole = policy.rollout(cond, deterministic(STEPS), generators())
        first = policy.rollout(cond, deterministic(STEPS), generators(), stop=BRANCH)
        rest = policy.rollout(cond, deterministic(STEPS, start=BRANCH), generators(), latents=first.x0)
    assert not torch.equal(first.x0, first.x0.bfloat16().float())
    assert torch.equal(rest.x0, whole.x0)


def test_branches_of_a_shared_prefix_differ_from_where_they_part() -> None:
    noise = alignkit.Noise("cps", 0.8)
    branches = dataclasses.replace(explicit(STEPS, [BRANCH], noise), start=BRANCH)
    with alignkit.Policy(shared("sd3")) as policy:
        cond = conditioned(policy, "sd3")
        trunk = policy.rollout(cond, deterministic(STEPS), generators(), stop=BRANCH)
        rows = [0, 0, 0, 1]
        rng = [torch.Generator().manual_seed(10 + i) for i in range(4)]
        tips = policy.rollout(cond[rows], branches, rng, latents=trunk.x0[rows])
    assert torch.equal(tips.steps[0].latents, trunk.x0[rows])
    assert len({tuple(tip.flatten()[:3].tolist()) for tip in tips.x0}) == 4


def test_latents_given_for_the_start_leave_the_generators_for_the_noise() -> None:
    plan = explicit(STEPS, [0], alignkit.Noise("cps", 0.5))
    with alignkit.Policy(shared("sd3")) as policy:
        cond = conditioned(policy, "sd3")[[0, 0]]
        x = policy.initial_latents(cond[[0]], generators()[:1])[[0, 0]]
        rolled = policy.rollout(cond, plan, generators(7), latents=x)
    assert torch.equal(rolled.steps[0].latents, x)
    own = [torch.randn(x.shape[1:], generator=rng) for rng in generators(7)]
    drawn = rolled.steps[0].next_latents - rolled.steps[0].mean
    for noise, wanted in zip(drawn, own, strict=True):
        torch.testing.assert_close(noise / noise.std(), wanted / wanted.std(), rtol=1e-3, atol=1e-3)


def test_a_step_that_does_not_run_is_refused_as_a_start_or_an_end() -> None:
    with alignkit.Policy(shared("sd3")) as policy:
        cond = conditioned(policy, "sd3")
        late, rng = deterministic(STEPS, start=BRANCH), generators()
        with pytest.raises(alignkit.RecipeError, match=r"begins at step 3.*give `latents` at noise level 0\.\d"):
            policy.rollout(cond, late, rng)
        x = policy.initial_latents(cond, generators())
        with pytest.raises(alignkit.RecipeError, match=r"stop=3 must be one of the steps 4\.\.6"):
            policy.rollout(cond, late, rng, latents=x, stop=3)
        with pytest.raises(alignkit.RecipeError, match="1 latents for a conditioning of 2"):
            policy.rollout(cond, late, rng, latents=x[:1])


def test_a_loop_that_writes_known_parts_cannot_run_a_step_again() -> None:
    with alignkit.Policy(shared("sd15_inpaint_blend")) as policy:
        cond = conditioned(policy, "sd15_inpaint_blend")
        with pytest.raises(alignkit.RecipeError, match="cannot run again"):
            policy.rollout(cond, deterministic(STEPS), generators(), repeats={2: 2})


def test_a_run_without_records_ends_where_one_with_records_does() -> None:
    plan = explicit(STEPS, [1, 4], alignkit.Noise("cps", 0.5))
    with alignkit.Policy(shared("sd3")) as policy:
        cond = conditioned(policy, "sd3")
        kept = policy.rollout(cond, plan, generators())
        bare = policy.rollout(cond, plan, generators(), record=False)
    assert len(kept.steps) == 2 and bare.steps == () and torch.equal(kept.x0, bare.x0)
