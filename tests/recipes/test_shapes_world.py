"""The world of moving shapes: its rules, its files, the tracker that judges it, and the generator's parts."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file as load_tensors
from scipy import ndimage

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import load
from alignkit.rewards.loading import load_file
from alignkit.types import Prompt

RECIPE = Path(__file__).parents[2] / "recipes" / "shapes"
ASSETS = Path(__file__).parents[2] / "assets" / "shapes"
TWELVE_MILLION_BYTES = 12_000_000
SPEC = "shipped:recipes/shapes/tracker.py:Tracker"

tracker = load_file(RECIPE / "tracker.py")
world = tracker.world


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ASSETS / "world.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def shipped() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(ASSETS / "generator")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def neighbour(name: str) -> ModuleType:
    """A script of the recipe, whose files import each other by names that scripts of another world have too."""
    names = {file.stem for file in RECIPE.glob("*.py")}
    others = {taken: sys.modules.pop(taken) for taken in names & set(sys.modules)}
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))
        for taken in names & set(sys.modules):
            del sys.modules[taken]
        sys.modules.update(others)


score = neighbour("score")


def as_media(frames: Sequence[np.ndarray]) -> torch.Tensor:
    """(T, H, W, 3) uint8 each as (B, T, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(frames)).movedim(-1, 2).float() / 255


def clips(count: int = 40, seed: int = 0, **faults: float) -> tuple[list[str], list[Any]]:
    """Prompts of every colour, shape and direction, and a clip of each with these faults."""
    rng = np.random.default_rng(seed)
    every = [prompt for part in world.split_prompts() for prompt in part]
    prompts = [every[i] for i in rng.permutation(len(every))[:count]]
    shares = replace(world.NONE, **faults)
    return prompts, [world.random_clip(rng, *world.parse(prompt), shares) for prompt in prompts]


def parts_of(prompts: Sequence[str], drawn: Sequence[Any]) -> dict[str, np.ndarray]:
    """Every part of the tracker, one array over the clips."""
    found = tracker.judgements(as_media([world.draw(clip) for clip in drawn]), prompts)
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def one_clip(**changes: Any) -> Any:
    path = tuple((8.0 + 1.5 * t, 16.3) for t in range(world.FRAMES))
    return replace(world.Clip("red", "circle", path), **changes)


# The world


def test_the_shipped_files_say_what_the_recipe_does(record: dict, tmp_path: Path):
    world.write_world(tmp_path / "world.json")
    assert json.loads((tmp_path / "world.json").read_text("utf-8")) == record
    for name in ("train", "held_out"):
        assert (ASSETS / f"{name}.txt").read_text("utf-8").splitlines() == record[f"{name}_prompts"]


def test_no_prompt_is_both_trained_and_held_out_and_none_is_missing():
    train, held_out = world.split_prompts()
    assert (len(set(train)), len(set(held_out))) == (96, 32)
    assert not set(train) & set(held_out)
    assert {world.parse(prompt) for prompt in train + held_out} == {
        (colour, shape, direction)
        for colour in world.COLOURS
        for shape in world.SHAPES
        for direction in world.DIRECTIONS
    }


def test_held_out_prompts_have_every_direction_alike_and_every_colour_and_shape():
    _, held_out = world.split_prompts()
    colours, shapes, directions = (Counter(part) for part in zip(*map(world.parse, held_out)))
    assert set(directions.values()) == {8}
    assert set(colours) == set(world.COLOURS) and set(shapes) == set(world.SHAPES)


def test_every_word_of_a_held_out_prompt_occurs_in_a_training_prompt():
    train, held_out = world.split_prompts()
    assert {word for prompt in held_out for word in prompt.split()} <= {w for p in train for w in p.split()}


