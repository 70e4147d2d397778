"""The video reward of moving shapes: its pairs, its base, what ships, and how it is trained."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignkit.rewards.loading import load, load_file
from alignkit.rewards.video_reward import VideoReward
from alignkit.shipped import path
from alignkit.training.examples import LabelBatch
from alignkit.training.recipe_files import Source
from alignkit.training.recipe_files import load as load_recipe
from alignkit.training.reward_losses import bradley_terry_ties
from alignkit.types import Prompt
from tests.recipes.descent import descent

judge = load_file(path("recipes", "shapes", "video_judge.py"))
contests = judge.contests
world = contests.world
PROMPT = "a red circle moves right"
RIGHT = contests.Shown("red", "circle", "moves right")
REWARD, RECIPE = path("assets", "shapes", "reward"), path("recipes", "shapes_reward.py")


@cache
def shipped() -> VideoReward:
    return VideoReward(str(REWARD), str(REWARD / "base"), **judge.OPTIONS)


# pairs


def shows(**changes: Any) -> Any:
    return dataclasses.replace(RIGHT, **changes)


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        (shows(), shows(look="blur", spoilt=0.6), [1, 0, 0]),
        (shows(jerks=0.3), shows(jerks=0.9), [0, 1, 0]),
        (shows(still=True), shows(jerks=1.0), [0, -1, -1]),
        (shows(colour="blue"), shows(), [0, 0, -1]),
        (shows(shape="cross"), shows(colour="blue"), [0, 0, 0]),
        (shows(still=True), shows(direction="rises"), [0, -1, 0]),
        (shows(spoilt=0.5), shows(spoilt=0.55), [0, 0, 0]),
    ],
    ids=["look", "jerks", "still", "colour", "one-each", "no-way-and-another-way", "too-near"],
)
def test_labels_compare_look_motion_and_what_was_asked_each_on_its_own(first: Any, second: Any, labels: Any) -> None:
    assert contests.told(PROMPT, first, second) == labels
    assert contests.told(PROMPT, second, first) == [-label for label in labels]


def test_about_a_third_of_labels_are_ties_and_pairs_are_the_same_for_the_same_seed() -> None:
    train, _ = world.split_prompts()
    prompts, first, second, labels = contests.drawn(np.random.default_rng(0), 150, train)
    assert set(prompts) <= set(train) and first.shape == second.shape == (150, 9, 32, 32, 3)
    assert set(np.unique(labels)) == {-1, 0, 1}
    assert ((labels == 0).mean(axis=0) > 0.2).all() and ((labels == 0).mean(axis=0) < 0.5).all()
    again = contests.drawn(np.random.default_rng(0), 150, train)
    assert again[0] == prompts and all((a == b).all() for a, b in zip(again[1:], (first, second, labels), strict=True))


def test_people_err_and_leave_out_as_often_as_asked() -> None:
    labels = contests.as_people_answer(np.random.default_rng(0), np.ones((4000, 3), int), 0.3, 0.1)
    assert abs((labels == contests.INVALID).mean() - 0.1) < 0.02
    assert abs((labels == 1).mean() - 0.9 * (0.7 + 0.1)) < 0.02


@pytest.mark.parametrize("look", contests.LOOKS)
def test_a_stronger_flaw_of_look_is_farther_from_the_clean_clip(look: str) -> None:
    clean, weak, strong = (
        contests.film(np.random.default_rng(0), shows(look=look, spoilt=s)).astype(float) for s in (0.0, 0.3, 1.0)
    )
    assert 0 < abs(weak - clean).mean() < abs(strong - clean).mean()


def test_still_clips_stand_and_jerky_ones_leave_their_line() -> None:
    def centres(**changes: Any) -> np.ndarray:
        clip = contests.film(np.random.default_rng(0), shows(**changes)).astype(float)
        weight = abs(clip - np.median(clip, axis=(1, 2), keepdims=True)).sum(axis=-1)
        rows = (weight.sum(axis=2) * np.arange(32)).sum(axis=1) / weight.sum(axis=(1, 2))
        columns = (weight.sum(axis=1) * np.arange(32)).sum(axis=1) / weight.sum(axis=(1, 2))
        return np.stack([columns, rows], axis=1)

    assert np.ptp(centres(still=True), axis=0).max() < 1e-9
    across, along = np.ptp(centres()[:, 1]), np.diff(centres()[:, 0])
    assert across < 0.2 and (along > 1).all()
    assert np.ptp(centres(jerks=1.0)[:, 1]) > 2


# the reward


def test_the_base_learns_to_say_what_a_clip_shows_and_what_matches_a_prompt() -> None:
    shown = shows(direction="rises", look="blur", spoilt=0.9, jerks=0.3)
    assert contests.described(shown) == "is red circle rises look strong blur motion shaky"
    assert contests.matched(shown, PROMPT) == "colour yes shape yes direction no"
    still = shows(still=True)
    assert contests.described(still) == "is red circle stands look fine motion still"
    assert contests.matched(still, PROMPT).endswith("direction no")


def test_a_step_of_the_base_lowers_its_loss_and_reads_only_answers() -> None:
    torch.manual_seed(0)
    model, rng = judge.speaker.speaker(), torch.Generator().manual_seed(0)
    clips, said, places = judge.speaker.described_clips(8, [PROMPT], seed=0)
    batch = LabelBatch(contests.as_media(clips), said, places)
    _, words, pointing = model(batch.media, batch.prompts)
    answered = [text.split() for text in said]
    answered = [text[text.index("is" if "is" in text else "colour") + 1 :] for text in answered]
    assert model.reader.tokenizer.convert_ids_to_tokens(words) == [f"Ġ{word}" for text in answered for word in text]
    assert pointing.shape == places.shape == (8, 4, 4)
    losses = descent(model, judge.speaker.answers, batch, rng, steps=5)
    assert losses[-1] < 0.9 * losses[0]


def test_places_are_where_the_shape_is_and_how_far_it_moves() -> None:
    centres = torch.stack([torch.arange(9.0) * 2 + 3, torch.full((9,), 16.0)], dim=1)
    found = judge.speaker.pointed(centres)
    frames = judge.speaker.LOOKED_AT
    assert frames == [0, 1, 2, 3, 5, 6, 7, 8]
    middles = [(centres[a, 0] + centres[b, 0]) / 2 / 16 - 1 for a, b in zip(frames[::2], frames[1::2], strict=True)]
    assert_close(found, torch.stack([torch.tensor([m, 0.0, 1.0, 0.0]) for m in middles]))


def test_the_question_has_look_and_motion_before_the_prompt_and_no_word_is_broken_up() -> None:
    tokenizer = judge.speaker.build_tokenizer()
    tokenizer.add_tokens(list(judge.TOKENS), special_tokens=True)
    tokens = tokenizer.tokenize(judge.QUESTION.replace("{prompt}", "a purple triangle moves left"))
    expected = ["look", judge.TOKENS[0], "motion", judge.TOKENS[1]]
    assert tokens == [*expected, "a", "Ġpurple", "Ġtriangle", "Ġmoves", "Ġleft", judge.TOKENS[2]]
    said = tokenizer.tokenize(" " + contests.described(shows(look="low contrast", spoilt=0.9, jerks=0.4)))
    assert "".join(said).replace("Ġ", " ").split() == [token.strip("Ġ") for token in said]


def test_the_shipped_reward_prefers_clips_without_a_flaw() -> None:
    _, held_out = world.split_prompts()
    reward = shipped()
    found = judge.beaten(
        lambda media, prompts: torch.stack(list(reward.components(media, prompts).values()), dim=1),
        contests.probes(np.random.default_rng(11), held_out),
    )
    assert found.keys() == {f"{d}: beats {flaw}" for d, flaws in contests.FLAWS.items() for flaw in flaws}
    seen = ("MQ: beats still", "MQ: beats jerky", "VQ: beats flicker", "VQ: beats low contrast", "TA: beats no motion")
    assert min(found[name] for name in seen) > 0.85, found
    assert found["TA: beats other direction"] > 0.65, found


def test_the_shipped_reward_sees_all_but_one_of_9_frames_and_has_a_gradient_to_them() -> None:
    media = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    shipped()(media, [Prompt(PROMPT)]).sum().backward()
    assert media.grad is not None
    assert (media.grad.flatten(2).abs().amax(dim=2)[0] > 0).sum() == 8


def test_look_and_motion_do_not_know_the_prompt() -> None:
    media = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, other = (shipped().components(media, [Prompt(text)]) for text in (PROMPT, "a blue cross falls"))
    assert_close(one["VQ"], other["VQ"], atol=1e-5, rtol=1e-5)
    assert_close(one["MQ"], other["MQ"], atol=1e-5, rtol=1e-5)
    assert abs(float((one["TA"] - other["TA"]).detach())) > 1e-3


def test_the_shipped_reward_is_small_and_loads_from_a_spec() -> None:
    assert sum(file.stat().st_size for file in REWARD.rglob("*") if file.is_file()) < 3 * 2**20
    settings = json.loads((REWARD / "model_config.json").read_text("utf-8"))
    assert settings["inference_config"].keys() == judge.NORMALISATION.keys()
    folder = "shipped:assets/shapes/reward"
    reward: Any = load(f'video_reward(weights="{folder}", base="{folder}/base", media_fps=8, dtype="float32")')
    media = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_close(reward(media, [Prompt(PROMPT)]), shipped()(media, [Prompt(PROMPT)]), atol=1e-5, rtol=1e-5)


def test_the_reward_in_training_is_saved_as_what_scores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, model = judge.Contests(pairs=12, held_out_pairs=2), judge.scorer(str(REWARD / "base"))
    rng = torch.Generator().manual_seed(0)
    batch = data.batch(8, rng)
    losses = descent(model, bradley_terry_ties, batch, rng)
    assert losses[-1] < 0.8 * losses[0]
    model.save(tmp_path)
    saved = VideoReward(str(tmp_path), str(tmp_path / "base"), normalised=False, **judge.OPTIONS)
    with torch.no_grad():
        found = torch.stack(list(saved.components(batch.winners, batch.prompts).values()), dim=1)
        assert_close(found, model(batch.winners, batch.prompts), atol=0.02, rtol=0.02)  # float16
    mean = json.loads((tmp_path / "model_config.json").read_text("utf-8"))["inference_config"]["TA_mean"]
    assert abs(mean - float(found[:, 2].mean())) < 3 * float(found[:, 2].std())


def test_variants_differ_in_what_they_are_named_for() -> None:
    plain, bt, control = (load_recipe(Source(RECIPE, name)) for name in ("recipe", "bt", "control"))
    assert dataclasses.replace(bt, loss=plain.loss, steps=plain.steps) == plain
    assert dataclasses.replace(control, data=plain.data, steps=plain.steps) == plain and "shuffled=True" in control.data
