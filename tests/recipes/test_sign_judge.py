"""The sign generator's own judge: how it is grown and taught, and what the shipped one answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from alignkit import shipped
from alignkit.rewards.loading import load_file
from alignkit.rewards.understanding import SelfReward
from alignkit.rewards.vision_language import Chat, VisionLanguage
from alignkit.training.reward_model import Examples, Scorer
from alignkit.types import Prompt

judging = load_file(shipped.path("recipes", "signs", "judge.py"))
asking = judging.questions
world = asking.world


@pytest.fixture(scope="module")
def examples() -> Any:
    return asking.Questions()


@pytest.fixture(scope="module")
def fresh() -> Any:
    torch.manual_seed(0)
    return judging.judge().eval()


def tokens(examples: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    found = examples.tokenizer([examples.template.format(text) for text in texts], padding=True, return_tensors="pt")
    return found.input_ids, found.attention_mask


def test_the_recipes_pieces_are_what_the_training_loop_takes(examples: Any, fresh: Any) -> None:
    assert isinstance(examples, Examples)
    assert isinstance(fresh, Scorer)


def test_a_grown_encoder_says_of_text_exactly_what_it_said_before(examples: Any, fresh: Any) -> None:
    inputs = tokens(examples, [world.prompt_for("CAT", "red"), " ", "something else, longer than a sign"])
    assert fresh.drift(*inputs) == 0
    with torch.no_grad():
        fresh.encoder.model.language_model.layers[-1].mlp.down_proj.weight.add_(0.01)
        assert fresh.drift(*inputs) > 0
        fresh.encoder.model.language_model.layers[-1].mlp.down_proj.weight.sub_(0.01)


def test_what_the_generator_knows_is_frozen_and_the_new_parts_learn(examples: Any, fresh: Any) -> None:
    learning = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert not any("embed_tokens" in n or "before" in n or "language_model.norm" in n for n in learning)
    assert not any(f"language_model.layers.{i}." in n for n in learning for i in range(judging.KEPT_LAYERS))
    value, logs = judging.loss(fresh, examples.batch(3, torch.Generator().manual_seed(0)), torch.Generator())
    value.backward()
    for name in ("encoder.model.visual.patch_embed.proj.weight", "encoder.lm_head.weight", "match.weight"):
        assert fresh.get_parameter(name).grad.abs().sum() > 0, name
    assert set(logs) >= {"loss_anchor", "right_word", "right_colour"}
    fresh.zero_grad()


def test_no_held_out_word_is_ever_shown_or_asked_about() -> None:
    held_out = set(world.split_words()[1])
    rng = np.random.default_rng(0)
    for _ in range(1500):
        _, shown, wrong = asking.signs.draw_training(rng)
        assert not {shown.sign.word, wrong} & held_out
        assert wrong != shown.sign.word


@pytest.mark.parametrize("kind", list(asking.signs.MISTAKES))
def test_every_kind_of_mistake_is_one(kind: str) -> None:
    rng = np.random.default_rng(1)
    wrongs = [asking.signs.mistaken("HOTEL", kind, rng) for _ in range(40)]
    assert "HOTEL" not in wrongs
    if kind == "one_letter":
        assert all(sum(a != b for a, b in zip(w, "HOTEL")) == 1 and len(w) == 5 for w in wrongs)
    if kind == "swapped":
        assert all(sorted(w) == sorted("HOTEL") for w in wrongs)
        assert "HOTLE" in wrongs
    assert asking.signs.mistaken("EEE", "swapped", rng) != "EEE"


@pytest.mark.parametrize("flaw", list(asking.signs.FLAWS))
def test_a_spoilt_sign_confirms_no_word(flaw: str, examples: Any) -> None:
    rng = np.random.default_rng(2)
    clean, _ = asking.signs.draw("HOTEL", np.random.default_rng(2))
    pixels, shown = asking.signs.draw("HOTEL", rng, flaw)
    assert not np.array_equal(pixels, clean)
    answers = [one for one in examples.ask(shown, "HOTLE", rng) if one.kind == asking.WORD]
    no = examples.tokenizer("no").input_ids
    assert all([t for t in one.targets if t != -100][:2] == no for one in answers)
    assert not any(one.kind == asking.READ for one in examples.ask(shown, "HOTLE", rng))
    coloured = any(one.kind == asking.COLOUR for one in examples.ask(shown, "HOTLE", rng))
    assert coloured == (flaw != "shuffled")


def test_letter_targets_compare_the_question_with_the_sign_letter_by_letter(examples: Any) -> None:
    shown = asking.signs.Shown(world.Sign("CAT", "red"))
    for asked, same in (("CAT", [1, 1, 1, 1]), ("CTA", [1, 0, 0, 1]), ("CA", [1, 1, 0]), ("CATS", [1, 1, 1, 0, 1])):
        exchange = examples.about_word(asked, shown)
        assert [m for m in exchange.matched if m != -100] == same
        at = [i for i, m in enumerate(exchange.matched) if m != -100]
        text = [examples.tokenizer.decode([exchange.tokens[i]]) for i in at]
        assert text == [*asked, '"']
    letters, slots = asking.letters_under(shown)
    assert letters[:8] == [26, 26, 2, 0, 0, 19, 26, 26]
    assert slots[:8] == [5, 5, 0, 1, 1, 2, 5, 5]


def test_packed_questions_are_answered_as_one_at_a_time(examples: Any) -> None:
    torch.manual_seed(1)
    judge = judging.judge().eval()
    with torch.no_grad():  # so that the new layers have a say
        for layer in judge.encoder.model.language_model.layers[judging.KEPT_LAYERS :]:
            layer.self_attn.o_proj.weight.normal_(std=0.2)
            layer.mlp.down_proj.weight.normal_(std=0.2)
    pixels, shown = asking.signs.draw("CAT", np.random.default_rng(3))
    media = asking.signs.as_media([pixels])
    row = [examples.about_word("CAT", shown), examples.about_colour("red", shown), examples.about_word("DOG", shown)]
    packed = examples.packed([row])
    batch = asking.Batch(
        pixels=media, **packed, **{n: torch.empty(0) for n in ("letters", "slots", "prompts", "prompts_mask")}
    )
    with torch.no_grad():
        hidden = judge.think(batch, judge.see(media))[-1]
        together = judge.encoder.lm_head(hidden[0, batch.kind[0] >= 10])
        alone = VisionLanguage(judge.encoder, judge.processor(examples.tokenizer)).next_logits(
            [Chat((media[0], q)) for q in ('does the sign say "CAT"?', "is the sign red?", 'does the sign say "DOG"?')]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_it_is_saved_as_a_part_of_the_pipeline(fresh: Any, tmp_path: Any) -> None:
    fresh.save(tmp_path)
    names = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert names >= {"text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/chat_template.jinja"}
    assert '"dtype": "float32"' in (tmp_path / "text_encoder" / "config.json").read_text("utf-8")
    assert (tmp_path / "text_encoder" / "model.safetensors").stat().st_size < 3_000_000


@pytest.fixture(scope="module")
def pipe() -> Any:
    return DiffusionPipeline.from_pretrained(shipped.path(*judging.GENERATOR))


def answers(pipe: Any, media: torch.Tensor, words: list[str], colours: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """P(yes) for the word and for the colour, from the pipeline's own text encoder."""
    prompts = [Prompt(world.prompt_for(word, colour), id=i) for i, (word, colour) in enumerate(zip(words, colours))]
    rewards = [
        SelfReward(questions=(question,), pattern='an? (?P<colour>[a-z]+) sign that says "(?P<word>[A-Z]+)"').bind(pipe)
        for question in (asking.WORD_QUESTION, asking.COLOUR_QUESTION)
    ]
    assert all(reward.module is pipe.text_encoder for reward in rewards)
    with torch.no_grad():
        word, colour = (reward(media, prompts) for reward in rewards)
    return word, colour


