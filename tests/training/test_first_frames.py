"""A round decodes the frames that its rewards look at, and gets the scores of whole videos."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.errors import RewardError
from alignkit.flow.plan import deterministic
from alignkit.policy import Policy
from alignkit.policy.memory import Decode
from alignkit.rewards import Weighted, load
from alignkit.rewards.video import FrameDifference, Segmental
from alignkit.training.experience import Experience, collect
from alignkit.training.grpo import GRPO
from alignkit.training.scoring import Scoring, Worker
from alignkit.training.setup import policy_of
from alignkit.types import Prompt
from tests.policy.test_frames import received
from tests.policy.zoo import ZOO, shared

FRAMES = 9
BRIGHTNESS = load("brightness")
EARLY = Segmental(BRIGHTNESS, segments=1, frames="middle")  # frame 4 of 9, the last of the second latent frame of three


@pytest.fixture(scope="module")
def policy() -> Any:
    with Policy(shared("wan_t2v")) as policy:
        yield policy


def collected(policy: Policy, scoring: Scoring, **how: Any) -> tuple[Experience, list[int]]:
    """Four samples, two at a time; with how many latent frames reached the decoder in each call of the round."""
    call = {**ZOO["wan_t2v"].call, "guidance_scale": 1.0, "num_frames": FRAMES}
    cond = policy.condition([Prompt("a cat", id=0), Prompt("a dog", id=1)], num_steps=1, **call)

    def rollout(cond: Any, *, rng: list[torch.Generator]) -> Any:
        return policy.rollout(cond, deterministic(1), rng)

    policy.num_frames(cond)
    policy.latent_frames(5, cond)  # the decoder is watched before it is counted
    with received(policy.pipe.vae) as shapes:
        own = {"group_size": 2, "key": (0,), "first": 0, **how}
        experience = collect(policy, cond, rollout, scoring, batch=2, poll=lambda: None, **own)
    return experience, [shape[2] for shape in shapes]


@pytest.mark.parametrize("beside", [False, True])
def test_a_round_decodes_what_its_rewards_look_at_and_scores_whole_videos(policy: Policy, beside: bool) -> None:
    worker = Worker() if beside else None
    found, decoded = collected(policy, Scoring(Weighted(EARLY), worker=worker))
    whole, all_decoded = collected(policy, Scoring(Weighted(EARLY)), keep_media=True)
    if worker is not None:
        worker.close()
    assert decoded == [2, 2] and all_decoded == [3, 3]
    assert found.media is None and whole.media is not None and whole.media.shape[1] == FRAMES
    torch.testing.assert_close(found.scores.total, whole.scores.total)
    torch.testing.assert_close(found.scores.parts["segmental"], BRIGHTNESS(whole.media[:, 4], whole.cond.prompts))


def test_what_looks_at_whole_videos_gets_them(policy: Policy) -> None:
    assert collected(policy, Scoring(Weighted([(EARLY, 1.0), (FrameDifference(), 0.5)])))[1] == [3, 3]
    assert collected(policy, Scoring(Weighted(EARLY), embed=lambda media: media.flatten(1)))[1] == [3, 3]


class Ranks(Segmental):
    """Compares the samples of a group."""

    groupwise = True


def test_groups_that_straddle_rollout_batches_are_scored_whole(policy: Policy) -> None:
    reward = Ranks(BRIGHTNESS, segments=2, frames="random")
    found, decoded = collected(policy, Scoring(Weighted(reward)), group_size=3)
    whole, _ = collected(policy, Scoring(Weighted(reward)), keep_media=True, group_size=3)
    assert decoded == [3, 3, 3]
    torch.testing.assert_close(found.scores.total, whole.scores.total)


def test_a_round_draws_other_frames_than_the_last_the_same_for_a_group_and_whichever_process(policy: Policy) -> None:
    seen: list[list[list[int]]] = []

    class Noted(Segmental):
        def of_frames(self, frames: torch.Tensor, index: torch.Tensor, num_frames: int, prompts: Any) -> Any:
            seen[-1] += index.tolist()
            return super().of_frames(frames, index, num_frames, prompts)

    scoring = Scoring(Weighted(Noted(BRIGHTNESS, segments=2)))
    for key, first in (((0, "rollout", 0), 0), ((0, "rollout", 1), 0), ((0, "rollout", 0), 100)):
        seen.append([])
        collected(policy, scoring, key=key, first=first)
    one, other, again = seen
    assert one == again and one != other
    assert one[0] == one[1] and one[2] == one[3] and one[0] != one[2]


def test_a_video_reward_on_a_pipeline_of_pictures_says_what_it_scores() -> None:
    with Policy(shared("sd15")) as policy:
        cond = policy.condition(["a cat"], num_steps=1, **{**ZOO["sd15"].call, **ZOO["sd15"].variants["unguided"]})

        def rollout(cond: Any, *, rng: list[torch.Generator]) -> Any:
            return policy.rollout(cond, deterministic(1), rng)

        own = Scoring(Weighted(EARLY))
        with pytest.raises(RewardError, match="'segmental' scores video media"):
            collect(policy, cond, rollout, own, group_size=1, batch=None, key=(0,), first=0, poll=lambda: None)


def test_the_recipes_decode_reaches_the_decoder_and_leaves_it_at_the_end(tmp_path: Path) -> None:
    shared("ltx_t2v").save_pretrained(tmp_path)
    decode = Decode(slicing=True, framewise=True, batch=2)
    recipe = GRPO(model=str(tmp_path), prompts="none.txt", rewards={EARLY: 1.0}, decode=decode)
    runtime: Any = SimpleNamespace(dtype=torch.float32, device="cpu")
    with policy_of(recipe, runtime) as policy:
        vae = policy.pipe.vae
        assert vae.use_slicing and vae.use_framewise_decoding and policy.codec.batch == 2
    assert not vae.use_slicing and not vae.use_framewise_decoding
