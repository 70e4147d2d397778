"""Judges in process: what is asked, how the answer is read, and that what could not be read is no score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate, load
from alignkit.rewards.answers import log_mass
from alignkit.rewards.base import Pairwise
from alignkit.rewards.checklist import Checklist, Item, checklist_score, items_of
from alignkit.rewards.judges import Judge, YesAgainstReference, YesProbability, at_most, fill
from alignkit.rewards.ratings import PairJudge, Rating, both_orders, number_in
from alignkit.rewards.vision_language import Chat, VisionLanguage
from alignkit.types import Prompt

JUDGES: dict[str, type[Judge]] = {
    "yes_probability": YesProbability,
    "yes_against_reference": YesAgainstReference,
    "rating": Rating,
    "pair_judge": PairJudge,
    "checklist": Checklist,
}


@dataclass
class Scripted:
    """An engine that answers what it is told to and remembers what it was asked.

    Attributes:
        table: log-probabilities (A,) or, per question, (B, A).
        replies: texts, one per question.
    """

    table: torch.Tensor = field(default_factory=lambda: torch.tensor([0.0, 0.0]))
    replies: Sequence[str | None] = ()
    asked: list[Chat] = field(default_factory=list)
    answers: tuple[str, ...] = ()
    differentiable: bool = False

    def prepare(self) -> None: ...

    def log_probabilities(self, chats: Sequence[Chat], answers: Sequence[str]) -> torch.Tensor:
        self.asked += chats
        self.answers = tuple(answers)
        return self.table if self.table.ndim == 2 else self.table.expand(len(chats), -1)

    def texts(self, chats: Sequence[Chat], max_tokens: int) -> Sequence[str | None]:
        self.asked += chats
        return self.replies


def scripted(judge: Judge, **script: Any) -> tuple[Any, Scripted]:
    """The judge with an engine that follows a script, put where the real one is kept once it is loaded."""
    engine = Scripted(**script)
    vars(judge)["engine"] = engine
    return judge, engine


def pictures(number: int = 3) -> torch.Tensor:
    return torch.rand(number, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def prompts(number: int = 3, **columns: Any) -> list[Prompt]:
    texts = ("a blue sign", "two dogs on a red mat", "a cat")
    reference = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(1))
    return [Prompt(texts[i], id=i, columns={"reference": reference, **columns}) for i in range(number)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Judge.tiny(tmp_path_factory.mktemp("judge"))["weights"]


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_scores_each_sample_on_its_own_with_a_gradient(name: str, weights: str) -> None:
    reward = JUDGES[name](weights=weights)
    assert reward.name == name
    media, asked = pictures().requires_grad_(), prompts()
    together = evaluate(reward, media, asked).scores
    (gradient,) = torch.autograd.grad(together.sum(), media)
    assert (gradient.abs().amax((1, 2, 3)) > 1e-6).all()
    alone = torch.cat([evaluate(reward, media[i : i + 1], asked[i : i + 1]).scores for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert together.detach().unique().numel() == 3
    assert evaluate(reward, media[:0].detach(), []).scores.shape == (0,)


def test_making_a_judge_reads_nothing() -> None:
    judge = load("alignkit.rewards.judges:YesProbability", weights="nobody/nothing")
    assert isinstance(judge, YesProbability)
    assert judge.files()[0].source == "nobody/nothing"
    with pytest.raises(RewardError, match="nobody/nothing"):
        judge.prepare()


def test_the_yes_probability_is_the_literal_one_of_the_question_as_written(weights: str) -> None:
    judge = YesProbability(weights=weights, question="{image}Is it {prompt}?")
    media = pictures(1)
    vl = VisionLanguage.load(weights)
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is it a blue sign?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = vl.processor(text=[text], images=[media[0]], do_rescale=False, return_tensors="pt")
    z, v = vl.model(**batch).logits[0, -1].double(), vl.tokenizer.get_vocab()
    yes, no = (torch.log(sum(z[v[w]].exp() for w in words)) for words in (("yes", "Yes"), ("no", "No")))
    torch.testing.assert_close(judge(media, prompts(1)).double()[0], torch.sigmoid(yes - no), rtol=0, atol=1e-6)


def test_a_question_is_filled_from_prompt_columns_and_pictures_in_their_places() -> None:
    one, two = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    prompt = Prompt("a {image} of {colour}", columns={"colour": "red"})
    chat = fill("A {kind} in {colour}: {b}{prompt}?", prompt, {"a": one, "b": two}, {"kind": "video"})
    assert chat.parts[0] is one and chat.parts[2] is two
    assert (chat.parts[1], chat.parts[3]) == ("A video in red: ", "a {image} of {colour}?")


def test_a_question_about_a_column_that_a_prompt_lacks_is_refused_before_any_picture_exists() -> None:
    judge = YesProbability(question="Are there {count} dogs?")
    with pytest.raises(
        RewardError, match=r"asks for \{count\}, and prompt 1 .*no such column; columns found: reference"
    ):
        judge.check_prompts([*prompts(1, count=2), Prompt("a cat", id=1, columns={"reference": torch.zeros(3, 2, 2)})])


def test_a_template_is_a_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Is this {prompt}?\n", encoding="utf-8")
    judge, engine = scripted(YesProbability(template=str(tmp_path / "mine.txt")))
    judge(pictures(1), prompts(1))
    assert engine.asked[0].texts == ("Is this a blue sign?",)
    assert judge.describe()["question"] == "Is this {prompt}?"
    with pytest.raises(RecipeError, match="no template file"):
        _ = YesProbability(template=str(tmp_path / "other.txt")).asked
    with pytest.raises(RecipeError, match="both a question and a template"):
        YesProbability(question="?", template="mine.txt")


def test_the_candidate_stands_in_the_second_place_and_the_reference_in_the_first() -> None:
    judge, engine = scripted(YesAgainstReference())
    media, asked = pictures(1), prompts(1)
    judge(media, asked)
    shown = engine.asked[0].media(3)
    torch.testing.assert_close(shown[0], asked[0].columns["reference"])
    torch.testing.assert_close(shown[1], media[0])


def test_against_a_reference_the_reward_is_the_mass_of_yes_over_the_vocabulary_averaged_over_references() -> None:
    judge, engine = scripted(YesAgainstReference(), table=torch.tensor([[0.2, 0.1], [0.6, 0.3], [0.5, 0.5]]).log())
    two = Prompt("a", columns={"reference": [torch.zeros(3, 40, 56), torch.ones(3, 40, 56)]})
    torch.testing.assert_close(judge(pictures(2), [two, *prompts(1)]), torch.tensor([0.4, 0.5]))
    assert len(engine.asked) == 3


def test_a_calibrated_judge_that_says_yes_to_everything_gives_one_half(weights: str) -> None:
    judge, _ = scripted(YesAgainstReference(among="answers", calibrated=True), table=torch.tensor([-0.01, -5.0]))
    torch.testing.assert_close(judge(pictures(), prompts()), torch.full((3,), 0.5))
    real = YesAgainstReference(weights=weights, among="answers", calibrated=True)
    grey = torch.full((1, 3, 40, 56), 0.5)
    on_grey = [Prompt("a blue sign", columns={"reference": grey[0]})]
    torch.testing.assert_close(real(grey, on_grey), torch.tensor([0.5]))
    plain = replace(real, calibrated=False)
    bias = plain(grey, on_grey).logit()
    torch.testing.assert_close(real(pictures(1), prompts(1)).logit(), plain(pictures(1), prompts(1)).logit() - bias)


def test_a_prompt_without_a_reference_is_named() -> None:
    for judge in (YesAgainstReference(), PairJudge()):
        with pytest.raises(RewardError, match="prompt 7 .*no column 'reference'"):
            judge.check_prompts([Prompt("a", id=7)])


def test_a_mark_is_the_expectation_over_the_numbers_of_the_scale() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15]], dtype=torch.float64)
    judge, engine = scripted(Rating(), table=(0.5 * p).log())  # half the mass is on other replies
    expected = 0.1 * 1 + 0.2 * 2 + 0.3 * 3 + 0.25 * 4 + 0.15 * 5
    torch.testing.assert_close(judge(pictures(1), prompts(1)), torch.tensor([expected], dtype=torch.float64))
    assert engine.answers == ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("reply", "marker", "mark"),
    [
        ("4", "", 4.0),
        ("**3.5**, because", "", 3.5),
        ("4/5", "", 4.0),
        ("Alignment is 2. Final Score: 3", "Final Score:", 3.0),
        ("Final Score: 2 ... no. Final Score: 4.", "Final Score:", 4.0),
        ("Out of 5 I give 3", "", math.nan),
        ("9", "", math.nan),
        ("-1", "", math.nan),
        ("good", "", math.nan),
        ("", "", math.nan),
        ("4", "Final Score:", math.nan),
        ("Final Score: high", "Final Score:", math.nan),
        ("3rd", "", math.nan),
        (None, "", math.nan),
    ],
)
def test_a_mark_is_read_from_a_reply_only_where_it_is_unmistakable(reply: str, marker: str, mark: float) -> None:
    assert number_in(reply, marker, 1, 5) == pytest.approx(mark, nan_ok=True)


def test_a_reply_without_a_mark_is_a_counted_failure_and_never_a_score(caplog: pytest.LogCaptureFixture) -> None:
    judge, _ = scripted(Rating(read="text"), replies=["4", "I cannot see it", None])
    assert not judge.differentiable
    evaluation = evaluate(judge, pictures(), prompts())
    assert evaluation.scores[0] == 4
    assert evaluation.failed.tolist() == [False, True, True]
    assert "I cannot see it" in caplog.text


def test_a_scale_beyond_one_digit_is_refused_with_what_to_do_instead(weights: str) -> None:
    with pytest.raises(RecipeError, match="begins with the same token.*read the reply as text"):
        Rating(weights=weights, lowest=0, highest=10)(pictures(1), prompts(1))


def test_options_that_no_judge_has_are_refused() -> None:
    for wrong, match in (
        ({"read": "speech"}, "choose one of logits, text"),
        ({"lowest": 5, "highest": 1}, "from 5 to 1 is empty"),
        ({"kind": "latent"}, "choose image or video"),
    ):
        with pytest.raises(RecipeError, match=match):
            Rating(**wrong)
    with pytest.raises(RecipeError, match='needs among="answers"'):
        YesAgainstReference(calibrated=True)


def test_a_pair_judge_compares_and_a_tie_counts_half() -> None:
    judge, engine = scripted(PairJudge(), table=torch.tensor([[0.5, 0.2, 0.1]]).log())
    assert isinstance(judge, Pairwise)
    first, second = pictures(1), pictures(2)[1:]
    torch.testing.assert_close(judge.compare(first, second, prompts(1)), torch.tensor([(0.5 + 0.5 * 0.1) / 0.8]))
    assert engine.answers == ("1", "2", "0")
    torch.testing.assert_close(torch.stack(engine.asked[0].media(3)), torch.cat([first, second]))
    without, engine = scripted(PairJudge(ties=False), table=torch.tensor([[0.3, 0.1]]).log())
    torch.testing.assert_close(without.compare(first, second, prompts(1)), torch.tensor([0.75]))
    assert engine.answers == ("1", "2") and "equally" not in engine.asked[0].texts[-1]


@pytest.mark.parametrize(
    ("reply", "won"), [("1", 1.0), ("2. It is sharper than 1", 0.0), ("0", 0.5), ("both", math.nan), ("3", math.nan)]
)
def test_a_written_verdict_is_read_or_is_a_failure(reply: str, won: float) -> None:
    judge, _ = scripted(PairJudge(read="text"), replies=[reply])
    torch.testing.assert_close(judge.compare(pictures(1), pictures(1), prompts(1)), torch.tensor([won]), equal_nan=True)


def test_both_orders_cancel_the_liking_for_a_place_and_sum_to_one(weights: str) -> None:
    class LikesTheFirst:
        name, kind = "first", "image"

        def compare(self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
            return torch.full((len(first),), 0.9)

    a, b = pictures(3), pictures(6)[3:]
    torch.testing.assert_close(both_orders(LikesTheFirst(), a, b, prompts()), torch.full((3,), 0.5))
    judge = PairJudge(weights=weights)
    forwards, backwards = both_orders(judge, a, b, prompts()), both_orders(judge, b, a, prompts())
    torch.testing.assert_close(forwards + backwards, torch.ones(3))
    p, q = judge.compare(a, b, prompts()), judge.compare(b, a, prompts())
    torch.testing.assert_close(forwards, 0.5 * (p + 1 - q))
    assert (p + q - 1).abs().max() > 1e-3, "this judge has no liking for a place, so nothing was cancelled"


def test_one_order_is_off_by_the_judges_bias_and_two_orders_are_not() -> None:
    class Biased:
        """Right up to 0.1 for whatever is shown first."""

        name, kind = "biased", "image"

        def compare(self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
            return true_win(first, second) + 0.1

    def true_win(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(20 * (first.mean((1, 2, 3)) - second.mean((1, 2, 3))))

    media = pictures(8)
    rows, columns = torch.triu_indices(8, 8, 1)
    a, b = media[rows], media[columns]
    asked = [Prompt("a")] * len(rows)
    single = Biased().compare(a, b, asked) - true_win(a, b)
    torch.testing.assert_close(single.mean(), torch.tensor(0.1))
    torch.testing.assert_close(both_orders(Biased(), a, b, asked), true_win(a, b))


def test_as_a_reward_a_pair_judge_asks_both_orders_about_the_reference(weights: str) -> None:
    judge, media, asked = PairJudge(weights=weights), pictures(1), prompts(1)
    reference = asked[0].columns["reference"].unsqueeze(0)
    torch.testing.assert_close(judge(media, asked), both_orders(judge, media, reference, asked))


def test_a_checklist_is_the_weighted_mean_and_a_failed_gate_makes_it_zero() -> None:
    yes = torch.tensor([0.9, 0.4, 0.6], requires_grad=True)
    items = (Item("a", 2.0), Item("b"), Item("c", 1.0, must=True))
    score = checklist_score(yes, items)
    torch.testing.assert_close(score, torch.tensor((2 * 0.9 + 0.4 + 0.6) / 4))
    (gradient,) = torch.autograd.grad(score, yes)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 0.25, 0.25]))
    assert checklist_score(yes, (Item("a"), Item("b", must=True), Item("c"))) == 0
    assert checklist_score(torch.tensor([math.nan, 0.9]), (Item("a"), Item("b"))).isnan()


def test_a_prompts_own_checklist_replaces_the_recipes() -> None:
    table = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]).log()
    judge, engine = scripted(Checklist(questions=("Is it sharp?",)), table=table)
    own = Prompt("dogs", columns={"checklist": ["Are there {n} dogs?", {"question": "A mat?", "weight": 3}], "n": 2})
    media, asked = pictures(2), [own, Prompt("a cat")]
    torch.testing.assert_close(judge(media, asked), torch.tensor([(0.8 + 3 * 0.3) / 4, 0.6]))
    texts = [chat.texts[0] for chat in engine.asked]
    assert ["Are there 2 dogs?" in texts[0], "A mat?" in texts[1], "Is it sharp?" in texts[2]] == [True] * 3
    per_question = judge.answers(media, asked)
    torch.testing.assert_close(per_question[0], torch.tensor([0.8, 0.3]))


def test_a_checklist_that_cannot_be_read_is_refused_with_its_owner() -> None:
    with pytest.raises(RecipeError, match="'checklist': .*is no line of a checklist"):
        Checklist(questions=({"text": "?"},))
    with pytest.raises(RecipeError, match="not all 0"):
        items_of([{"question": "?", "weight": 0}], "mine")
    with pytest.raises(RewardError, match="prompt 4 .*column 'checklist'"):
        Checklist().check_prompts([Prompt("a", id=4, columns={"checklist": []})])


def test_large_pictures_are_made_smaller_in_the_graph_and_small_ones_left_alone() -> None:
    media = torch.rand(2, 3, 60, 80, requires_grad=True)
    smaller = at_most(media, 30 * 40)
    assert smaller.shape == (2, 3, 30, 40)
    assert torch.autograd.grad(smaller.sum(), media)[0].abs().min() > 0
    assert at_most(media, 60 * 80) is media
    assert at_most(torch.rand(4, 3, 60, 80), 100).shape[-2] * at_most(torch.rand(4, 3, 60, 80), 100).shape[-1] <= 100


def test_a_judge_of_videos_is_asked_about_a_video(weights: str) -> None:
    judge = YesProbability(weights=weights, kind="video")
    clips = pictures(8).unflatten(0, (2, 4)).requires_grad_()
    scores = evaluate(judge, clips, prompts(2)).scores
    (gradient,) = torch.autograd.grad(scores.sum(), clips)
    assert (gradient.abs().amax((2, 3, 4)) > 1e-6).all()
    assert "this video" in judge.chat(prompts(1)[0], {"image": clips[0]}).texts[0]


def test_log_mass_of_the_answers_is_what_an_engine_returns(weights: str) -> None:
    vl = VisionLanguage.load(weights)
    chats = [Chat((picture, "?")) for picture in pictures()]
    v = vl.tokenizer.get_vocab()
    expected = log_mass(vl.next_logits(chats), [[v["1"]], [v["2"]]])
    torch.testing.assert_close(vl.log_probabilities(chats, ("1", "2")), expected)