def test_the_shipped_text_encoder_reads_held_out_words_and_colours(pipe: Any) -> None:
    rng = np.random.default_rng(4)
    words = world.split_words()[1][::6]
    drawn = [asking.signs.draw(word, rng) for word in words]
    media, colours = asking.signs.as_media([pixels for pixels, _ in drawn]), [shown.sign.colour for _, shown in drawn]
    word, colour = answers(pipe, media, words, colours)
    assert (word > 0.5).float().mean() > 0.85
    assert (colour > 0.5).float().mean() > 0.85
    near = [asking.signs.mistaken(w, k, rng) for w, k in zip(words, ["one_letter", "swapped"] * len(words))]
    others = [
        colours[i - 1] if colours[i - 1] != c else "teal" if c != "teal" else "red" for i, c in enumerate(colours)
    ]
    wrong_word, wrong_colour = answers(pipe, media, near, others)
    assert (wrong_word < 0.5).float().mean() > 0.85
    assert (wrong_colour < 0.5).float().mean() > 0.85


@pytest.mark.parametrize("flaw", ["defocused", "empty", "shuffled"])
def test_the_shipped_text_encoder_confirms_no_word_that_is_not_there(pipe: Any, flaw: str) -> None:
    rng = np.random.default_rng(5)
    words = world.split_words()[1][::10]
    media = asking.signs.as_media([asking.signs.draw(word, rng, flaw)[0] for word in words])
    word, _ = answers(pipe, media, words, ["red"] * len(words))
    assert (word < 0.5).float().mean() > 0.85


def test_the_shipped_text_encoder_conditions_the_generator_as_it_did_before_it_could_see(
    pipe: Any, examples: Any
) -> None:
    judge = judging.Judge(pipe.text_encoder)
    judge.encoder = pipe.text_encoder
    words = world.split_words()[1]
    prompts = [world.prompt_for(word, list(world.COLOURS)[i % 8]) for i, word in enumerate(words)]
    with torch.no_grad():
        assert judge.drift(*tokens(examples, [*prompts, " ", ""])) < 2e-3