def test_prompts_are_parsed_back_into_what_they_were_made_of():
    assert world.parse("a red circle moves right") == ("red", "circle", "moves right")
    train, _ = world.split_prompts()
    assert [world.prompt_for(*world.parse(prompt)) for prompt in train] == train


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red circle",
        "red circle moves right",
        "a pink circle falls",
        "a red star falls",
        "a red circle flies",
        "a red circle moves right ",
        "A red circle moves right",
    ],
)
def test_a_prompt_of_another_world_is_refused_and_quoted(prompt: str):
    with pytest.raises(ValueError, match=r"no prompt of the moving shapes; expected like"):
        world.parse(prompt)


def test_the_same_clip_always_gives_the_same_pixels():
    first, second = world.draw(one_clip()), world.draw(one_clip())
    assert first.shape == (world.FRAMES, world.SIZE, world.SIZE, 3) and first.dtype == np.uint8
    assert (first == second).all()


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "orange"},
        {"shape": "square"},
        {"path": ((8.0, 16.8),) * 9},
        {"radius": 5.2},
        {"ground": 40.0},
        {"light": (1.0,) * 8 + (0.9,)},
    ],
)
def test_every_property_of_a_clip_shows_in_its_pixels(change: dict):
    assert (world.draw(one_clip()) != world.draw(one_clip(**change))).any()


def test_a_seed_repeats_its_pretraining_pairs():
    first, second = ([world.pretraining_pair(np.random.default_rng(3)) for _ in range(2)] for _ in range(2))
    assert first == second
    assert world.pretraining_pair(np.random.default_rng(4)) != first[0]


@pytest.mark.parametrize("free", [False, True])
def test_a_good_path_goes_the_way_that_is_asked_at_a_steady_speed_and_stays_inside(free: bool):
    rng = np.random.default_rng(1)
    for direction, step in world.DIRECTIONS.items():
        for _ in range(50):
            clip = world.random_clip(rng, "white", "cross", direction, replace(world.NONE, free=free))
            path = np.array(clip.path)
            velocity = np.diff(path, axis=0)
            speed = velocity @ np.array(step)
            np.testing.assert_allclose(velocity, np.outer(speed, step), atol=1e-9)
            np.testing.assert_allclose(speed, speed.mean())
            assert world.SPEED[0] - 1e-9 <= speed.mean() <= world.SPEED[1] + 1e-9
            assert (path >= clip.radius).all() and (path <= world.SIZE - clip.radius).all()


def test_a_clip_begins_and_ends_at_places_of_the_world_unless_it_is_free():
    rng, asked = np.random.default_rng(1), ("red", "square", "rises")
    placed, free = (
        [world.random_clip(rng, *asked, replace(world.NONE, free=free)) for _ in range(200)] for free in (False, True)
    )
    for clip in placed:
        assert {*clip.path[0], *clip.path[-1]} <= set(map(float, world.PLACES))
    assert {clip.radius for clip in placed} == set(world.RADIUS)
    assert len({clip.path[0] for clip in free}) == len({clip.radius for clip in free}) == 200


def test_jerky_paths_stay_inside_too():
    _, drawn = clips(128, jerky=1.0)
    path = np.array([clip.path for clip in drawn])
    assert path.min() >= 4 and path.max() <= world.SIZE - 5


def test_pretraining_pairs_have_each_fault_in_the_share_that_is_stated():
    rng = np.random.default_rng(7)
    pairs = [world.pretraining_pair(rng) for _ in range(3000)]
    steps = np.array([np.diff(np.array(clip.path), axis=0) for _, clip in pairs])  # (N, 8, 2)
    still = (steps == 0).all(axis=(1, 2))
    jerky = np.ptp(steps, axis=1).max(axis=1) > 0.01
    dark = np.array([len(set(clip.light)) > 1 for _, clip in pairs])
    asked = np.array([world.DIRECTIONS[world.parse(prompt)[2]] for prompt, _ in pairs])
    wrong = (steps[:, 0] * asked).sum(axis=1) <= 0.5 * np.linalg.norm(steps[:, 0], axis=1)
    faults = world.PRETRAINING
    np.testing.assert_allclose(still.mean(), faults.still, atol=0.03)
    np.testing.assert_allclose(jerky.mean(), faults.jerky, atol=0.03)
    np.testing.assert_allclose(dark.mean(), faults.flickering, atol=0.03)
    np.testing.assert_allclose(wrong[~still & ~jerky].mean(), faults.wrong_direction, atol=0.03)


