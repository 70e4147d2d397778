"""UnifiedReward: what is read from its replies, and the real loading and writing on tiny weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from alignkit.errors import RecipeError
from alignkit.rewards import evaluate
from alignkit.rewards.ratings import both_orders
from alignkit.rewards.unified_reward import UnifiedReward, UnifiedRewardPair, marks_in, pair_verdict
from alignkit.types import Prompt

ASPECTS = ("Alignment Score (1-5):", "Coherence Score (1-5):", "Style Score (1-5):")


def pictures(number: int = 4) -> torch.Tensor:
    return torch.rand(number, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def prompts(number: int = 4) -> list[Prompt]:
    reference = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5))
    return [Prompt("a sign", id=i, columns={"reference": reference}) for i in range(number)]


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("Well aligned.\nFinal Score: 4", 4.0),
        ("Final Score: 3.5 out of 5", 3.5),
        ("Final Score: **2**", 2.0),
        ("The picture is good.", math.nan),
        ("Final Score: 7", math.nan),
        ("Final Score:", math.nan),
        (None, math.nan),
    ],
)
def test_the_final_mark_is_read_behind_its_marker_or_the_reply_is_a_failure(reply: str | None, mark: float) -> None:
    assert marks_in(reply, ["Final Score:"]) == pytest.approx([mark], nan_ok=True)


def test_three_marks_are_read_each_behind_its_own_marker() -> None:
    reply = "Alignment Score (1-5): 4\nCoherence Score (1-5): 2.5\nStyle Score (1-5): 5"
    assert marks_in(reply, ASPECTS) == [4, 2.5, 5]
    assert marks_in(reply.replace("Style", "Form"), ASPECTS) == pytest.approx([4, 2.5, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("reply", "won"),
    [
        ("Image 1 is better than Image 2.", 1.0),
        ("Image 2 is better than Image 1.", 0.0),
        ("Both images are equally good.", 0.5),
        ("In colour Image 1 is better than Image 2. All in all Image 2 is better than Image 1. Thank you.", 0.0),
        ("<think>Image 2 is better</think><answer>Image 1 is better</answer>", 1.0),
        ("<answer>Video 2 is better</answer> although Video 1 is better lit", 0.0),
        ("<answer>unsure</answer> Image 1 is better", math.nan),
        ("I cannot say.", math.nan),
        ("", math.nan),
    ],
)
def test_one_of_three_verdicts_is_read_or_the_reply_is_a_failure(reply: str, won: float) -> None:
    assert pair_verdict(reply) == pytest.approx(won, nan_ok=True)


def test_the_score_is_the_written_mark_divided_by_five(tmp_path: Path) -> None:
    judge = UnifiedReward(**UnifiedReward.tiny(tmp_path))
    media, asked = pictures(), prompts()
    chats = [judge.chat(prompt, {"image": one}) for prompt, one in zip(asked, media)]
    written = [reply.rpartition("Final Score: ")[2] for reply in judge.engine.texts(chats, 8)]
    scores = evaluate(judge, media, asked).scores
    torch.testing.assert_close(scores, torch.tensor([int(mark) / 5 for mark in written]))
    assert scores.unique().numel() > 1
    alone = torch.cat([evaluate(judge, media[i : i + 1], asked[i : i + 1]).scores for i in range(4)])
    torch.testing.assert_close(alone, scores)
    assert not judge.differentiable


def test_the_three_marks_are_kept_and_their_shares_make_the_score(tmp_path: Path) -> None:
    tiny = UnifiedReward.tiny(tmp_path)
    judge = UnifiedReward(**tiny, marks="aspects", shares=(2.0, 1.0, 1.0))
    media, asked = pictures(), prompts()
    parts = judge.components(media, asked)
    assert set(parts) == {"alignment", "coherence", "style"}
    expected = (2 * parts["alignment"] + parts["coherence"] + parts["style"]) / 4 / 5
    torch.testing.assert_close(judge(media, asked), expected)
    equal = UnifiedReward(**tiny, marks="aspects")(media, asked)
    torch.testing.assert_close(equal, torch.stack(list(parts.values())).mean(0) / 5)


def test_a_reply_that_is_cut_before_its_mark_is_a_failure_and_not_a_score(tmp_path: Path) -> None:
    judge = UnifiedReward(**{**UnifiedReward.tiny(tmp_path), "max_tokens": 2})
    evaluation = evaluate(judge, pictures(), prompts())
    assert evaluation.failed.all() and evaluation.scores.isnan().all()


def test_a_pair_is_judged_by_the_written_sentence_in_both_orders(tmp_path: Path) -> None:
    judge = UnifiedRewardPair(**UnifiedRewardPair.tiny(tmp_path))
    first, second = pictures(8)[:4], pictures(8)[4:]
    chats = [judge.chat(prompts(1)[0], {"first": a, "second": b}) for a, b in zip(first, second)]
    by_sentence = {"Image 1": 1.0, "Image 2": 0.0, "Both im": 0.5}
    expected = torch.tensor([by_sentence[reply[:7]] for reply in judge.engine.texts(chats, 4)])
    torch.testing.assert_close(judge.compare(first, second, prompts()), expected)
    reference = prompts()[0].columns["reference"].expand(4, -1, -1, -1)
    torch.testing.assert_close(judge(first, prompts()), both_orders(judge, first, reference, prompts()))


def test_a_published_wording_is_a_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "wording.txt").write_text("Caption: [{prompt}]", encoding="utf-8")
    judge = UnifiedReward(template=str(tmp_path / "wording.txt"))
    chat = judge.chat(Prompt("a cat"), {"image": torch.rand(3, 8, 8)})
    assert isinstance(chat.parts[0], torch.Tensor) and chat.parts[1:] == ("Caption: [a cat]",)


def test_pictures_are_shown_with_at_most_512_by_512_pixels() -> None:
    (shown,) = UnifiedReward().chat(Prompt("a"), {"image": torch.rand(3, 1024, 512)}).media(3)
    assert shown.shape == (3, 724, 362)


def test_options_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(RecipeError, match="choose final or aspects"):
        UnifiedReward(marks="all")
    with pytest.raises(RecipeError, match="three numbers"):
        UnifiedReward(shares=(0.0, 0.0, 0.0))
    with pytest.raises(RecipeError, match="writes its verdict"):
        UnifiedRewardPair(read="logits")
