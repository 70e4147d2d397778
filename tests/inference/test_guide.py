"""`alignkit.guide`: what it takes, what it returns, what it refuses, on a plain pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkit
from alignkit import Prompt, RecipeError
from alignkit.flow.plan import deterministic
from alignkit.inference.guide import generators_of
from alignkit.inference.method import BestOfN
from alignkit.inference.task import streams
from alignkit.policy.lora_files import save_lora
from alignkit.types import Step
from tests.policy.zoo import PROMPTS, ZOO, shared

CALL: dict[str, Any] = {**ZOO["sd3"].call, "guidance_scale": 1.0, "num_steps": 2}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def darkness(media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    return -media.mean(dim=(1, 2, 3))


def small(latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
    return -latents.flatten(1).square().mean(dim=1)


small.noise_aware = True  # type: ignore[attr-defined]


def test_the_result_holds_one_sample_per_prompt_and_what_it_cost() -> None:
    out = alignkit.guide(
        shared("sd3"), PROMPTS, rewards={"brightness": 2.0, darkness: 0.5}, budget=3, rng=rng(), **CALL
    )
    assert out.media.shape[:2] == (2, 3) and 0 <= float(out.media.min()) <= float(out.media.max()) <= 1
    torch.testing.assert_close(out.rewards, 2 * out.parts["brightness"] + 0.5 * out.parts["darkness"])
    assert out.trace["budget_used"] == 3 and out.trace["spent"]["decodes"] == 6
    assert [image.size for image in out.images] == [(32, 32)] * 2


def test_the_first_sample_of_a_larger_budget_is_the_unguided_one() -> None:
    plain = alignkit.guide(shared("sd3"), PROMPTS, "brightness", budget=1, rng=rng(), **CALL)
    with alignkit.Policy(shared("sd3")) as policy:
        settings = {name: value for name, value in CALL.items() if name != "num_steps"}
        cond = policy.condition(PROMPTS, num_steps=2, **settings)
        rolled = policy.rollout(cond, deterministic(2), streams(generators_of(rng(), 2), 1))
    assert torch.equal(plain.latents, rolled.x0)


def test_one_text_one_callable_and_the_names_of_diffusers_are_enough() -> None:
    settings = {name: value for name, value in CALL.items() if name != "num_steps"}
    out = alignkit.guide(shared("sd3"), "a red cat", darkness, num_inference_steps=2, **settings)
    assert len(out.media) == 1 and out.trace["budget"] == BestOfN.default_budget
    with pytest.raises(RecipeError, match="same thing"):
        alignkit.guide(shared("sd3"), "a red cat", darkness, num_inference_steps=3, **CALL)


def test_judges_are_reported_and_choose_nothing() -> None:
    alone = alignkit.guide(shared("sd3"), PROMPTS, {darkness: 1.0}, rng=rng(), **CALL)
    judged = alignkit.guide(shared("sd3"), PROMPTS, {darkness: 1.0}, rng=rng(), judges=["brightness"], **CALL)
    assert torch.equal(alone.media, judged.media) and torch.equal(alone.rewards, judged.rewards)
    torch.testing.assert_close(judged.parts["brightness"], -judged.parts["darkness"], atol=0.1, rtol=0)


def test_judges_see_chosen_samples_only() -> None:
    seen: list[int] = []

    def judge(media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        seen.append(len(media))
        return media.mean(dim=(1, 2, 3))

    for method in ("best_of_n", "fk"):
        out = alignkit.guide(shared("sd3"), PROMPTS, "brightness", method, 4, rng(), judges=[judge], **CALL)
        assert seen == [2] and out.trace["spent"]["rewards"] >= 8
        torch.testing.assert_close(out.parts["judge"], out.media.mean(dim=(1, 2, 3)))
        seen.clear()


def test_a_noise_aware_function_scores_the_clean_latents() -> None:
    out = alignkit.guide(shared("sd3"), PROMPTS, {small: 1.0}, rng=rng(), **CALL)
    torch.testing.assert_close(out.rewards, small(out.latents, torch.zeros(2), None))


def test_a_noise_aware_reward_that_fails_stops_the_run_and_names_the_prompt() -> None:
    def broken(latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return torch.where(sigma > 0.9, 1.0, float("nan")) * latents.flatten(1).mean(dim=1)

    broken.noise_aware = True  # type: ignore[attr-defined]
    with pytest.raises(alignkit.RewardError, match="'broken' returned nan at noise level .* 'a red cat'"):
        alignkit.guide(shared("sd3"), PROMPTS, {broken: 1.0}, "nrg", **CALL)


def test_a_lora_that_the_pipeline_has_loaded_is_sampled_with(tmp_path: Path) -> None:
    pipe = ZOO["sd3"].build()
    before = alignkit.guide(pipe, PROMPTS, "brightness", budget=1, rng=rng(), **CALL)
    with alignkit.Policy(ZOO["sd3"].build(), alignkit.LoRA(rank=2)) as policy:
        for number, parameter in enumerate(policy.parameters()):
            torch.nn.init.normal_(parameter, std=0.3, generator=rng(number))
        trained = alignkit.guide(policy, PROMPTS, "brightness", budget=1, rng=rng(), **CALL)
        save_lora(policy, tmp_path)
    pipe.load_lora_weights(tmp_path)
    loaded = alignkit.guide(pipe, PROMPTS, "brightness", budget=1, rng=rng(), **CALL)
    assert not torch.allclose(before.latents, trained.latents, atol=1e-3)
    torch.testing.assert_close(loaded.latents, trained.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "best_of_m"}, "nearest: 'best_of_n'"),
        ({"method": "best_of_n(count=3)"}, "has no option 'count'"),
        ({"method": 'fk(noise="a")'}, "noise='a'"),
        ({"method": 'nrg(weight="a")'}, "wrong kind"),
        ({"budget": 0.5}, "costs 1"),
        ({"budget": float("nan")}, "costs 1"),
        ({"rewards": 'win_rate(judge="pair_judge(server=\\"http://127.0.0.1:9\\")")'}, "compares samples"),
        ({"rng": [rng()]}, "1 generators for 2 prompts"),
        ({"latents": torch.zeros(1)}, "latents"),
        ({"rewards": {}}, "no rewards"),
        ({"method": "nrg"}, "noise-aware"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(changes: dict[str, Any], said: str) -> None:
    call = {"rewards": "brightness", "budget": 2, **CALL, **changes}
    with pytest.raises(RecipeError, match=said):
        alignkit.guide(shared("sd3"), PROMPTS, **call)


def test_a_step_shows_steering_what_the_run_is_about_to_do() -> None:
    seen: list[Step] = []

    def watch(step: Step) -> Step:
        seen.append(step)
        return step

    with alignkit.Policy(shared("sd3")) as policy:
        cond = policy.condition(PROMPTS, num_steps=3, **{k: v for k, v in CALL.items() if k != "num_steps"})
        plain = policy.rollout(cond, deterministic(3), rng())
        steered = policy.rollout(cond, deterministic(3), rng(), steer=watch)
        again = policy.rollout(cond, deterministic(3), rng(), steer=watch, repeats={1: 3})
    assert torch.equal(plain.x0, steered.x0) and not torch.equal(plain.x0, again.x0)
    assert [step.index for step in seen] == [0, 1, 2, 0, 1, 1, 1, 2]
    first = seen[0]
    with torch.no_grad():
        velocity = policy.velocity(first.latents, cond.timesteps[0], cond)
    torch.testing.assert_close(first.velocity, velocity)
    torch.testing.assert_close(first.transition(first.latents, velocity).mean, seen[1].latents)


def test_a_repeated_step_begins_at_its_own_noise_level() -> None:
    spread: list[float] = []

    def quiet(step: Step) -> Step:
        spread.append(float(step.latents.std()))
        return dataclasses.replace(step, velocity=step.latents / step.sigma)  # the data are all 0

    with alignkit.Policy(shared("sd3")) as policy:
        cond = policy.condition(PROMPTS, num_steps=4, **{k: v for k, v in CALL.items() if k != "num_steps"})
        policy.rollout(cond, deterministic(4), rng(), steer=quiet, repeats={2: 2})
    sigmas = cond.sigmas[:-1][[0, 1, 2, 2, 3]]
    torch.testing.assert_close(torch.tensor(spread), sigmas, atol=0.05, rtol=0)