def test_pretraining_uses_training_prompts_alone_and_shows_the_colour_and_shape_they_name():
    train, _ = world.split_prompts()
    rng = np.random.default_rng(8)
    for _ in range(800):
        prompt, clip = world.pretraining_pair(rng)
        assert prompt in train
        assert (clip.colour, clip.shape) == world.parse(prompt)[:2]


# The tracker

# what each fault does to the parts: a fault's own part falls below 0.6 on average, every other stays above 0.95
FAULTS = {
    "wrong_direction": "direction",
    "still": "direction",
    "jerky": "smoothness",
    "flickering": "steadiness",
}


def test_clips_without_faults_score_at_least_95_percent_in_every_part():
    prompts, drawn = clips(32)
    parts = parts_of(prompts, drawn)
    for name in tracker.PARTS:
        assert parts[name].min() >= 0.95, name
    assert parts["all"].min() >= 0.9 and parts["all"].mean() >= 0.97


def test_the_measured_speed_is_the_speed_that_was_drawn():
    prompts, drawn = clips(32)
    true = [np.linalg.norm(np.subtract(clip.path[1], clip.path[0])) for clip in drawn]
    np.testing.assert_allclose(parts_of(prompts, drawn)["speed"], true, atol=0.05)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_lowers_its_own_part_and_leaves_the_others(fault: str):
    prompts, drawn = clips(32, **{fault: 1.0})
    parts = parts_of(prompts, drawn)
    own = FAULTS[fault]
    assert parts[own].mean() < 0.2
    for name in set(tracker.PARTS) - {own}:
        assert parts[name].mean() > 0.95, name


@pytest.mark.parametrize("fault", ["wrong_direction", "still"])
def test_a_clip_that_stands_or_goes_elsewhere_has_no_direction(fault: str):
    prompts, drawn = clips(32, **{fault: 1.0})
    parts = parts_of(prompts, drawn)
    assert (parts["direction"] == 0).all() and (parts["all"] == 0).all()


def test_a_colour_or_a_form_that_was_not_asked_for_is_not_the_same_shape():
    prompts, drawn = clips(32)
    names, shapes = list(world.COLOURS), world.SHAPES
    painted = [replace(clip, colour=names[names.index(clip.colour) - 1]) for clip in drawn]
    formed = [replace(clip, shape=shapes[shapes.index(clip.shape) - 1]) for clip in drawn]
    for changed in (painted, formed):
        parts = parts_of(prompts, changed)
        assert parts["identity"].max() == 0
        assert min(parts[name].mean() for name in ("direction", "smoothness", "steadiness")) > 0.95


def test_identity_is_the_share_of_frames_that_show_what_was_asked():
    frames = world.draw(one_clip())
    frames[:3] = world.draw(one_clip(shape="cross"))[:3]
    frames[5:6] = world.draw(one_clip(colour="blue"))[5:6]
    (found,) = tracker.judgements(as_media([frames]), ["a red circle moves right"])
    np.testing.assert_allclose(found["identity"], 5 / 9)


def test_a_second_shape_in_a_frame_spoils_its_identity():
    frames, other = world.draw(one_clip()), world.draw(one_clip(path=((23.0, 6.0),) * 9))
    both = np.maximum(frames, other)
    (alone,), (together,) = (
        tracker.judgements(as_media([shown]), ["a red circle moves right"]) for shown in (frames, both)
    )
    assert alone["identity"] == 1 and together["identity"] < 0.5


def test_frames_without_a_shape_count_as_faults():
    frames = world.draw(one_clip())
    frames[3:5] = 45
    (found,) = tracker.judgements(as_media([frames]), ["a red circle moves right"])
    assert found["direction"] == 1
    np.testing.assert_allclose(found["identity"], 7 / 9)
    np.testing.assert_allclose([found["smoothness"], found["steadiness"]], 7 / 9, atol=0.02)


