"""The sign world: its rules, its files, and the shipped generator that every quick check draws with."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

RECIPE = Path(__file__).parents[2] / "recipes" / "signs"
ASSETS = Path(__file__).parents[2] / "assets" / "signs"
TEN_MILLION_BYTES = 10_000_000


def load(name: str) -> ModuleType:
    """A module of the recipe, whose files import each other as a script's neighbours."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))


world, components, train_flow = (load(name) for name in ("world", "components", "train_flow"))


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ASSETS / "world.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def shipped() -> QwenImagePipeline:
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "generator")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pretraining_pairs(count: int) -> list:
    rng = np.random.default_rng(7)
    return [world.pretraining_pair(rng) for _ in range(count)]


def test_the_same_sign_always_gives_the_same_pixels():
    sign = world.Sign("CAT", "blue", "serif", 0.9, (1, -2), 2.5)
    first, second = world.draw(sign), world.draw(sign)
    assert first.shape == (world.HEIGHT, world.WIDTH, 3) and first.dtype == np.uint8
    assert (first == second).all()


@pytest.mark.parametrize(
    "change",
    [
        {"word": "COT"},
        {"colour": "red"},
        {"font": "mono"},
        {"shade": 1.1},
        {"offset": (0, 0)},
        {"defocus": 0.0},
    ],
)
def test_every_property_of_a_sign_shows_in_its_pixels(change: dict):
    properties = {
        "word": "CAT",
        "colour": "blue",
        "font": "serif",
        "shade": 0.9,
        "offset": (1, -2),
        "defocus": 2.5,
    }
    before, after = world.draw(world.Sign(**properties)), world.draw(world.Sign(**properties | change))
    assert (before != after).any()


def test_world_json_says_what_the_recipe_does(record: dict, tmp_path: Path):
    world.write_world(tmp_path / "world.json")
    assert json.loads((tmp_path / "world.json").read_text("utf-8")) == record


def test_world_json_names_size_colours_template_and_words(record: dict):
    height, width = record["size"]
    assert 24 <= height <= 32 and 48 <= width <= 64
    assert 6 <= len(record["colours"]) <= 8
    assert all(len(rgb) == 3 and all(0 <= v <= 255 for v in rgb) for rgb in record["colours"].values())
    assert record["template"].format(colour="blue", word="CAT") == 'a blue sign that says "CAT"'
    assert len(record["held_out_words"]) >= 96


def test_words_have_three_to_five_capital_letters_and_occur_once(record: dict):
    every = record["train_words"] + record["held_out_words"]
    assert len(set(every)) == len(every)
    assert all(3 <= len(word) <= 5 and set(word) <= set(world.LETTERS) for word in every)


def test_held_out_words_are_disjoint_from_training_words(record: dict):
    assert not set(record["train_words"]) & set(record["held_out_words"])


def test_pretraining_neither_names_nor_shows_a_held_out_word(record: dict):
    held_out = set(record["held_out_words"])
    for prompt, sign in pretraining_pairs(4000):
        assert sign.word not in held_out
        assert prompt.split('"')[1] not in held_out


@pytest.mark.parametrize("variety", [world.WIDE, world.NARROW, world.TRANSPOSED, world.FINAL])
def test_pretraining_pairs_are_imperfect_in_the_shares_that_are_stated(variety: Any):
    rng = np.random.default_rng(7)
    pairs = [world.pretraining_pair(rng, variety) for _ in range(4000)]
    captions = [prompt.split('"')[1] for prompt, _ in pairs]
    transposed = [
        (c[:-2] + c[-1] + c[-2], sign.word) for c, (_, sign) in zip(captions, pairs) if c[-2] != c[-1]
    ]
    wrong = np.mean([caption != sign.word for caption, (_, sign) in zip(captions, pairs)])
    # a chosen letter is the old one in 1 of 26 draws; about 6 % of words end in a double letter
    expected = variety.misspelt * (1 - 0.6 / 26) + 0.94 * variety.transposed
    np.testing.assert_allclose(wrong, expected, atol=0.03)
    np.testing.assert_allclose(np.mean([a == b for a, b in transposed]), variety.transposed, atol=0.03)
    np.testing.assert_allclose(np.mean([sign.defocus > 0 for _, sign in pairs]), variety.defocused, atol=0.03)
    assert {sign.font for _, sign in pairs} == set(variety.fonts)


