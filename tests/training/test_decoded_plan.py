"""The plan's numbers of decoded frames are those that a run decodes, and no weights are read for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.policy import Policy
from alignkit.rewards import PerFrameMean
from alignkit.rewards.video import FrameDifference, Segmental
from alignkit.training import decoded
from alignkit.training.blueprint import Blueprint, on_meta
from alignkit.training.grpo import GRPO
from tests.policy.zoo import ZOO, shared

EARLY = Segmental("brightness", segments=1, frames="middle")


def recipe(**fields: Any) -> GRPO:
    own: dict[str, Any] = {"model": "none", "prompts": "none.txt", "rewards": {EARLY: 1.0}, "group_size": 2}
    return GRPO(**{**own, **fields})


def blueprint_of(name: str) -> Blueprint:
    """The decoder of a pipeline of the zoo, without its weights."""
    vae = shared(name).vae
    return Blueprint(type(shared(name)).__name__, {"vae": on_meta(type(vae), dict(vae.config))}, {}, {}, "zoo", None)


@pytest.mark.parametrize(
    ("name", "frames", "latents"), [("wan_t2v", 9, 2), ("cogvideox_t2v", 17, 3), ("ltx_t2v", 9, 3)]
)
def test_the_plan_decodes_what_the_policy_decodes(name: str, frames: int, latents: int) -> None:
    found = decoded.decoded(recipe(), blueprint_of(name), {"num_frames": frames})
    assert found is not None
    with Policy(shared(name)) as policy, torch.no_grad():
        cond = policy.condition(["a cat"], num_steps=1, **{**ZOO[name].call, "num_frames": frames})
        assert found["frames"] == policy.num_frames(cond) == frames
        assert found["latent_frames"] == policy.latent_frames(None, cond)
        assert found["mean_frames"] == frames // 2 + 1
        assert found["mean_latent_frames"] == policy.latent_frames(frames // 2 + 1, cond) == latents
    ((_, said),) = decoded.lines(found)
    needs_all = "as the decoder needs them" in said
    assert needs_all == (latents == found["latent_frames"])
    assert said.endswith(f"segmental: the first {frames // 2 + 1}.0 of {frames} frames on average")


def test_frames_are_averaged_over_the_rollout_batches_of_the_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\nd\n", encoding="utf-8")
    drawn = Segmental("brightness", segments=1)
    own = recipe(prompts=str(file), rewards={drawn: 1.0}, rollout_batch=4)
    prompts = [prompt for batch in decoded.batches(own) for prompt in batch]
    assert prompts == ["a", "b", "c", "d"] and [len(batch) for batch in decoded.batches(own)] == [2, 2]
    last = (drawn.chosen(9, prompts)[:, 0] + 1).tolist()
    found = decoded.decoded(own, blueprint_of("wan_t2v"), {"num_frames": 9})
    assert found is not None and found["mean_frames"] == (max(last[:2]) + max(last[2:])) / 2


def test_what_decodes_whole_videos_is_named() -> None:
    every = PerFrameMean("brightness")
    cases = {
        "frame_difference": recipe(rewards={EARLY: 1.0, FrameDifference(): 0.5}),
        "features of diversity_shaping": recipe(diversity_shaping="dino"),
    }
    for name, own in cases.items():
        assert decoded.whole_for(own) == name
        found = decoded.decoded(own, blueprint_of("wan_t2v"), {"num_frames": 9})
        assert found is not None and found["mean_latent_frames"] == found["latent_frames"] == 3
        assert dict(decoded.lines(found))["decoding"] == f"all 3 latent frames, 9 frames: whole videos for {name}"
    found = decoded.decoded(recipe(rewards={every: 1.0}), blueprint_of("wan_t2v"), {"num_frames": 9})
    assert found is not None and found["mean_latent_frames"] == 3


def test_pictures_and_recipes_that_sample_nothing_have_no_such_line() -> None:
    wan = blueprint_of("wan_t2v")
    assert decoded.decoded(recipe(), wan, {"height": 32}) is None
    assert decoded.decoded(recipe(prompts=None, data="pairs.jsonl"), wan, {"num_frames": 9}) is None
    assert decoded.decoded(recipe(), dataclasses.replace(wan, components={}), {"num_frames": 9}) is None
    assert list(decoded.lines(None)) == []