@pytest.mark.parametrize("empty", [5, 9])
def test_a_clip_that_is_mostly_empty_scores_zero_in_every_part(empty: int):
    frames = world.draw(one_clip())
    frames[:empty] = 45
    (found,) = tracker.judgements(as_media([frames]), ["a red circle moves right"])
    assert set(found.values()) == {0.0}


def test_brightness_does_not_change_the_colour_that_is_read():
    colours = np.array(list(world.COLOURS.values())) / 255
    for light in (0.35, 0.7, 1.0):
        assert tracker.hues(light * colours).tolist() == list(range(len(colours)))


def test_blur_and_noise_of_an_autoencoder_leave_good_clips_good():
    prompts, drawn = clips(32)
    media = as_media([world.draw(clip) for clip in drawn])
    blurred = torch.from_numpy(ndimage.gaussian_filter(media.numpy(), (0, 0, 0, 0.8, 0.8)))
    noisy = blurred + 0.015 * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))
    found = tracker.judgements(noisy.clamp(0, 1), prompts)
    assert np.mean([one["identity"] for one in found]) > 0.98
    assert np.mean([one["all"] for one in found]) > 0.95


def test_uniform_motion_is_fitted_as_by_polyfit():
    rng = np.random.default_rng(0)
    times, centres = np.array([0, 1, 3, 4, 7]), rng.normal(size=(5, 2))
    velocity, residual = tracker.uniform_motion(centres, times)
    fits = [np.polyfit(times, centres[:, axis], 1) for axis in (0, 1)]
    off = np.stack([centres[:, axis] - np.polyval(fit, times) for axis, fit in enumerate(fits)], axis=1)
    np.testing.assert_allclose(velocity, [fit[0] for fit in fits])
    np.testing.assert_allclose(residual, np.sqrt((off**2).sum(axis=1).mean()))


def test_the_tracker_multiplies_its_parts_and_each_is_a_judge_of_its_name():
    prompts, drawn = clips(8, still=0.3, flickering=0.5)
    media = as_media([world.draw(clip) for clip in drawn])
    rows = [Prompt(text, id=i) for i, text in enumerate(prompts)]
    judges = [load(SPEC), *(load(f'{SPEC}(part="{part}")') for part in tracker.PARTS)]
    assert [judge.name for judge in judges] == ["tracker", *tracker.PARTS]
    assert {judge.kind for judge in judges} == {"video"}
    whole, *parts = (judge(media, rows) for judge in judges)
    torch.testing.assert_close(whole, torch.stack(parts).prod(dim=0))
    assert 0 < whole.mean() < 0.9


