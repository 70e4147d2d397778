"""The trained reward models of the sign world, as they ship, through the libraries that define their formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from alignkit import Prompt
from alignkit.rewards import load
from alignkit.rewards.loading import load_file
from alignkit.shipped import path

SIGNS = path("recipes", "signs")
PREFERENCE, FEATURES = path("assets", "signs", "preference"), path("assets", "signs", "features")
world = load_file(SIGNS / "world.py")
MEGABYTES = 3


def drawn(*signs: object) -> torch.Tensor:
    return torch.stack([torch.from_numpy(world.draw(sign).copy()).permute(2, 0, 1) for sign in signs]).float() / 255


@pytest.mark.parametrize("folder", [PREFERENCE, FEATURES], ids=["preference", "features"])
def test_a_shipped_reward_model_is_small(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < MEGABYTES * 2**20


def test_open_clip_alone_loads_the_preference_model_and_keeps_the_size_of_signs() -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{PREFERENCE}")
    tokens = open_clip.get_tokenizer(f"local-dir:{PREFERENCE}")
    pixels = preprocess(Image.fromarray(world.draw(world.Sign("CAT", "blue"))))
    assert pixels.shape == (3, world.HEIGHT, world.WIDTH)
    images = model.encode_image(pixels[None], normalize=True)
    prompts = ['a blue sign that says "CAT"', 'a blue sign that says "CTA"', 'a red sign that says "CAT"']
    cosine = (images @ model.encode_text(tokens(prompts), normalize=True).T)[0]
    reward = load("open_clip", model=str(PREFERENCE))
    own = reward(drawn(*[world.Sign("CAT", "blue")] * 3), [Prompt(p) for p in prompts])
    assert_close(own, cosine.detach(), atol=1e-4, rtol=0)
    assert int(cosine.argmax()) == 0


def test_the_preference_model_prefers_held_out_signs_without_a_flaw() -> None:
    contests = load_file(SIGNS / "preference.py").Contests(held_out_words=40)
    reward = load("open_clip", model=str(PREFERENCE))
    with torch.no_grad():
        found = contests.measure(reward)
    assert found["pair accuracy"] > 0.9
    assert min(found.values()) > 0.75


def test_no_training_example_shows_or_names_a_held_out_word() -> None:
    module = load_file(SIGNS / "preference.py")
    batch = module.Contests(held_out_words=1).batch(60, torch.Generator().manual_seed(0))
    held_out = set(world.split_words()[1])
    named = {prompt.split('"')[1] for prompts in batch["prompts"] for prompt in prompts}
    assert not named & held_out
    shown = {tuple(row) for row in batch["says"].flatten(0, 1).tolist()}
    assert not shown & {tuple(module.letters(word)) for word in held_out}


def test_the_tokens_of_letters_say_where_they_stand() -> None:
    tokenizer = load_file(SIGNS / "preference.py").build_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer('a red sign that says "CAT"').input_ids)
    assert pieces[-6:] == ['"', "3C", "5A", "7T", '"', "<end>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer('"HOUSE" "ABCD"').input_ids)[2:7] == ["1H", "3O", "5U", "7S", "9E"]


def test_the_features_tell_fonts_apart_whatever_the_colour() -> None:
    names = ("references", "weights", "use", "match", "pool", "k")
    values = (str(path("assets", "signs", "style")), str(FEATURES), "patches", "best", "top_k", 4)
    reward = load("dino_style", **dict(zip(names, values, strict=True)))
    rng, words = np.random.default_rng(5), world.split_words()[1][:40]
    signs = [world.random_sign(rng, word, list(world.COLOURS)[i % 8]) for i, word in enumerate(words)]
    with torch.no_grad():
        mono, serif = (
            reward(drawn(*[replace(sign, font=font) for sign in signs]), [Prompt("")] * len(signs))
            for font in world.FINAL.fonts
        )
    assert float((serif > mono).float().mean()) > 0.9


def test_the_font_reader_is_right_on_drawn_signs_even_where_letters_are_wrong() -> None:
    serif = load_file(SIGNS / "fonts.py").serif
    words = world.split_words()[1][:20]
    prompts = [Prompt(world.prompt_for(word, "red"), i) for i, word in enumerate(words)]
    for font, wanted in (("mono", 0.0), ("serif", 1.0)):
        right = drawn(*[world.Sign(word, "red", font, offset=(1, -1)) for word in words])
        wrong = drawn(*[world.Sign(word[:-1] + "Q", "red", font) for word in words])
        assert serif(right, prompts).tolist() == [wanted] * len(words)
        assert abs(float(serif(wrong, prompts).mean()) - wanted) <= 0.1
