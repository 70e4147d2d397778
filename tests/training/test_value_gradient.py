"""Velocity-gradient matching: its target against a literal transcription, where it counts, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow import path as paths
from alignkit.flow.path import RectifiedFlow, VariancePreserving
from alignkit.policy import Full
from alignkit.training.benchmark_methods import Faint
from alignkit.training.grpo import GRPO
from alignkit.training.matching import Levels, predict, reference_output
from alignkit.training.run import Run
from alignkit.training.update import Piece
from alignkit.training.value_gradient import ValueGradient, prediction_from
from alignkit.types import Noised
from tests.policy.zoo import ZOO
from tests.training.test_regression_methods import make_run, method

FAINT = Faint()


class Blind(Faint):
    """A head that was trained on clean latents."""

    name, noise_aware = "blind", False


class Broken:
    """A noise-aware reward whose gradient is not finite at 0 noise-free difference."""

    name, kind, differentiable, noise_aware = "broken", "latent", True, True

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return ((latents - latents.detach()).abs().sqrt()).flatten(1).sum(dim=1)


def taught(tiny: GRPO, **fields: Any) -> ValueGradient:
    return method(ValueGradient, tiny, **{"guide": {FAINT: 20.0}, **fields})


def batch_of(run: Run) -> Any:
    """The first view of the first round, of all its samples."""
    experience = run.collect(0)[0]
    weights, live = run.recipe.weigh(experience.scores, run.rewards.weights, experience.groups)
    (piece,) = run.learner.pieces(0, [experience], weights, live)
    return next(Piece(piece.experience, piece.rows, piece.advantages, piece.live).batches())


def with_sigma(batch: Any, run: Run, sigma: list[float]) -> Any:
    level = torch.tensor(sigma)
    view = dataclasses.replace(batch.view, sigma=level, timestep=run.policy.timestep_of(level))
    return dataclasses.replace(batch, view=view)


def move(run: Run) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))


def test_the_target_is_the_guided_reference_of_a_flow(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(taught(tiny_recipe, guide_weight=0.5), tmp_path / "run")
    assert isinstance(run.recipe, ValueGradient)
    batch = batch_of(run)
    move(run)
    view = batch.view
    x, sigma = view.latents.double(), view.sigma.double()[:, None, None, None]
    gradient = -2.0 * 20.0 * x / x[0].numel()
    reference = reference_output(run.recipe, run.policy, view, batch.cond).double()  # the denoiser returns v
    target = reference - 0.5 * sigma / (1 - sigma) * gradient
    output = predict(run.policy, view, batch.cond).double()
    loss, logs = run.recipe.policy_step(run.policy, batch)
    assert_close(loss.double(), (output - target).square().flatten(1).mean(dim=1), rtol=1e-4, atol=1e-6)
    assert_close(logs["velocity_gap"].double(), (output - reference).square().flatten(1).mean(dim=1).detach())
    assert_close(logs["guide"].double(), -20.0 * x.square().flatten(1).mean(dim=1), rtol=1e-5, atol=0)


def test_the_target_of_an_eps_model_is_its_eps_minus_sigma_times_the_gradient(
    tiny_recipe: GRPO, tmp_path: Path
) -> None:
    entry = ZOO["sd15"]
    entry.build().save_pretrained(tmp_path / "sd15")
    recipe = taught(tiny_recipe, model=str(tmp_path / "sd15"), call={**entry.call, "guidance_scale": 1.0})
    run = make_run(recipe, tmp_path / "run")
    assert isinstance(run.recipe, ValueGradient)
    batch = batch_of(run)
    view = batch.view
    x, sigma = view.latents.double(), view.sigma.double()[:, None, None, None]
    eps = reference_output(run.recipe, run.policy, view, batch.cond).double()
    target = eps - sigma * (-2.0 * 20.0 * x / x[0].numel())  # methods.md 2.1: eps' = eps - sigma g
    loss, _ = run.recipe.policy_step(run.policy, batch)  # the weights are still the reference's
    assert_close(loss.double(), (eps - target).square().flatten(1).mean(dim=1), rtol=1e-3, atol=1e-6)
    assert math.isfinite(run.round(0)["policy/loss"])


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()])
def test_a_prediction_is_found_from_its_velocity(path: Any, prediction: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    output, x = (torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    v = paths.velocity_from(path, prediction, output, x, sigma)
    assert_close(prediction_from(path, prediction, v, x, sigma), output)


def test_singular_levels_are_not_drawn_and_never_count(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(taught(tiny_recipe, draws=4), tmp_path / "run")
    experience = run.collect(0)[0]
    assert float(experience.cond.sigmas[0]) == 1.0
    views = run.recipe.views(run.policy, experience, [torch.Generator().manual_seed(i) for i in range(6)])
    assert max(float(view.sigma.max()) for view in views if isinstance(view, Noised)) <= 0.98
    move(run)
    batch = with_sigma(batch_of(run), run, [1.0, 0.9, 0.9995, 0.5, 1.0, 0.2])
    loss, _ = run.recipe.policy_step(run.policy, batch)
    assert (loss > 0).tolist() == [False, True, False, True, False, True] and bool(loss.isfinite().all())


def test_the_change_is_clipped_sample_by_sample(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(taught(tiny_recipe, guide={FAINT: 1e6}, guide_clip=0.25), tmp_path / "run")
    _, logs = run.recipe.policy_step(run.policy, batch_of(run))
    assert_close(logs["guide_size"], torch.full((6,), 0.25), rtol=1e-4, atol=0)


def test_where_the_caption_is_dropped_the_target_is_the_reference(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(taught(tiny_recipe, caption_dropout=0.5), tmp_path / "run")
    batch = batch_of(run)
    assert batch.view.dropped is not None and 0 < int(batch.view.dropped.sum()) < 6
    loss, _ = run.recipe.policy_step(run.policy, batch)  # the weights are still the reference's
    assert ((loss == 0) == batch.view.dropped).all()


def test_every_sample_counts_whatever_its_reward(tiny_recipe: GRPO, tmp_path: Path) -> None:
    def flat(media: torch.Tensor, prompts: object) -> torch.Tensor:
        return torch.zeros(len(media))

    run = make_run(taught(tiny_recipe, rewards={flat: 1.0}, group_size=1), tmp_path / "run")
    metrics = run.round(0)
    assert metrics["groups/live"] == 1.0 and metrics["policy/grad_norm"] > 0
    assert metrics["reward/flat"] == 0.0  # measured all the same


def test_the_guide_reads_the_untrained_weights(tiny_recipe: GRPO, tmp_path: Path) -> None:
    class Reads:
        """The mean velocity of whatever weights are in force."""

        name, kind, differentiable, noise_aware = "reads", "latent", True, True
        policy: Any = None

        def bind(self, policy: Any) -> Reads:
            self.policy = policy
            return self

        def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
            return self.policy.velocity(latents, cond.timesteps[1], cond).flatten(1).mean(dim=1)

    run = make_run(taught(tiny_recipe, guide={Reads(): 1.0}), tmp_path / "run")
    batch = batch_of(run)
    before = run.recipe.policy_step(run.policy, batch)[1]
    move(run)
    after = run.recipe.policy_step(run.policy, batch)[1]
    assert_close(after["guide"], before["guide"], rtol=0, atol=0)
    assert_close(after["guide_size"], before["guide_size"], rtol=0, atol=0)
    assert bool((after["velocity_gap"] > 0).all())


@pytest.mark.parametrize("fields", [{}, {"micro_batch": 2}, {"train": Full(), "lr": 1e-4}])
def test_rounds_lower_the_error(tiny_recipe: GRPO, tmp_path: Path, fields: dict[str, Any]) -> None:
    run = make_run(taught(tiny_recipe, **fields), tmp_path / "run")
    losses = [run.round(step)["policy/error"] for step in range(4)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_a_gradient_that_is_not_finite_stops_and_names_level_and_prompt(tiny_recipe: GRPO, tmp_path: Path) -> None:
    run = make_run(taught(tiny_recipe, guide={Broken(): 1.0}), tmp_path / "run")
    with pytest.raises(AlignkitError, match=r"not finite at noise level 0\.\d+, prompt \d+ 'a red cat"):
        run.round(0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guide": {}}, "ValueGradient learns from the gradient of a noise-aware reward"),
        ({"guide": {"brightness": 1.0}}, "'brightness' scores finished media"),
        ({"guide": {Blind(): 1.0}}, "'blind' was trained on clean latents only"),
        ({"guide_weight": 0.0}, "nothing to learn"),
        ({"velocity_beta": 0.1}, "use a smaller guide_weight"),
        ({"levels": Levels(low=0.5, high=0.5)}, "levels.low=0.5"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(tiny_recipe: GRPO, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        taught(tiny_recipe, **fields).validate()
