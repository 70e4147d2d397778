"""A method beside unguided samples and the best of n: same noise, equal denoiser calls, and what is written of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.inference.comparing import (
    Contender,
    Row,
    columns,
    compare,
    contenders,
    costs,
    mean,
    memory_notes,
    record,
    table,
    weighted_spec,
    weighted_specs,
)
from alignkit.inference.guide import Guided
from alignkit.inference.judges import Judges
from alignkit.inference.method import Calls, Method
from alignkit.inference.sampling import LINE, LOWEST, MARGIN, Sample
from alignkit.inference.side_by_side import NARROWEST, Column, side_by_side
from tests.policy.zoo import shared

CALL = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 16}
PROMPTS = ("a red cat", "a blue dog")


@dataclass(frozen=True)
class TwiceAsDear(Method):
    """Two denoiser calls a step, with gradients, two samples together; whole samples only."""

    name: ClassVar[str] = "twice"
    default_budget: ClassVar[float] = 2.0

    gradient_batch: int = 3

    def rows(self, budget: float) -> int:
        return 2

    def calls(self, num_steps: int, budget: float) -> Calls:
        one = Calls(denoiser=2 * num_steps, denoiser_gradients=num_steps, decodes=1, decode_gradients=1, rewards=1)
        return one * (int(budget) // 2)


def spread(media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Standard deviation of the pixels."""
    return media.flatten(1).std(1)


# what is compared


@pytest.mark.parametrize(
    ("text", "spec", "weight"),
    [
        ("ocr", "ocr", 1.0),
        ("ocr=0.5", "ocr", 0.5),
        ("a/b.py:f=-2", "a/b.py:f", -2.0),
        ("ocr=1e-3", "ocr", 1e-3),
        ('dino(weights="x=1")', 'dino(weights="x=1")', 1.0),
        ("noise(level=0.5)=.25", "noise(level=0.5)", 0.25),
        ("odd=name", "odd=name", 1.0),
    ],
)
def test_a_reward_and_its_weight_are_told_apart(text: str, spec: str, weight: float) -> None:
    assert weighted_spec(text) == (spec, weight)


def test_a_reward_that_is_given_twice_is_refused() -> None:
    assert weighted_specs(["ocr=2", "brightness"]) == {"ocr": 2.0, "brightness": 1.0}
    with pytest.raises(RecipeError, match="'ocr' is given twice"):
        weighted_specs(["ocr=2", "ocr"])


def test_best_of_n_draws_as_many_samples_as_the_methods_denoiser_calls_pay_for() -> None:
    found = contenders(TwiceAsDear(), 5.0, num_steps=7)
    assert [(one.name, one.budget) for one in found] == [("unguided", 1.0), ("best_of_n", 4.0), ("twice", 5.0)]
    assert [one.budget for one in contenders(TwiceAsDear(), None, num_steps=7)] == [1.0, 2.0, 2.0]


def test_nothing_is_compared_with_itself() -> None:
    assert [one.name for one in contenders("best_of_n", None, 4)] == ["unguided", "best_of_n"]
    assert [one.name for one in contenders("best_of_n()", 1.0, 4)] == ["unguided", "best_of_n()"]


@pytest.mark.parametrize("budget", [0.5, 0.0, math.nan, math.inf])
def test_a_budget_below_one_sample_or_without_end_is_refused(budget: float) -> None:
    with pytest.raises(RecipeError, match="budget="):
        contenders("best_of_n", budget, 4)


def test_the_cost_is_known_beforehand_with_what_is_held_in_memory() -> None:
    _, second, third = costs(contenders(TwiceAsDear(), 4.0, 10), 10)
    assert second == ["best_of_n", "40 (4 x 10)", "0", "0", "0", "4", "0", "1"]
    assert third == ["twice", "40 (4 x 10)", "20", "0", "0", "2", "2", "2"]
    notes = memory_notes(Contender("twice", TwiceAsDear(), 4.0), 10, batch=7)
    assert "up to 6 samples are denoised at once" in notes[0]
    assert "through the denoiser and the decoder, whose activations are kept of 3 samples at a time" in notes[1]
    assert "of all of these samples; gradient_batch=1" in memory_notes(contenders("dps", 1.0, 10)[1], 10, batch=7)[1]
    assert len(memory_notes(contenders("best_of_n", 4.0, 10)[1], 10, batch=8)) == 1


# drawing


@pytest.fixture(scope="module")
def drawn() -> list[Row]:
    judges = Judges({"brightness": 1.0}, [spread])
    return compare(
        shared("sd3"), PROMPTS, judges, contenders("best_of_n", 3.0, 2), num=2, steps=2, seed=5, call=CALL, batch=4
    )


