"""Formulas of the text rewards: several targets, extra text, the published variant, video."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from einops import repeat
from rapidfuzz.distance import Levenshtein

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate, load
from alignkit.rewards.loading import describe
from alignkit.rewards.ocr import OCR, OCRVideo, mean_of_positive
from alignkit.rewards.tesseract import Tesseract, available
from alignkit.rewards.text import (
    Match,
    best_order_similarity,
    edit_similarity,
    flow_grpo_similarity,
    similarity,
)
from alignkit.types import Prompt
from tests.rewards.signs import prompt_text, sign

needs_tesseract = pytest.mark.skipif(
    not available(), reason="the program tesseract is not installed (Debian: tesseract-ocr)"
)
READS = ("", "OPEN", "open", "O P E N", "OPE", "OPENED", "WE ARE OPEN NOW", "XXXX", "CLOSED TODAY", "OPAN")


class Script:
    """Reads what is written for each image in turn, and counts the images it is shown."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.seen = list(texts), 0

    def read(self, media: torch.Tensor) -> list[str]:
        self.seen += len(media)
        return self.texts[: len(media)]

    def describe(self) -> dict[str, str]:
        return {"engine": "script", "version": "1"}


def published_image_reward(read: str, prompt: str) -> float:
    """Literal transcription of Flow-GRPO's image reward."""
    target = prompt.split('"')[1].replace(" ", "").lower()
    rec = read.replace(" ", "").lower()
    dist = 0 if target in rec else Levenshtein.distance(rec, target)
    dist = min(dist, len(target))
    return 1 - dist / len(target)


def published_video_reward(reads: Sequence[str], prompt: str) -> float:
    """Literal transcription of its video reward: mean over the read frames with a reward, no substring shortcut."""
    target = prompt.split('"')[1].replace(" ", "").lower()
    rewards = []
    for read in reads:
        dist = min(Levenshtein.distance(read.replace(" ", "").lower(), target), len(target))
        reward = 1 - dist / len(target)
        if reward > 0:
            rewards.append(reward)
    return sum(rewards) / len(rewards) if rewards else 0.0


@pytest.mark.parametrize("read", READS)
def test_the_published_formula_is_that_of_flow_grpo(read: str) -> None:
    prompt = 'a sign that says "OPEN" over "NOT THIS"'
    reward = OCR(engine=Script(read), formula="flow_grpo")
    score = evaluate(reward, torch.zeros(1, 3, 8, 8), [prompt]).scores
    torch.testing.assert_close(score, torch.tensor([published_image_reward(read, prompt)]))


def test_the_published_formula_is_won_by_a_picture_full_of_words_and_ours_is_not() -> None:
    spam = "CAT DOG OPEN SALE HOTEL BUS"
    assert flow_grpo_similarity(spam, "OPEN") == 1.0
    assert similarity([spam], ["OPEN"]).item() < 0.25


@pytest.mark.parametrize("extra_text", [0.01, 0.25, 0.5, 1.0])
def test_spam_never_reaches_what_the_target_alone_gets(extra_text: float) -> None:
    scores = [edit_similarity("OPEN" + "SPAM" * count, "OPEN", extra_text) for count in range(6)]
    assert scores[0] == 1.0 and all(later < sooner for sooner, later in pairwise(scores))
    assert all(0 <= edit_similarity(read, "OPEN", extra_text) <= 1 for read in READS)


@pytest.mark.parametrize("read", READS)
def test_with_extra_text_of_1_it_is_the_plain_similarity(read: str) -> None:
    slightly_less = edit_similarity(read, "OPEN", 0.99)
    assert edit_similarity(read, "OPEN") == pytest.approx(similarity([read], ["OPEN"]).item())
    assert abs(slightly_less - edit_similarity(read, "OPEN")) < 0.02


def test_cheaper_extra_text_is_charged_in_proportion() -> None:
    assert edit_similarity("OPENXX", "OPEN", 0.5) == pytest.approx(1 - 1 / 5)
    assert edit_similarity("OP", "OPEN", 0.5) == pytest.approx(0.5), "what is missing costs 1 whatever extra text costs"


def test_several_targets_are_read_in_the_order_of_the_prompt_unless_any_order_is_allowed() -> None:
    prompt = [Prompt('"HOT" beside "TEA"')]
    assert Match().scores(["HOT TEA"], prompt).item() == 1.0
    assert Match().scores(["TEA HOT"], prompt).item() < 0.5
    assert Match(ordered=False).scores(["TEA HOT"], prompt).item() == 1.0


def test_one_word_does_not_serve_two_targets_that_look_alike() -> None:
    assert best_order_similarity("CAT", ["CAT", "CAR"]) == pytest.approx(0.5)
    assert best_order_similarity("CAR CAT", ["CAT", "CAR"]) == 1.0
    assert best_order_similarity("CAT CAT CAT CAT", ["CAT", "CAR"]) < 0.5


def test_too_many_targets_in_any_order_name_the_prompt() -> None:
    prompt = Prompt("a poster", id=5, columns={"target": list("ABCDEF")})
    Match().check([prompt])
    with pytest.raises(RewardError, match="prompt 5 has 6 targets; ordered=False takes at most 5"):
        Match(ordered=False).check([prompt])


