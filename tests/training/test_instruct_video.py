"""InstructVideo: how far it noises, what has a graph and what it costs, which frames are decoded, that it learns."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch.testing import assert_close

from alignkit.errors import RecipeError, RewardError
from alignkit.flow.plan import deterministic
from alignkit.policy import Conditioning, Policy
from alignkit.rewards import Weighted, load
from alignkit.rewards.video import Segmental
from alignkit.training.benchmark_methods import observed
from alignkit.training.experience import Experience
from alignkit.training.grpo import GRPO
from alignkit.training.instruct_video import InstructVideo, Judged
from alignkit.training.reward_gradient import Begun, entering_last_step, last_step, scores_of, steps_left
from alignkit.training.run import Run, resume, start
from alignkit.training.update import Piece
from alignkit.types import Prompt
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.train import UNUSED, train
from recipes.mixture.world import Function, PointReward, linear, quadratic
from tests.policy.zoo import PROMPTS, ZOO
from tests.training.test_regression_methods import make_run, method
from tests.training.test_resume import final_state, interrupted_at

BRIGHTNESS = {"brightness": 1.0}


def editing(tiny: GRPO, **fields: Any) -> InstructVideo:
    return method(cast(Any, InstructVideo), tiny, **{"rewards": BRIGHTNESS, "start": 0.5, "updates": 1, **fields})


def batch_of(run: Run, rows: Sequence[int] = range(6)) -> Any:
    """The view of the first round, of some of its samples."""
    experience = run.collect(0)[0]
    weights, live = run.recipe.weigh(experience.scores, run.rewards.weights, experience.groups)
    (piece,) = run.learner.pieces(0, [experience], weights, live)
    return next(Piece(piece.experience, list(rows), piece.advantages, piece.live).batches())


def video_run(tiny: GRPO, folder: Path, name: str = "wan_t2v", **fields: Any) -> Run:
    ZOO[name].build().save_pretrained(folder / "model")
    variant = ZOO[name].variants.get("unguided", {})
    rewards = {Segmental("brightness", segments=3): 1.0}
    own = {"model": str(folder / "model"), "call": {**ZOO[name].call, **variant}, "rewards": rewards, "group_size": 1}
    return make_run(editing(tiny, **{**own, **fields}), folder / "run")


def gradients(run: Run) -> list[torch.Tensor]:
    return [p.grad.clone() for p in run.parameters if p.grad is not None]


# where it starts


@pytest.mark.parametrize(
    ("share", "num_steps", "left"), [(0.6, 20, 12), (0.6, 10, 6), (1.0, 7, 7), (0.5, 5, 3), (0.3, 10, 3), (0.04, 10, 0)]
)
def test_the_share_of_the_steps_is_rounded_half_up(share: float, num_steps: int, left: int) -> None:
    assert steps_left(share, num_steps) == left


def test_the_published_timestep_is_the_first_of_the_steps_that_are_left() -> None:
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    # d(i) = T / D (i - 1) + 1; t_noi = d(tau D) with D = 20, T = 1000, tau = 0.6
    assert int(scheduler.timesteps[20 - steps_left(0.6, 20)]) == 1000 // 20 * (12 - 1) + 1 == 551


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_clean_samples_are_noised_to_the_level_that_the_sampler_enters_the_step_with(
    name: str, tiny_recipe: GRPO, tmp_path: Path
) -> None:
    entry = ZOO[name]
    entry.build().save_pretrained(tmp_path / "model")
    call = {**entry.call, **entry.variants["unguided"]}
    run = make_run(editing(tiny_recipe, model=str(tmp_path / "model"), call=call, start=0.75), tmp_path / "run")
    batch = batch_of(run)
    view = batch.view
    sigma = float(batch.cond.sigmas[1])
    kept = 1 - sigma if name == "sd3" else math.sqrt(1 - sigma**2)
    assert view.index == 1 and view.timestep.tolist() == [float(batch.cond.timesteps[1])] * 6
    assert_close(view.latents, kept * view.x0 + sigma * view.eps, rtol=1e-5, atol=1e-5)
    assert len({float(one.sum()) for one in view.eps}) == 6  # every sample its own noise


# what it costs and what has a graph


@pytest.mark.parametrize(("share", "calls"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_partial_start_costs_its_share_of_the_steps_and_one_call_has_a_graph(
    share: float, calls: int, tiny_recipe: GRPO, tmp_path: Path
) -> None:
    run = make_run(editing(tiny_recipe, start=share), tmp_path / "run")
    batch = batch_of(run)
    with observed(run.policy, run.policy.pipe.transformer) as seen:
        loss, _ = run.recipe.policy_step(run.policy, batch)
        loss.sum().backward()
    assert (seen.calls["training"], seen.calls["current"]) == (1, calls - 1)
    assert cast(InstructVideo, run.recipe).editing_calls == calls - 1
    assert any(p.grad is not None and bool(p.grad.any()) for p in run.parameters)


def test_from_noise_the_rollout_is_the_run_and_only_its_last_step_is_taken_again(
    tiny_recipe: GRPO, tmp_path: Path
) -> None:
    run = make_run(editing(tiny_recipe, start=1.0), tmp_path / "run")
    run.gather.conditions(run.prompts[:2])  # the first call of a kind learns how the pipeline loops
    state = run.gather.state()
    with observed(run.policy, run.policy.pipe.transformer) as sampling:
        experience = run.collect(0)[0]
    assert sampling.rows.total() == 6 * 4
    (record,) = experience.rollouts.steps
    assert record.index == 3
    run.gather.load(state)
    batch = batch_of(run)
    with observed(run.policy, run.policy.pipe.transformer) as learned:
        _, logs = run.recipe.policy_step(run.policy, batch)
    assert (learned.calls["training"], learned.calls["current"]) == (1, 0)
    assert_close(batch.view.latents, record.latents, rtol=0, atol=0)
    assert_close(logs["edited_brightness"], experience.scores.parts["brightness"], rtol=1e-4, atol=1e-5)


def test_from_noise_one_step_is_all(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(editing(tiny_recipe, start=1.0, num_steps=1), tmp_path / "run")
    assert run.round(0)["policy/grad_norm"] > 0


def test_the_gradient_is_that_of_the_last_step_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    policy = MixturePolicy(width=4, depth=1)
    network = policy.weights.own["trained"].double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    own = InstructVideo(**{**UNUSED, "num_steps": 5}, rewards={Differentiable(quadratic): 1.0}, start=0.6)
    cond = policy.condition([Prompt("a point", id=i) for i in range(3)], 5)
    x0, eps = (torch.randn(3, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    sigma = torch.full((3,), float(cond.sigmas[2]), dtype=torch.float64)
    latents = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
    view = Begun(
        x0, eps, latents, sigma, sigma, index=2, rewards=Weighted(own.rewards), seeds=torch.zeros(3, dtype=torch.int64)
    )
    batch = type("One", (), {"view": view, "cond": cond})()
    loss, _ = own.policy_step(cast(Policy, policy), cast(Any, batch))
    loss.sum().backward()

    def entered() -> torch.Tensor:
        x = latents
        for k in (2, 3):  # Euler: x + (sigma' - sigma) v
            x = x + (float(cond.sigmas[k + 1]) - float(cond.sigmas[k])) * policy.velocity(x, cond.timesteps[k])
        return x

    def loss_from(x: torch.Tensor) -> float:
        x = x - float(cond.sigmas[4]) * policy.velocity(x, cond.timesteps[4])
        return -float(quadratic(x).sum())

    with torch.no_grad():
        fixed = entered()
        for parameter in network.parameters():
            place = (0,) * parameter.ndim
            assert parameter.grad is not None
            before, h = float(parameter[place]), 1e-6
            ends: list[tuple[float, float]] = []
            for sign in (1, -1):
                parameter[place] = before + sign * h
                ends.append((loss_from(fixed), loss_from(entered())))
            parameter[place] = before
            last, through = ((a - b) / (2 * h) for a, b in zip(*ends, strict=True))
            assert float(parameter.grad[place]) == pytest.approx(last, rel=1e-4, abs=1e-6)
            assert abs(last - through) > 1e-3 * abs(last)  # the steps before move it too, without a gradient


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_micro_batches_change_no_gradient(share: float, tiny_recipe: GRPO, tmp_path: Path) -> None:
    found = []
    for size in (None, 2):
        run = make_run(editing(tiny_recipe, start=share, micro_batch=size, lr=1e-8), tmp_path / f"run{size}")
        run.learner._optimize = lambda *args: {}  # type: ignore[method-assign]
        run.round(0)
        found.append(gradients(run))
    assert len(found[0]) > 0 and float(torch.cat([g.flatten() for g in found[0]]).abs().max()) > 0
    for whole, parts in zip(*found, strict=True):
        assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_in_mixed_precision_weights_that_ran_without_a_graph_still_get_a_gradient(
    tiny_recipe: GRPO, tmp_path: Path
) -> None:
    run = make_run(editing(tiny_recipe, precision="bf16"), tmp_path / "run")
    first = run.round(0)
    assert math.isfinite(first["policy/grad_norm"]) and first["policy/grad_norm"] > 0


def test_the_anchor_is_the_distance_to_the_references_velocity(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(editing(tiny_recipe, velocity_beta=3.0), tmp_path / "run")
    batch = batch_of(run)
    loss, logs = run.recipe.policy_step(run.policy, batch)
    assert_close(logs["velocity_gap"], torch.zeros(6), rtol=0, atol=1e-10)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        x = entering_last_step(run.policy, batch.view.latents, batch.view.index, batch.cond)
        own = run.policy.velocity(x, batch.cond.timesteps[3], batch.cond)
        with run.policy.reference():
            reference = run.policy.velocity(x, batch.cond.timesteps[3], batch.cond)
    loss, logs = run.recipe.policy_step(run.policy, batch)
    gap = (own - reference).square().flatten(1).mean(dim=1)
    assert_close(logs["velocity_gap"], gap, rtol=1e-4, atol=1e-8)
    assert_close(loss.detach(), -logs["edited_brightness"] + 3.0 * gap, rtol=1e-4, atol=1e-6)


# frames


def test_no_more_frames_are_decoded_than_the_rewards_look_at(
    tiny_recipe: GRPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = video_run(tiny_recipe, tmp_path, rewards={Segmental("brightness", segments=2): 1.0})
    batch, decode = batch_of(run, rows=[0, 1]), Policy.decode
    asked: list[int | None] = []

    def noted(self: Policy, x0: torch.Tensor, cond: Conditioning, frames: int | None = None) -> torch.Tensor:
        asked.append(frames)
        return decode(self, x0, cond, frames)

    monkeypatch.setattr(Policy, "decode", noted)
    whole, brightness = run.policy.num_frames(batch.cond), load("brightness")
    reward = next(iter(run.rewards.rewards.values()))
    assert isinstance(reward, Segmental)
    for seed in range(4):
        seeds = torch.tensor([seed, seed + 100])
        index = reward.chosen(whole, [Prompt("", id=int(one)) for one in seeds])
        found = scores_of(run.rewards, run.policy, batch.view.x0, batch.cond, seeds)
        media = decode(run.policy, batch.view.x0, batch.cond)
        bright = torch.stack([brightness(own[at], [Prompt("")] * 2) for own, at in zip(media, index, strict=True)])
        weights = torch.exp(-(index - whole / 2).abs())
        assert asked[-1] == (int(index.max()) + 1 if int(index.max()) + 1 < whole else None)
        assert_close(found.total, (weights * bright).sum(dim=1) / weights.sum(dim=1), rtol=1e-4, atol=1e-5)
    assert len(set(asked)) > 1 and min(one for one in asked if one is not None) < whole


def test_a_sample_sees_other_frames_than_its_neighbour_and_in_every_round(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = video_run(tiny_recipe, tmp_path)
    experience = run.collect(0)[0]
    assert isinstance(experience, Judged)
    seeds = []
    for step in range(2):
        rng = [torch.Generator().manual_seed(10 * step + i) for i in range(len(experience.groups))]
        (view,) = run.recipe.views(run.policy, experience, rng)
        assert isinstance(view, Begun)
        seeds += view.seeds.tolist()
        assert torch.equal(view[[1]].seeds, view.seeds[1:2]) and view[[1]].index == view.index
    assert len(set(seeds)) == len(seeds)


def test_a_reward_of_latents_needs_no_decoder_and_one_of_weight_0_is_not_asked(
    tiny_recipe: GRPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        name, kind, differentiable = "small", "latent", True

        def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
            return -media.square().flatten(1).mean(dim=1)

    run = make_run(editing(tiny_recipe, rewards={Small(): 1.0, "brightness": 0.0}), tmp_path / "run")
    batch = batch_of(run)
    monkeypatch.setattr(Policy, "decode", None)
    loss, logs = run.recipe.policy_step(run.policy, batch)
    x = entering_last_step(run.policy, batch.view.latents, batch.view.index, batch.cond)
    x0 = last_step(run.policy, x, batch.cond).mean
    assert_close(loss, x0.square().flatten(1).mean(dim=1), rtol=1e-5, atol=1e-6)
    assert logs.keys() == {"edited_small"}


# runs


@pytest.mark.parametrize("name", ["sd15", "sdxl", "wan_t2v", "ltx_t2v", "cogvideox_t2v"])
def test_other_families_take_a_round(name: str, tiny_recipe: GRPO, tmp_path: Path) -> None:
    fields: dict[str, Any] = {} if ZOO[name].video else {"rewards": BRIGHTNESS}
    run = video_run(tiny_recipe, tmp_path, name, **fields)
    metrics = run.round(0)
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0


def test_guidance_is_in_the_graph_unless_it_is_switched_off(tiny_recipe: GRPO, tmp_path: Path) -> None:
    call = {**ZOO["sd3"].call, "guidance_scale": 4.0}
    for guided, rows in (("same", 12), ("off", 6)):
        run = make_run(editing(tiny_recipe, call=call, train_guidance=guided), tmp_path / f"run_{guided}")
        batch = batch_of(run)
        with observed(run.policy, run.policy.pipe.transformer) as seen:
            run.recipe.policy_step(run.policy, batch)
        assert seen.rows["training"] == rows


def test_clean_samples_come_from_a_file(tiny_recipe: GRPO, tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 20, 90)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"prompt": f"a red cat {i}", "image": f"{i}.png", "reward": 0.0}))
    (tmp_path / "samples.jsonl").write_text("\n".join(rows))
    fields = {"prompts": None, "data": str(tmp_path / "samples.jsonl"), "eval_prompts": str(tmp_path / "prompts.txt")}
    run = make_run(editing(tiny_recipe, **fields), tmp_path / "run")
    run.gather.conditions(run.prompts[:2])  # the first call of a kind learns how the pipeline loops
    with observed(run.policy, run.policy.pipe.transformer) as seen:
        metrics = run.round(0)
    assert (seen.calls["training"], seen.calls["current"]) == (1, 1)
    assert metrics["groups/live"] == 1.0 and metrics["policy/grad_norm"] > 0


class FailsWhereEdited:
    """Brightness of the edited samples, of which `broken` says what goes wrong; what is sampled has it all right."""

    name, kind, differentiable = "fails", "image", True

    def __init__(self, broken: Function) -> None:
        self.broken = broken

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        bright = media.mean(dim=(1, 2, 3))
        return self.broken(bright) if media.requires_grad else bright


def no_number(bright: torch.Tensor) -> torch.Tensor:
    return bright + torch.tensor([float("nan"), *[0.0] * (len(bright) - 1)]) if len(bright) == 6 else bright


def infinite_slope(bright: torch.Tensor) -> torch.Tensor:
    off = torch.tensor([10.0 * (len(bright) == 6), *[0.0] * (len(bright) - 1)])
    return (bright - off).sqrt()


def raises(bright: torch.Tensor) -> torch.Tensor:
    raise ValueError("nothing was found")


def raises_once() -> Function:
    calls: list[int] = []

    def broken(bright: torch.Tensor) -> torch.Tensor:
        calls.append(len(bright))
        return raises(bright) if len(calls) == 1 else bright

    return broken


class Aware:
    """Scores latents at every noise level."""

    name, kind, differentiable, noise_aware = "aware", "latent", True, True

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return -latents.square().flatten(1).mean(dim=1)


def failing(tiny: GRPO, folder: Path, broken: Function, **fields: Any) -> Run:
    own = {"rewards": {FailsWhereEdited(broken): 1.0}, "on_error": "mask", **fields}
    return make_run(editing(tiny, **own), folder / "run")


@pytest.mark.parametrize("broken", [no_number, infinite_slope])
def test_a_sample_whose_reward_failed_is_left_out_where_failures_are_masked(
    broken: Function, tiny_recipe: GRPO, tmp_path: Path
) -> None:
    run = failing(tiny_recipe, tmp_path, broken, velocity_beta=0.5)
    batch = batch_of(run)
    loss, _ = run.recipe.policy_step(run.policy, batch)
    assert float(loss[0].detach()) == 0.0 and bool((loss[1:] != 0).all())
    loss.mean().backward()
    found = gradients(run)
    run.optimizer.zero_grad()
    five = replace(batch, cond=batch.cond[1:], view=batch.view[[1, 2, 3, 4, 5]])
    others, _ = run.recipe.policy_step(run.policy, five)
    others.mean().backward()
    for one, other in zip(found, gradients(run), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_a_batch_without_any_score_moves_nothing_and_the_round_goes_on(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = failing(tiny_recipe, tmp_path, raises_once(), micro_batch=2)
    metrics = run.round(0)
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0
    assert metrics["policy/edited_fails_failed"] == pytest.approx(2 / 6)
    (tmp_path / "all").mkdir()
    run = failing(tiny_recipe, tmp_path / "all", raises)
    assert run.round(0)["policy/grad_norm"] == 0.0


def test_failures_among_the_edited_are_counted_and_the_log_is_of_the_others(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = failing(tiny_recipe, tmp_path, no_number)
    metrics = run.round(0)
    assert run.rewards.failed == {"fails": 1} and "returned nan" in run.rewards.tracebacks["fails"]
    assert metrics["policy/edited_fails_failed"] == pytest.approx(1 / 6)
    assert metrics["policy/loss"] == pytest.approx(-metrics["policy/edited_fails"])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_run_bit_for_bit(
    share: float, tiny_recipe: GRPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = editing(tiny_recipe, start=share, steps=3)
    start(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 1)
        with pytest.raises(SystemExit):
            start(recipe, tmp_path / "stopped")
    resume(tmp_path / "stopped")
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rewards": {"jpeg_compressibility": 1.0, "brightness": 1.0}}, "jpeg_compressibility gives none"),
        ({"rewards": {"brightness": 0.0}}, "nothing to follow"),
        ({"start": 0.0}, "start=0.0 must be above 0"),
        ({"start": 1.2}, "start=1.2 must be above 0"),
        ({"start": 0.1}, "the smallest that leaves one: 0.25"),
        ({"start": 1.0, "prompts": None, "data": "samples.jsonl"}, "begins from pure noise"),
        ({"velocity_beta": -1.0}, "velocity_beta=-1.0"),
        ({"precision": "fp16"}, "precision='fp16': a reward's gradient overflows"),
        ({"rewards": {"brightness": 1.0, Aware(): 0.0}}, "aware is noise-aware"),
        ({"rewards": {Aware(): 1.0}}, "aware is noise-aware: it guides sampling"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(tiny_recipe: GRPO, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        editing(tiny_recipe, **fields).validate()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_loop_that_blends_known_parts_is_refused(share: float, tiny_recipe: GRPO) -> None:
    entry = ZOO["sd15_inpaint_blend"]
    with Policy(entry.build()) as policy:
        cond = policy.condition(PROMPTS, num_steps=2, **entry.call)
        own = editing(tiny_recipe, start=share, num_steps=2)
        rng = [torch.Generator().manual_seed(i) for i in range(len(cond))]
        with pytest.raises(RecipeError, match="puts known parts .* without the loop; use GRPO or NFT"):
            own.rollout(policy, cond, deterministic(2), rng, 1, lambda: None)
        with pytest.raises(RecipeError, match="puts known parts"):
            own.completed(Experience(cond, cast(Any, None), cast(Any, None), torch.zeros(2)), Weighted(own.rewards))


def test_a_video_reward_on_a_pipeline_of_pictures_says_what_it_scores(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(editing(tiny_recipe), tmp_path / "run")
    batch = batch_of(run)
    rewards = Weighted(Segmental("brightness"))
    with pytest.raises(RewardError, match="'segmental' scores video media"):
        scores_of(rewards, run.policy, batch.view.x0, batch.cond, batch.view.seeds)


# learning


class Differentiable(PointReward):
    """A function of points whose gradient is followed."""

    differentiable = True


def gain(function: Function, share: float = 0.6) -> tuple[float, MixturePolicy]:
    """How far the mean of `linear` over samples rises when `function` is followed for some rounds."""
    shape = {"steps": 25, "prompts_per_step": 4, "group_size": 16, "lr": 1e-2, "num_steps": 5}
    policy = MixturePolicy()
    cond = policy.condition(["a point"] * 256, 5)

    def reached() -> float:
        return float(linear(policy.rollout(cond, deterministic(5), torch.Generator().manual_seed(0)).x0).mean())

    before = reached()
    train(InstructVideo(**{**UNUSED, **shape}, rewards={Differentiable(function): 1.0}, start=share), policy)
    return reached() - before, policy


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_it_raises_a_reward_and_turned_round_lowers_it(share: float) -> None:
    assert gain(linear, share)[0] > 0.5
    assert gain(lambda x: -linear(x), share)[0] < -0.5


def test_a_reward_without_a_slope_moves_nothing() -> None:
    untrained = copy.deepcopy(MixturePolicy().weights.own["trained"])
    found, policy = gain(lambda x: linear(x).detach() + 0 * x.sum(dim=1))
    assert found == 0.0
    assert all(torch.equal(a, b) for a, b in zip(untrained.parameters(), policy.parameters(), strict=True))
