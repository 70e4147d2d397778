"""What a policy refuses, and that the sentence says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

import alignkit
from tests.policy import tiny_extra, tiny_more, tiny_video
from tests.policy.zoo import PROMPTS, ZOO, shared

SMALL = {"height": 32, "width": 32}


def test_a_pipeline_without_prompts_is_refused() -> None:
    with pytest.raises(alignkit.PolicyError, match="takes no `prompt`"):
        alignkit.Policy(tiny_extra.svd())


def test_guidance_that_remembers_earlier_steps_is_refused() -> None:
    pipe = tiny_more.hunyuan_image_momentum()
    with alignkit.Policy(pipe) as policy, pytest.raises(alignkit.PolicyError, match="momentum"):
        policy.condition(PROMPTS, num_steps=4, **SMALL)


def test_a_solver_that_is_handed_the_previous_prediction_still_gives_its_single_step() -> None:
    pipe = tiny_video.cogvideox_t2v()
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    call = dict(ZOO["cogvideox_t2v"].call)
    outputs: list[torch.Tensor] = []
    own_step = pipe.scheduler.step

    def record(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output)
        return own_step(model_output, *args, **kwargs)

    with alignkit.Policy(pipe) as policy, torch.no_grad():
        cond = policy.condition(PROMPTS, num_steps=4, **call)
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        first = policy.model_output(x, cond.timesteps[0], cond)
        pipe.scheduler.step = record
        pipe(prompt=list(PROMPTS), num_inference_steps=4, latents=x, output_type="latent", **call)
    assert torch.equal(first, outputs[0])


@pytest.mark.parametrize(
    ("keyword", "instead"),
    [
        ("latents", "initial_latents"),
        ("generator", "seed"),
        ("num_inference_steps", "num_steps"),
        ("timesteps", "num_steps"),
        ("output_type", "decode"),
        ("num_images_per_prompt", "repeat"),
    ],
)
def test_keywords_that_alignkit_sets_itself_are_refused_with_what_to_use(keyword: str, instead: str) -> None:
    with alignkit.Policy(shared("sd15")) as policy, pytest.raises(alignkit.RecipeError, match=instead):
        policy.condition(PROMPTS, num_steps=4, **SMALL, **{keyword: 3})


def test_a_keyword_that_the_pipeline_does_not_have_is_refused_with_those_it_has() -> None:
    with alignkit.Policy(shared("sd15")) as policy, pytest.raises(alignkit.RecipeError, match="guidance_scale"):
        policy.condition(PROMPTS, num_steps=4, true_cfg_scale=3.0, **SMALL)


def test_latents_of_another_batch_size_are_refused() -> None:
    with alignkit.Policy(shared("sd15")) as policy:
        cond = policy.condition(PROMPTS, num_steps=4, **SMALL)
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        with pytest.raises(alignkit.RecipeError, match="1 latents for a conditioning of 2"):
            policy.model_output(x[:1], cond.timesteps[0], cond)
        with pytest.raises(alignkit.RecipeError, match="timesteps of shape"):
            policy.model_output(x, cond.timesteps[:3], cond)
