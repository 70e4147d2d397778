from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate, load
from alignkit.rewards.color import SignColor, background
from alignkit.rewards.ocr import OCR
from alignkit.rewards.pixels import to_uint8
from alignkit.rewards.tesseract import Tesseract, available, dark_on_light
from alignkit.rewards.text import exact, quoted, similarity, target_of
from alignkit.types import Prompt
from tests.rewards.signs import WORDS, WORLD, prompt_text, sign

needs_tesseract = pytest.mark.skipif(
    not available(), reason="the program tesseract is not installed (Debian: tesseract-ocr)"
)


class FixedReader:
    """Reads the same texts whatever it is shown."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def read(self, media: torch.Tensor) -> list[str]:
        return self.texts

    def describe(self) -> dict[str, str]:
        return {"engine": "fixed"}


def signs(words: tuple[str, ...] = WORDS, colour: str = "blue", **options) -> torch.Tensor:
    return torch.stack([sign(word, colour, **options) for word in words])


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("CAT", "CAT", 1.0),
        ("c a t", "CAT", 1.0),
        ("CAR", "CAT", 2 / 3),
        ("", "CAT", 0.0),
        ("CATS", "CAT", 3 / 4),
        ("CAT CAT CAT", "CAT", 1 / 3),
        ("THE CAT SAT", "CAT", 3 / 9),
        ("XYZ", "CAT", 0.0),
        ("STRASSE", "straße", 1.0),
    ],
)
def test_similarity_is_one_minus_the_normalised_edit_distance(read: str, wanted: str, expected: float) -> None:
    torch.testing.assert_close(similarity([read], [wanted]), torch.tensor([expected]))


def test_more_text_around_the_target_always_costs_more() -> None:
    reads = ["CAT" + "DOG" * count for count in range(5)]
    assert similarity(reads, ["CAT"] * 5).diff().lt(0).all()


def test_exact_ignores_case_and_spaces_only() -> None:
    assert exact(["o pen", "OPEN.", "OPE"], ["OPEN"] * 3).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ('"HOT" over "TEA"', ["HOT", "TEA"]),
        ("a “CURLY” sign", ["CURLY"]),
        ("the dog's 'sign'", []),
        ('an empty "" sign', []),
        ('an unclosed "sign', []),
    ],
)
def test_targets_are_what_stands_in_double_quotes(text: str, expected: list[str]) -> None:
    assert quoted(text) == expected


def test_several_targets_are_joined_in_order() -> None:
    assert target_of(Prompt('"HOT" over "TEA"')) == "HOT TEA"


@pytest.mark.parametrize(("column", "expected"), [("BUS", "BUS"), (["BUS", "STOP"], "BUS STOP")])
def test_the_column_target_wins_over_quotes(column, expected: str) -> None:
    assert target_of(Prompt('says "OPEN"', columns={"target": column})) == expected


@pytest.mark.parametrize("column", ["  ", [], [""], 12, None])
def test_a_target_column_without_text_is_refused(column) -> None:
    with pytest.raises(RewardError, match="column `target`, a text"):
        target_of(Prompt('says "OPEN"', columns={"target": column}))


def test_a_prompt_without_a_target_is_an_error_that_names_its_line() -> None:
    prompts = [Prompt('a "CAT"', id=3), Prompt("a plain sign", id=4)]
    with pytest.raises(RewardError, match=r"prompt 4 \(its line or row in the prompt file\).*'a plain sign'"):
        evaluate(OCR(engine=FixedReader("a", "b")), torch.zeros(2, 3, 8, 8), prompts)


def test_the_reward_scores_what_its_reader_reads() -> None:
    reward = OCR(engine=FixedReader("CAR", "OPEN"))
    scores = evaluate(reward, torch.zeros(2, 3, 8, 8), [prompt_text("CAT"), prompt_text("OPEN")]).scores
    torch.testing.assert_close(scores, torch.tensor([2 / 3, 1.0]))


@pytest.mark.parametrize("colour", sorted(WORLD["colours"]))
@pytest.mark.parametrize(("height", "width"), [(24, 64), (32, 64)])
def test_rapidocr_reads_small_signs_of_every_colour(colour: str, height: int, width: int) -> None:
    assert exact(load("ocr").read(signs(colour=colour, height=height, width=width)), WORDS).mean() == 1.0


def test_rapidocr_reads_nothing_on_an_empty_sign_and_scores_it_zero() -> None:
    blank = torch.full((1, 3, 32, 64), 0.5)
    assert evaluate(load("ocr"), blank, [prompt_text("CAT")]).scores.item() == 0.0


def test_detection_finds_lines_from_top_to_bottom() -> None:
    media = sign(("TEA", "BUS"), height=128, width=128, size=40).unsqueeze(0)
    assert load("ocr", detect=True).read(media) == ["TEA BUS"]


def test_the_engine_and_its_version_are_recorded() -> None:
    record = load("ocr").describe()
    assert record["engine"] == "rapidocr" and record["version"] and "rec" not in record
    assert json.dumps(record)


@pytest.mark.parametrize("threads", [0, 10_000])
def test_a_number_of_threads_that_the_engine_would_ignore_is_refused(threads: int) -> None:
    with pytest.raises(RecipeError, match=f"threads={threads}"):
        OCR(threads=threads)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(RecipeError, match="engine='easyocr'; choose 'rapidocr'"):
        OCR(engine="easyocr")


@pytest.mark.parametrize("colour", sorted(WORLD["colours"]))
@needs_tesseract
def test_tesseract_reads_signs_with_light_and_with_dark_text(colour: str) -> None:
    assert exact(Tesseract().read(signs(colour=colour)), WORDS).mean() >= 7 / 8


@needs_tesseract
def test_tesseract_keeps_the_order_of_a_batch_and_its_empty_pages() -> None:
    media = signs(("CAT", "OPEN", "TEA"))
    media = torch.cat([torch.full((1, 3, 32, 64), 0.5), media, torch.full((1, 3, 32, 64), 0.5)])
    assert Tesseract(whitelist="ACEINOPT").read(media) == ["", "CAT", "OPEN", "TEA", ""]


@needs_tesseract
def test_tesseract_can_be_the_engine_of_the_ocr_reward() -> None:
    reward = OCR(engine="tesseract")
    assert evaluate(reward, signs(("CAT",)), [prompt_text("CAT")]).scores.item() == 1.0
    assert reward.describe()["engine"] == "tesseract" and reward.describe()["version"][0].isdigit()


@needs_tesseract
def test_a_target_that_the_whitelist_cannot_read_is_refused() -> None:
    with pytest.raises(RewardError, match=r"the target '50%' has '%05'"):
        evaluate(Tesseract(whitelist="ABC"), signs(("CAT",)), ['says "50%"'])


def test_a_missing_tesseract_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert not available()
    with pytest.raises(RewardError, match="apt-get install tesseract-ocr"):
        Tesseract()


@pytest.mark.parametrize("colour", sorted(WORLD["colours"]))
def test_text_is_made_dark_on_light(colour: str) -> None:
    grey = dark_on_light(to_uint8(signs(("OPEN",), colour))[0])
    assert grey[0, 0] > grey.min() + 100 and grey[0, 0] >= grey.max() - 60


def test_pixels_that_are_not_finite_are_an_error_that_names_the_sample() -> None:
    media = torch.zeros(3, 3, 4, 4)
    media[2, 0, 0, 0] = float("nan")
    with pytest.raises(RewardError, match="sample 2 has pixels that are NaN"):
        to_uint8(media)


def test_pixels_are_rounded_and_not_cut_off() -> None:
    assert to_uint8(torch.full((1, 3, 1, 1), 0.999)).flatten().tolist() == [255, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]


def test_the_colour_of_a_sign_is_that_of_its_background_at_any_shade() -> None:
    reader = SignColor(WORLD)
    colours = list(WORLD["colours"])
    media = torch.stack([sign("OPEN", colour) for colour in colours])
    for shade in (0.85, 1.0, 1.1):
        assert reader.read((media * shade).clamp(0, 1)) == colours


def test_the_background_is_what_surrounds_the_letters_even_where_some_reach_the_border() -> None:
    blue = torch.tensor(WORLD["colours"]["blue"]) / 255
    media = blue.reshape(1, 3, 1, 1).expand(1, 3, 24, 64).clone()
    media[..., 2:22, 2:62] = 1.0  # white fills most of the sign
    media[..., :, 10:20] = 1.0
    torch.testing.assert_close(background(media), blue.unsqueeze(0))


def test_a_sign_of_the_wrong_colour_scores_zero() -> None:
    media = torch.stack([sign("OPEN", "red"), sign("OPEN", "blue")])
    assert evaluate(SignColor(WORLD), media, [prompt_text("OPEN", "blue")] * 2).scores.tolist() == [0.0, 1.0]


def test_a_colour_inside_the_quotes_or_inside_a_word_is_no_colour_of_the_sign() -> None:
    reader = SignColor(WORLD)
    assert reader.target_of(Prompt('a Blue sign that says "RED"')) == "blue"
    assert reader.target_of(Prompt("a bored blue sign")) == "blue"
    assert reader.target_of(Prompt("a sign", columns={"colour": "red"})) == "red"


@pytest.mark.parametrize("text", ["a sign", "a red and blue sign", 'a green sign that says "RED"'])
def test_a_prompt_without_exactly_one_known_colour_is_named(text: str) -> None:
    with pytest.raises(RewardError, match=r"prompt 9 .*Name exactly one of red, blue"):
        SignColor(WORLD).check_prompts([Prompt(text, id=9)])


def test_the_world_may_be_a_file_and_must_have_colours(tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    path.write_text(json.dumps(WORLD))
    assert SignColor(path).names == list(WORLD["colours"])
    with pytest.raises(RecipeError, match="no such file"):
        SignColor(tmp_path / "nothing.json")
    with pytest.raises(RecipeError, match="needs `colours`"):
        SignColor({"size": [32, 64]})