@pytest.mark.parametrize("text", ["no quotes at all", 'an unclosed "', 'empty "" ones', "“curly” ones"])
def test_a_prompt_without_quotes_is_refused_before_any_image_whatever_the_formula(text: str) -> None:
    with pytest.raises(RewardError, match="prompt 8 .*no text between straight double quotes"):
        OCR(engine=Script(), formula="flow_grpo").check_prompts([Prompt(text, id=8)])
    if "curly" not in text:
        with pytest.raises(RewardError, match="prompt 8 .*names no text to draw"):
            OCRVideo(engine=Script()).check_prompts([Prompt(text, id=8)])


def test_accents_count_and_their_encoding_does_not() -> None:
    composed, decomposed = "CAF\u00c9", "CAFE\u0301"
    assert similarity([composed, "CAFE"], [decomposed] * 2).tolist() == [1.0, 0.75]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formula": "exact"}, "formula='exact'; choose one of edit, flow_grpo"),
        ({"extra_text": 0.0}, "a picture full of words would win"),
        ({"extra_text": 1.5}, "extra_text=1.5; expected 0.01 to 1"),
        ({"formula": "flow_grpo", "extra_text": 0.5}, "belong to formula='edit'"),
        ({"formula": "flow_grpo", "ordered": False}, "belong to formula='edit'"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(options: dict, message: str) -> None:
    for reward in (OCR, OCRVideo):
        with pytest.raises(RecipeError, match=message):
            reward(engine=Script(), **options)


def test_the_published_video_reward_is_that_of_flow_grpo() -> None:
    reads = ["OPEN", "XXXX", "OPAN", "WE ARE OPEN NOW"]
    prompt = 'a sign that says "OPEN"'
    reward = OCRVideo(engine=Script(*reads), formula="flow_grpo")
    score = evaluate(reward, torch.zeros(1, 13, 3, 8, 8), [prompt]).scores
    torch.testing.assert_close(score, torch.tensor([published_video_reward(reads, prompt)]))
    assert published_video_reward(reads, prompt) == pytest.approx((1 + 0.75) / 2)


def test_only_every_fourth_frame_is_read() -> None:
    reader = Script(*["OPEN"] * 8)
    evaluate(OCRVideo(engine=reader), torch.zeros(2, 13, 3, 8, 8), ['says "OPEN"'] * 2)
    assert reader.seen == 2 * 4


def test_the_average_over_positive_frames_forgives_empty_ones_and_the_plain_one_does_not() -> None:
    media, prompts = torch.zeros(1, 4, 3, 8, 8), ['says "OPEN"']
    reads = ("OPEN", "", "", "")
    assert evaluate(OCRVideo(every=1, engine=Script(*reads)), media, prompts).scores.item() == 1.0
    assert evaluate(OCRVideo(every=1, average="all", engine=Script(*reads)), media, prompts).scores.item() == 0.25
    assert evaluate(OCRVideo(every=1, engine=Script(*[""] * 4)), media, prompts).scores.item() == 0.0


def test_the_mean_of_positive_scores_is_taken_per_video() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.25, 0.25, 0.25]])
    assert mean_of_positive(scores).tolist() == [0.75, 0.0, 0.25]


def test_an_average_or_a_stride_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="average='median'"):
        OCRVideo(average="median")
    with pytest.raises(RecipeError, match="every=0"):
        OCRVideo(every=0)


@pytest.mark.parametrize("engine", ["rapidocr", pytest.param("tesseract", marks=needs_tesseract)])
def test_signs_in_a_video_are_read_and_the_engine_and_its_version_are_recorded(engine: str) -> None:
    stills = torch.stack([sign("CAT"), sign("OPEN")])
    media = repeat(stills, "b c h w -> b t c h w", t=5)
    reward = load("alignkit.rewards.ocr:OCRVideo", engine=engine, threads=1)
    assert evaluate(reward, media, [prompt_text("CAT"), prompt_text("CAT")]).scores.tolist() == [1.0, 0.0]
    record = json.loads(json.dumps(describe(reward)))
    assert record["engine"] == engine and record["version"][0].isdigit()
    assert record["options"]["every"] == 4 and record["options"]["average"] == "positive"


def test_a_drawn_picture_full_of_words_wins_with_the_published_formula_and_not_with_ours() -> None:
    spam = sign("SUN TEA CAT MAP KEY", width=256).unsqueeze(0)
    scores = {
        formula: evaluate(OCR(formula=formula), spam, [prompt_text("CAT")]).scores.item()
        for formula in ("flow_grpo", "edit")
    }
    assert scores["flow_grpo"] == 1.0 and scores["edit"] < 0.25


@needs_tesseract
def test_a_language_that_tesseract_has_not_is_refused_and_those_it_has_are_named() -> None:
    with pytest.raises(RewardError, match=r"tesseract has not xx, only .*eng.*apt-get install tesseract-ocr-xx"):
        Tesseract(language="eng+xx")
    assert Tesseract().describe()["language"] == "eng"


@needs_tesseract
def test_tesseract_takes_the_options_of_the_formula() -> None:
    assert evaluate(Tesseract(formula="flow_grpo"), sign("CATS")[None], ['says "CAT"']).scores.item() == 1.0
    assert evaluate(Tesseract(), sign("CATS")[None], ['says "CAT"']).scores.item() == 0.75
