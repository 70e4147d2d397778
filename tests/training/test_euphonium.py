"""Guided rollouts: what is recorded, what is learnt from it, and what is not guided."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.flow.path import RectifiedFlow
from alignkit.flow.transition import Noise
from alignkit.policy.rolling import steered
from alignkit.training.benchmark_methods import Faint
from alignkit.training.euphonium import Euphonium, process_rewards, sampled_velocity
from alignkit.training.experience import Experience, join_rollouts
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import reload, save
from alignkit.training.run import Run
from alignkit.training.update import Piece
from alignkit.types import Rollouts, Scores, Step, StepRecord
from tests.training.test_grpo import make_run

FAINT = Faint()


class Level:
    """A noise-aware reward whose value is the noise level's and the latents' mean, and whose gradient is constant."""

    name, kind, differentiable, noise_aware = "level", "latent", True, True

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return latents.flatten(1).mean(dim=1) - sigma


class Blind(Faint):
    """A head that was trained on clean latents."""

    name, noise_aware = "blind", False


def guided(recipe: GRPO, **fields: Any) -> Euphonium:
    return Euphonium(**{**vars(recipe), "plan": "full", "guide": {FAINT: 30.0}, **fields})


def batches(run: Run, experience: Experience) -> list:
    count = len(experience.groups)
    weights = torch.tensor([1.0, -1.0, 0.5]).repeat(count)[:count]
    experience, weights, live = run.recipe.chosen(experience, weights, torch.ones(count, dtype=torch.bool))
    experience = dataclasses.replace(experience, views=experience.rollouts.steps)
    return list(Piece(experience, list(range(count)), weights, live).batches())


def same_sampling(plain: Rollouts, other: Rollouts) -> bool:
    return torch.equal(plain.x0, other.x0)


# rollouts


def test_rollouts_are_guided_and_the_first_step_is_not(tiny_recipe: GRPO, tmp_path: Path) -> None:
    plain = make_run(dataclasses.replace(tiny_recipe, plan="full"), tmp_path / "plain").collect(0)[0].rollouts
    found = make_run(guided(tiny_recipe), tmp_path / "guided").collect(0)[0].rollouts
    assert not same_sampling(plain, found)
    assert float(found.x0.square().mean()) < 0.9 * float(plain.x0.square().mean())  # what the guide asks for
    assert [record.shift is None for record in found.steps] == [True, False, False]
    assert torch.equal(plain.steps[0].next_latents, found.steps[0].next_latents)


def test_the_recorded_change_is_that_of_noisy_reward_guidance(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe, guide_weight=0.5), tmp_path / "run")
    record = run.collect(0)[0].rollouts.steps[1]
    x, sigma = record.latents.double(), record.sigma
    gradient = -2.0 * 30.0 * x / x[0].numel()
    assert record.shift is not None
    assert_close(record.shift.double(), -0.5 * sigma / (1 - sigma) * gradient, rtol=1e-4, atol=1e-6)


def test_guidance_keeps_to_its_share_of_the_steps_and_to_its_clip(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe, guide_start=0.5, guide={FAINT: 1e6}, guide_clip=0.1), tmp_path / "run")
    experience = run.collect(0)[0]
    assert [record.index for record in experience.rollouts.steps if record.shift is not None] == [2]
    record = experience.rollouts.steps[2]
    own = run.policy.velocity(record.latents, experience.cond.timesteps[2], experience.cond)
    assert record.shift is not None
    assert_close(record.shift.flatten(1).norm(dim=1), 0.1 * own.flatten(1).norm(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("noise", [Noise("flow_sde", 0.7), Noise("cps", 0.8)])
def test_the_ratio_before_the_first_update_is_exactly_one(
    tiny_recipe: GRPO, tmp_path: Path, updates: int, noise: Noise
) -> None:
    fields = {"updates": updates, "rollout_batch": 6 // updates, "noise": noise, "distil_beta": 0.1}
    run = make_run(guided(tiny_recipe, **fields), tmp_path / "run")
    for step in range(2):
        metrics = run.round(step)
        assert metrics["policy/ratio_first_dev"] == 0.0
        assert metrics["policy/grad_norm"] > 0
        assert (metrics["policy/ratio_max_dev"] > 0) == (updates > 1)


def test_scored_without_the_guidance_it_would_not_be_one(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe), tmp_path / "run")
    experience = run.collect(0)[0]
    record = experience.rollouts.steps[1]
    now = run.policy.transition(record.latents, record.index, experience.cond, tiny_recipe.noise, record.mask)
    assert float((now.log_prob(record.next_latents, "mean") - record.log_prob).detach().abs().max()) > 1e-4


def test_without_guidance_it_is_flow_grpo_bit_for_bit(tiny_recipe: GRPO, tmp_path: Path) -> None:
    plain = make_run(tiny_recipe, tmp_path / "plain")
    found = make_run(guided(tiny_recipe, plan=tiny_recipe.plan, guide_weight=0.0), tmp_path / "found")
    first = [p.clone() for p in plain.parameters]
    assert [plain.round(step) for step in range(2)] == [found.round(step) for step in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, found.parameters, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters, first, strict=True))


def test_what_is_added_is_kept_bit_for_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    v, change = torch.randn(1000, generator=rng), 1e3 * torch.randn(1000, generator=rng)
    step = Step(3, 0.5, 0.5, 0.4, v, v, True, lambda x, v: None)  # type: ignore[arg-type,return-value]
    found, added = steered(step, lambda s: dataclasses.replace(s, velocity=s.velocity + change))
    assert added is not None and torch.equal(v + added, found.velocity)
    assert steered(step, lambda s: s) == (step, None) and steered(step, None) == (step, None)
    exchanged, added = steered(step, lambda s: dataclasses.replace(s, latents=s.latents.flip(0), velocity=change))
    assert added is None and torch.equal(exchanged.velocity, change)


def test_rollouts_in_batches_are_those_of_all_at_once(tiny_recipe: GRPO, tmp_path: Path) -> None:
    whole = make_run(guided(tiny_recipe, process_weight=1.0), tmp_path / "whole").collect(0)[0]
    split = make_run(guided(tiny_recipe, process_weight=1.0, rollout_batch=2, micro_batch=1), tmp_path / "split")
    parts = split.collect(0)[0]
    assert parts.process is not None and whole.process is not None
    assert_close(parts.process, whole.process, rtol=1e-4, atol=1e-5)
    shifts = [(a.shift, b.shift) for a, b in zip(parts.rollouts.steps, whole.rollouts.steps, strict=True)]
    assert [a is None for a, _ in shifts] == [True, False, False]
    for a, b in shifts[1:]:
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_joined_batches_keep_what_was_added() -> None:
    x = torch.zeros(2, 3)
    record = StepRecord(1, 0.5, 0.5, 0.4, x, x, x, torch.zeros(2), shift=torch.ones(2, 3))
    joined = join_rollouts([Rollouts(x, (record,), torch.ones(3))] * 2).steps[0]
    assert joined.shift is not None and joined.shift.shape == (4, 3) and bool((joined.shift == 1).all())


def test_assessments_are_not_guided(tiny_recipe: GRPO, tmp_path: Path) -> None:
    plain = make_run(tiny_recipe, tmp_path / "plain")
    found = make_run(guided(tiny_recipe), tmp_path / "guided")
    prompts = plain.prompts[:2]
    one, other = (run.assess(prompts, dict(run.recipe.call)).media for run in (plain, found))
    assert one is not None and other is not None and torch.equal(one, other)
    assert plain.distances() == found.distances()


def test_the_base_that_rewards_are_compared_with_is_not_guided(tiny_recipe: GRPO, tmp_path: Path) -> None:
    fields = {"transform": "log_sigmoid", "transform_samples": 2}
    plain = make_run(dataclasses.replace(tiny_recipe, **fields), tmp_path / "plain")
    found = make_run(guided(tiny_recipe, plan=tiny_recipe.plan, **fields), tmp_path / "guided")
    for run in (plain, found):
        run.collect(0)
    assert plain.gather.base.state() == found.gather.base.state()


# what is learnt


def test_the_kl_compares_with_the_reference_under_the_same_guidance(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe, kl_beta=1.0), tmp_path / "run")
    for batch in batches(run, run.collect(0)[0]):
        assert float(run.recipe.policy_step(run.policy, batch)[1]["kl"].abs().max()) == 0.0


def test_distillation_pulls_to_the_velocity_that_was_sampled_with(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe, distil_beta=0.3), tmp_path / "run")
    assert isinstance(run.recipe, Euphonium)
    experience = run.collect(0)[0]
    found = batches(run, experience)
    plain = dataclasses.replace(run.recipe, distil_beta=0.0)
    assert "guide_gap" not in run.recipe.policy_step(run.policy, found[0])[1]  # the unguided first step
    for batch in found[1:]:
        record = batch.view
        loss, logs = run.recipe.policy_step(run.policy, batch)
        without, _ = plain.policy_step(run.policy, batch)
        gap = record.shift.square().flatten(1).mean(dim=1)  # the weights have not moved
        assert_close(logs["guide_gap"], gap, rtol=1e-3, atol=1e-6)
        assert_close(loss - without, 0.3 * gap, rtol=1e-3, atol=1e-5)
        own = run.policy.velocity(record.latents, batch.cond.timesteps[record.index], batch.cond)
        velocity = sampled_velocity(run.recipe, run.policy, batch.cond, record)
        assert_close(velocity, own + record.shift, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [Noise("flow_sde", 0.7), Noise("dance_sde", 0.3), Noise("cps", 0.8)])
def test_the_sampled_velocity_follows_from_the_mean(noise: Noise) -> None:
    rng = torch.Generator().manual_seed(1)
    x, v = (torch.randn(2, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    levels = float(sigmas[1]), float(sigmas[2]), float(sigmas[1])
    mean = noise.build(RectifiedFlow(), x, v, *levels).mean
    record = StepRecord(1, 0.8, levels[0], levels[1], x, x, mean, torch.zeros(2))

    class Flow:
        path = RectifiedFlow()

    class Grid:
        pass

    grid = Grid()
    grid.sigmas = sigmas  # type: ignore[attr-defined]
    recipe = Euphonium(model="m", prompts="p", rewards={"ocr": 1.0}, noise=noise)
    assert_close(sampled_velocity(recipe, Flow(), grid, record), v)  # type: ignore[arg-type]


def test_process_rewards_are_changes_of_the_guide_over_each_recorded_step(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe, guide={Level(): 2.0}, process_weight=1.0), tmp_path / "run")
    experience = run.collect(0)[0]
    assert experience.process is not None and experience.process.shape == (6, 3)
    for k, record in enumerate(experience.rollouts.steps):
        before, after = (t.flatten(1).mean(dim=1) for t in (record.latents, record.next_latents))
        expected = 2.0 * (after - before - record.sigma_next + record.sigma)
        assert_close(experience.process[:, k], expected, rtol=1e-4, atol=1e-5)


def test_levels_between_neighbouring_steps_are_asked_once(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(guided(tiny_recipe, process_weight=1.0), tmp_path / "run")
    experience, asked = run.collect(0)[0], list[float]()

    def spy(x: torch.Tensor, sigma: float, cond: Any) -> torch.Tensor:
        asked.append(round(sigma, 4))
        return x.flatten(1).mean(dim=1)

    recipe = guided(tiny_recipe)
    object.__setattr__(recipe, "guide_reward", spy)
    process_rewards(recipe, experience)
    assert asked == [round(float(s), 4) for s in experience.cond.sigmas[:4]]


def test_a_step_is_worth_its_outcome_and_its_own_change(tiny_recipe: GRPO) -> None:
    recipe = guided(tiny_recipe, process_weight=0.5, advantage_clip=None)
    groups = torch.tensor([0, 0, 1, 1])
    outcome, live = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
    process = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 2.0], [0.0, 6.0]])
    scores = Scores(torch.tensor([1.0, 0.0, 2.0, torch.nan]), {})
    experience = Experience(None, Rollouts(process, (), process), scores, groups, process=process)  # type: ignore[arg-type]
    _, found, alive = recipe.chosen(experience, outcome, live)
    expected = torch.tensor([[0.5, 1.0], [-0.5, -1.0], [0.0, -0.5], [0.0, 0.5]])
    assert_close(found, expected, rtol=0, atol=2e-4)
    assert alive.tolist() == [True, True, True, False]  # of the last nothing is known but the guide's word


def test_a_run_keeps_the_file_of_its_guide_and_reads_it_back(tiny_recipe: GRPO, tmp_path: Path) -> None:
    place = tmp_path / "guide.py"
    place.write_text(GUIDE)
    recipe = guided(tiny_recipe, guide={f"{place}:Pull": 2.0}, process_weight=0.5, distil_beta=0.1)
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", recipe, None)
    place.unlink()
    again, _ = reload(tmp_path / "run")
    assert isinstance(again, Euphonium)
    assert again.guide == {f"{tmp_path / 'run' / 'code' / 'guide.py'}:Pull": 2.0}
    again.validate()
    same = {"guide", "rewards"}
    assert {k: v for k, v in vars(again).items() if k not in same} == {
        k: v for k, v in vars(recipe).items() if k not in same
    }


GUIDE = """
class Pull:
    name, kind, differentiable, noise_aware = "pull", "latent", True, True

    def __call__(self, latents, sigma, cond):
        return -latents.square().flatten(1).mean(dim=1)
"""


# refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guide": {}}, "noise-aware reward"),
        ({"guide": {FAINT: 0.0}}, "noise-aware reward"),
        ({"guide": {"brightness": 1.0}}, "'brightness' scores finished media"),
        ({"guide": {Blind(): 1.0}}, "'blind' was trained on clean latents only"),
        ({"guide_weight": -1.0}, "guide_weight=-1.0 must be at least 0"),
        ({"guide_clip": 0.0}, "guide_clip=0.0 must be above 0"),
        ({"guide_start": 0.5, "guide_stop": 0.5}, "start=0.5, stop=0.5"),
        ({"process_weight": -0.1}, "process_weight=-0.1"),
        ({"distil_beta": -0.1}, "distil_beta=-0.1"),
        ({"guide_weight": 0.0, "distil_beta": 0.1}, "nothing to distil"),
        ({"shared_noise": True}, "use GRPO"),
        ({"replay": 2, "updates": 1}, "use GRPO"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(tiny_recipe: GRPO, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        guided(tiny_recipe, **fields).validate()