def test_the_unguided_row_is_the_plain_sampler_and_no_best_of_n_is_worse(drawn: list[Row]) -> None:
    plain, best = drawn
    assert [(str(p), s) for p, s in zip(plain.prompts, plain.seeds, strict=True)] == [
        ("a red cat", 5),
        ("a red cat", 6),
        ("a blue dog", 5),
        ("a blue dog", 6),
    ]
    assert (best.guided.rewards >= plain.guided.rewards - 1e-6).all()
    assert (best.guided.rewards > plain.guided.rewards + 1e-6).any()
    assert plain.guided.trace["budget_used"] == 1 and best.guided.trace["budget_used"] == 3
    torch.testing.assert_close(best.guided.rewards, best.guided.parts["brightness"])
    torch.testing.assert_close(best.guided.parts["spread"], spread(best.guided.media, ()))


def test_a_sample_does_not_depend_on_how_many_are_drawn_beside_it(drawn: list[Row]) -> None:
    judges = Judges({"brightness": 1.0}, [spread])
    alone = compare(
        shared("sd3"), PROMPTS[1:], judges, contenders("best_of_n", 3.0, 2), num=1, steps=2, seed=6, call=CALL, batch=1
    )
    for many, one in zip(drawn, alone, strict=True):
        torch.testing.assert_close(many.guided.media[3:], one.guided.media, rtol=0, atol=1e-4)


def test_different_seeds_and_prompts_give_different_samples(drawn: list[Row]) -> None:
    media = drawn[0].guided.media
    for i in range(4):
        for j in range(i):
            assert (media[i] - media[j]).abs().max() > 1e-3


# what is written


def row(name: str, rewards: Sequence[float], judge: Sequence[float], shape: tuple[int, ...] = (3, 16, 24)) -> Row:
    count = len(rewards)
    media = torch.rand(count, *shape, generator=torch.Generator().manual_seed(len(name)))
    spent = {"denoiser": 8 * count, "head": 0, "decodes": 3 * count, "denoiser_gradients": 0}
    trace = {
        "method": name,
        "options": {"strength": 10.0, "noise": object},
        "budget": 4.0,
        "budget_used": 4.0,
        "spent": spent,
        "seconds": 2.0 * count,
    }
    parts = {"ocr": torch.tensor(rewards), "judge": torch.tensor(judge)}
    guided = Guided(media, 2 * parts["ocr"], parts, torch.zeros(count, 1), trace)
    return Row(name, ["a"] * count, list(range(count)), guided, {"ocr": 2.0, "judge": 0.0})


def test_a_sample_without_a_score_leaves_the_mean_and_is_null_in_the_record() -> None:
    rows = [row("one", [0.25, math.nan], [math.nan, math.nan]), row("two", [0.5, 1.0], [1.0, 2.0])]
    header, lines = table(rows)
    assert header[1:4] == ["ocr", "judge (judge)", "weighted total"]
    assert lines[0] == ["one", "0.2500", "-", "0.5000", "4", "0", "3", "2"]
    assert lines[1][1:4] == ["0.7500", "1.5000", "1.5000"]
    found = json.loads(json.dumps(record(rows, model="m"), allow_nan=False))
    assert found["model"] == "m" and found["methods"][0]["rewards"] == {"ocr": 0.25, "judge": None}
    assert found["methods"][0]["samples"][1]["total"] is None
    assert found["methods"][1]["samples"][1] == {
        "prompt": "a",
        "seed": 1,
        "total": 2.0,
        "rewards": {"ocr": 1.0, "judge": 2.0},
    }
    assert mean(torch.tensor([math.nan])) is None


def test_each_pictures_own_pixels_stand_in_its_row_and_column() -> None:
    rows = [row("one", [0.1, 0.2, 0.3], [0.0] * 3), row("three", [0.4, 0.5, 0.6], [0.0] * 3)]
    sheet = side_by_side(columns(rows))
    zoom = NARROWEST // 24
    wide, high = NARROWEST + 2 * MARGIN, 16 * zoom + 2 * MARGIN + 3 * LINE
    assert sheet.size == (2 * wide, MARGIN + LINE + 3 * high)
    for c, one in enumerate(rows):
        for r in range(3):
            left, top = c * wide + MARGIN, MARGIN + LINE + r * high + MARGIN
            seen = torch.tensor(sheet.getpixel((left + 5 * zoom + 1, top + 7 * zoom + 1)))
            torch.testing.assert_close(seen / 255, one.guided.media[r, :, 7, 5], rtol=0, atol=0.01)
    assert columns(rows)[1].scores[2] == ["ocr 0.6000", "judge 0.0000"]


def test_long_words_stay_in_their_column_and_a_video_is_a_strip() -> None:
    samples = [Sample("a prompt that does not fit at all " * 9, 0, torch.zeros(9, 3, 16, 24))]
    left, right = Column("x" * 200, samples, [["score"]]), Column("", samples, [["score"]])
    sheet = side_by_side([left, right])
    frames, zoom, gap = 4, LOWEST // 16, 2
    assert sheet.width == 2 * ((zoom * 24 + gap) * frames + gap + 2 * MARGIN)
    middle = sheet.crop((sheet.width // 2 - MARGIN + 1, 0, sheet.width // 2 + MARGIN - 1, sheet.height))
    assert middle.getextrema() == ((255, 255),) * 3
