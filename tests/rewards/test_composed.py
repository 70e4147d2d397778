"""Rewards made of two."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.rewards import PerFrameMean, Weighted, describe, evaluate, load
from alignkit.rewards.composed import Gated, Hybrid
from alignkit.types import Prompt

PROMPTS = [Prompt("one", id=1), Prompt("two", id=2), Prompt("three", id=3)]


def level(media, prompts):
    return media.mean(dim=(1, 2, 3))


def length(media, prompts):
    return [None if prompt == "two" else len(prompt) for prompt in prompts]


def fails_on_two(media, prompts):
    return [math.nan if prompt == "two" else 1.0 for prompt in prompts]


class Unsure:
    """Scores the level, surer of brighter pictures."""

    name, kind, differentiable = "unsure", "image", True

    def __call__(self, media, prompts):
        return media.mean(dim=(1, 2, 3))

    def uncertainty(self, media, prompts):
        return 1 - media.mean(dim=(1, 2, 3))


@pytest.fixture
def media() -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.5, 0.8)])


def test_a_sample_that_does_not_pass_the_gate_gets_the_constant(media: torch.Tensor) -> None:
    reward = Gated("brightness", level, threshold=0.5, below=-1.0)
    assert_close(reward(media, PROMPTS), torch.tensor([-1.0, 0.5, 0.8]))
    assert reward.counted() == {"passed": pytest.approx(2 / 3)}
    assert Weighted(Gated("brightness", level)).counted() == {}


def test_a_gate_that_does_not_apply_or_failed_is_no_gate_that_closed(media: torch.Tensor) -> None:
    scores = Weighted(Gated(level, length, threshold=4.0), on_error="mask")(media, PROMPTS)
    assert_close(scores.total, torch.tensor([0.0, math.nan, 0.8]), equal_nan=True)
    assert scores.failed == {"gated": 0}
    scores = Weighted(Gated(level, fails_on_two), on_error="mask")(media, PROMPTS)
    assert scores.total.isnan().tolist() == [False, True, False] and scores.failed == {"gated": 1}


def test_the_gradient_goes_through_what_passes_and_not_through_the_gate(media: torch.Tensor) -> None:
    leaf = media.requires_grad_()
    Gated("brightness", Unsure(), threshold=0.4)(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.flatten(1).any(dim=1).tolist() == [False, True, True]


def test_a_hybrid_averages_by_confidence_and_where_the_rule_does_not_apply_the_model_is_alone(
    media: torch.Tensor,
) -> None:
    reward = Hybrid(level, length, confidence=3.0)
    wanted = [(3 * 0.2 + 3) / 4, 0.5, (3 * 0.8 + 5) / 4]
    assert_close(reward(media, PROMPTS), torch.tensor(wanted))
    failed = Weighted(Hybrid(level, fails_on_two), on_error="mask")(media, PROMPTS)
    assert failed.total.isnan().tolist() == [False, True, False] and failed.failed == {"hybrid": 1}


def test_the_models_own_uncertainty_weighs_its_reward(media: torch.Tensor) -> None:
    found = Hybrid(Unsure(), length, confidence="uncertainty")(media, PROMPTS)
    trust = math.exp(-0.8)
    assert_close(found[0], torch.tensor((trust * 0.2 + 3) / (trust + 1)))


def test_a_reward_without_uncertainty_cannot_weigh_itself(media: torch.Tensor) -> None:
    with pytest.raises(RecipeError, match="does not say how uncertain"):
        Hybrid("brightness", length, confidence="uncertainty").prepare()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hybrid(level, length, confidence=-1.0), "at least 0"),
        (lambda: Hybrid(level, length, confidence=0.0, rule_confidence=0.0), "one of them above"),
        (lambda: Hybrid(level, length, confidence="sure"), "'uncertainty'"),
        (lambda: Gated(PerFrameMean(level), level).kind, "one kind"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_both_can_be_written_in_a_recipe_as_text(media: torch.Tensor) -> None:
    spec = 'alignkit.rewards.composed:Gated(reward="brightness", gate="brightness", threshold=0.5)'
    reward = load(spec)
    assert evaluate(reward, media, PROMPTS).scores.tolist() == [0.0, pytest.approx(0.5), pytest.approx(0.8)]
    record = json.loads(json.dumps(describe(reward)))
    assert record["gate"]["name"] == "brightness" and record["options"]["threshold"] == 0.5


class Bindable:
    """Part of a generator."""

    name, kind, differentiable = "own", "image", False

    def __init__(self, policy: object = None) -> None:
        self.policy = policy

    def bind(self, policy: object) -> Bindable:
        return Bindable(policy)

    def __call__(self, media, prompts):
        return [1.0] * len(prompts)


def test_a_part_that_belongs_to_the_generator_is_bound_inside() -> None:
    rewards = Weighted({Gated(level, Bindable()): 1.0, level: 1.0})
    rewards.bind("the policy")
    gated = rewards.rewards["gated"]
    assert isinstance(gated, Gated) and isinstance(gated.parts[1], Bindable)
    assert gated.parts[1].policy == "the policy"
    assert rewards.of_policy == {"gated"}
    again = rewards.and_judges(["brightness"])
    again.bind("another")
    assert again.rewards["gated"] is gated  # bound once, so that its networks are loaded once