def test_the_nearest_named_colour_of_every_shade_is_its_own():
    named = np.array(list(world.COLOURS.values()), float)
    for index, rgb in enumerate(named):
        for shade in np.linspace(*world.SHADE, 7):
            distance = np.linalg.norm(named - np.clip(rgb * shade, 0, 255), axis=1)
            assert distance.argmin() == index


def test_two_dimensional_convolutions_equal_the_causal_ones_on_one_frame():
    torch.manual_seed(0)
    vae = components.build_vae()
    pixels = torch.randn(2, 3, 1, 16, 16)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        redrawn = vae.decode(latents).sample
        with components.single_frame_convolutions(vae):
            torch.testing.assert_close(vae.encode(pixels).latent_dist.mean, latents, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(vae.decode(latents).sample, redrawn, rtol=1e-5, atol=1e-5)
        assert all("forward" not in vars(m) for m in vae.modules() if isinstance(m, QwenImageCausalConv3d))


def test_the_tokenizer_spends_exactly_the_dropped_tokens_on_the_template_opening(shipped: QwenImagePipeline):
    opening = shipped.prompt_template_encode.split("{}")[0]
    assert len(shipped.tokenizer(opening).input_ids) == shipped.prompt_template_encode_start_idx


def test_every_letter_and_every_colour_is_one_token(shipped: QwenImagePipeline):
    for colour in world.COLOURS:
        pieces = shipped.tokenizer.tokenize(world.prompt_for("QUICK", colour))
        assert pieces == ["a", f"Ġ{colour}", "Ġsign", "Ġthat", "Ġsays", 'Ġ"', *"QUICK", '"']


def test_the_tokenizer_reads_any_text_and_gives_it_back(shipped: QwenImagePipeline):
    text = 'ein großes Schild: "ÜBER 42%"\n→ 看板'
    assert shipped.tokenizer.decode(shipped.tokenizer(text).input_ids) == text


def test_the_training_embedding_is_the_pipelines_own(shipped: QwenImagePipeline):
    prompts = [world.prompt_for("CAT", "blue"), world.prompt_for("WORLD", "pink")]
    with torch.no_grad():
        ours, our_mask = train_flow.embed(shipped, *train_flow.tokenise(shipped, prompts))
        theirs, their_mask = shipped.encode_prompt(prompts)
    torch.testing.assert_close(our_mask.bool(), their_mask.bool())
    torch.testing.assert_close(ours * our_mask[..., None], theirs * their_mask[..., None])


def draw(pipe: QwenImagePipeline, record: dict, colour: str, **call: Any) -> np.ndarray:
    """One sign that says CAT, (H, W, 3) in [0, 1], in four steps from a fixed seed."""
    height, width = record["size"]
    prompt, rng = world.prompt_for("CAT", colour), torch.Generator().manual_seed(0)
    call = {"true_cfg_scale": 1.0, "num_inference_steps": 4, "output_type": "np"} | call
    return pipe(prompt, height=height, width=width, generator=rng, **call).images[0]


def test_the_shipped_generator_loads_plainly_and_draws_the_prompted_colour(
    shipped: QwenImagePipeline, record: dict
):
    red, blue = draw(shipped, record, "red"), draw(shipped, record, "blue")
    assert red.shape == (*record["size"], 3) and np.isfinite(red).all()
    assert red[:, 0].mean(axis=0).argmax() == 0 and blue[:, 0].mean(axis=0).argmax() == 2


def test_guidance_changes_the_picture(shipped: QwenImagePipeline, record: dict):
    plain = draw(shipped, record, "red")
    guided = draw(shipped, record, "red", true_cfg_scale=4.0, negative_prompt=" ")
    assert np.abs(plain - guided).max() > 0.01


def test_the_shipped_generator_is_float16_on_disk_and_small():
    from safetensors.torch import load_file

    files = list((ASSETS / "generator").rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) < TEN_MILLION_BYTES
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {tensor.dtype for file in weights for tensor in load_file(file).values()} == {torch.float16}