def test_a_clip_scores_the_same_alone_and_in_a_batch():
    prompts, drawn = clips(6, jerky=0.5, flickering=0.5)
    media = as_media([world.draw(clip) for clip in drawn])
    rows = [Prompt(text) for text in prompts]
    judge = load(SPEC)
    alone = torch.cat([judge(media[i : i + 1], rows[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(judge(media, rows), alone)


def test_the_tracker_refuses_an_unknown_part_and_a_prompt_of_another_world():
    with pytest.raises(RecipeError, match="part='colour'; choose one of all, direction"):
        load(f'{SPEC}(part="colour")')
    with pytest.raises(RewardError, match="prompt 7: 'a cat' is no prompt of the moving shapes"):
        load(SPEC)(torch.rand(1, 9, 3, 32, 32), [Prompt("a cat", id=7)])


# Scores

RIGHT = {"direction": 1.0, "smoothness": 0.97, "steadiness": 0.98, "identity": 1.0, "all": 0.95, "speed": 1.5}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "good"),
        ({"direction": 0.0, "speed": 0.1}, "still"),
        ({"direction": 0.0}, "wrong_direction"),
        ({"smoothness": 0.3}, "jerky"),
        ({"steadiness": 0.5}, "flickering"),
        ({"identity": 8 / 9}, "mistaken"),
    ],
)
def test_a_fault_is_named_by_the_part_that_is_low(change: dict, expected: str):
    assert [name for name, has in score.faults(RIGHT | change).items() if has] == [expected]


def test_a_summary_has_the_shares_of_faults_that_were_drawn():
    prompts, drawn = clips(24)
    _, still = clips(24, still=1.0)
    _, dark = clips(24, flickering=1.0)
    media = as_media([world.draw(clip) for clip in drawn[:12] + still[12:18] + dark[18:]])
    found = score.summary(media, prompts)
    assert (found["good"], found["still"], found["flickering"]) == (0.5, 0.25, 0.25)
    assert found["wrong_direction"] == found["jerky"] == found["mistaken"] == 0


def test_a_group_is_mixed_where_some_of_its_clips_are_good_and_some_are_not():
    prompts, drawn = clips(4)
    _, still = clips(4, still=1.0)
    media = as_media([world.draw(clip) for clip in [*drawn, *still[:1], *drawn[1:]]])
    assert score.mixed_groups(media, prompts * 2, seeds=2) == 0.25


# The generator


def draw_plainly(pipe: WanPipeline, prompts: list[str], **call: Any) -> torch.Tensor:
    """(B, T, 3, H, W) in four steps from fixed seeds."""
    rng = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    size = {"height": world.SIZE, "width": world.SIZE, "num_frames": world.FRAMES, "max_sequence_length": 8}
    call = {**size, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", **call}
    return torch.as_tensor(pipe(prompt=prompts, generator=rng, **call).frames)


def test_the_shipped_generator_loads_plainly_and_draws_the_prompted_colour(shipped: WanPipeline):
    clips = draw_plainly(shipped, ["a red circle falls", "a blue circle falls"])
    assert clips.shape == (2, world.FRAMES, 3, world.SIZE, world.SIZE) and clips.isfinite().all()
    red, blue = clips.amax(dim=(1, 3, 4))
    assert red[0] - red[2] > 0.2 and blue[2] - blue[0] > 0.2


def test_guidance_changes_the_clip(shipped: WanPipeline):
    plain, guided = (draw_plainly(shipped, ["a red circle falls"], guidance_scale=g) for g in (1.0, 3.0))
    assert (plain - guided).abs().max() > 0.01


def test_every_word_of_the_world_is_one_token_and_none_is_unknown(shipped: WanPipeline):
    every = [prompt for part in world.split_prompts() for prompt in part]
    words = {word for prompt in every for word in prompt.split()}
    ids = shipped.tokenizer(every).input_ids
    assert [len(row) for row in ids] == [len(prompt.split()) + 1 for prompt in every]
    assert len({token for row in ids for token in row}) == len(words) + 1
    assert shipped.tokenizer.unk_token_id not in {token for row in ids for token in row}


@pytest.mark.parametrize("length", [8, 512])
def test_training_embeds_prompts_as_the_pipeline_does(shipped: WanPipeline, length: int):
    flow, prompts = neighbour("train_flow"), ["a red circle moves right", ""]
    ours = flow.embedded(shipped, *flow.tokenise(shipped, prompts), length)
    theirs = shipped.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_early_frames_are_decoded_from_early_latents_alone(shipped: WanPipeline):
    channels = shipped.vae.config.z_dim
    latents = torch.randn(1, channels, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, part = shipped.vae.decode(latents).sample, shipped.vae.decode(latents[:, :, :2]).sample
    assert whole.shape[2] == world.FRAMES
    torch.testing.assert_close(whole[:, :, : part.shape[2]], part, rtol=1e-4, atol=1e-4)


def test_the_shipped_generator_is_float16_on_disk_and_small():
    files = [file for file in (ASSETS / "generator").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < TWELVE_MILLION_BYTES
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {tensor.dtype for file in weights for tensor in load_tensors(file).values()} == {torch.float16}


def test_no_shipped_file_names_a_folder_of_the_machine_that_made_it():
    for file in ASSETS.rglob("*config.json"):
        origin = json.loads(file.read_text("utf-8")).get("_name_or_path", "")
        assert not Path(origin).is_absolute(), file
