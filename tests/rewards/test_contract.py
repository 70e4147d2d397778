"""What every reward promises. A reward added to `TABLE` needs one line in `CASES` and nothing else.

Rewards whose weights are on the hub run on tiny random ones, written in the published layout and read by the code
that reads the real ones.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from alignkit import shipped
from alignkit.policy import Policy
from alignkit.rewards import TABLE, MissingWeights, Reward, describe, evaluate, load, probe
from alignkit.rewards.base import SHAPES, Binds, Prepares, ScoresGroups
from alignkit.rewards.card import FAMILIES, HasCard, HasTiny, HasWeights
from alignkit.rewards.catalogue import record_of
from alignkit.rewards.loading import find
from alignkit.rewards.noise_aware import NoiseAwareReward
from alignkit.rewards.tesseract import available
from alignkit.types import Prompt
from tests.rewards.signs import WORDS, WORLD, prompt_text, sign


@dataclass(frozen=True)
class Case:
    """The documented range of a reward's scores, options it needs without shipped files, columns of its prompts.

    Attributes:
        bound: it is part of the generator; the shipped one is bound.
        twice: how far scores of the same sample may differ between batch sizes (matrix products round differently).
    """

    lowest: float
    highest: float
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    bound: bool = False
    twice: float = 1e-5


REFERENCE = sign("CAFE", "red")
INCLUDE = [{"class": "truck", "count": 6}]
BOXES = [{"label": "person", "box": [0.0, 0.0, 0.5, 1.0]}, {"label": "dog", "box": [0.5, 0.0, 1.0, 1.0]}]
CASES: dict[str, Case] = {
    "clip_score": Case(-100 / 30, 100 / 30),
    "open_clip": Case(-1, 1),
    "pickscore": Case(-100, 100),
    "hpsv2": Case(-1, 1),
    "hpsv21": Case(-1, 1),
    "social_reward": Case(-1, 1),
    "aesthetic": Case(-math.inf, math.inf),
    "mps": Case(-math.inf, math.inf),
    "image_reward": Case(-math.inf, math.inf),
    "hpsv3": Case(-math.inf, math.inf),
    "unified_reward": Case(0, 1),
    "dino_similarity": Case(-1, 1, columns={"reference": REFERENCE}),
    "dino_style": Case(-1, 1, {"references": "shipped:assets/signs"}),
    "critic": Case(-math.inf, math.inf),
    "ocr": Case(0, 1),
    "ocr_video": Case(0, 1),
    "tesseract": Case(0, 1),
    "geneval": Case(0, 1, {"mode": "dense"}, {"include": INCLUDE}),
    "box_iou": Case(0, 1, columns={"boxes": BOXES}),
    "yes_probability": Case(0, 1),
    "yes_against_reference": Case(0, 1, columns={"reference": REFERENCE}),
    "rating": Case(1, 5),
    "checklist": Case(0, 1),
    "pair_judge": Case(0, 1, columns={"reference": REFERENCE}),
    "unified_reward_pair": Case(0, 1, columns={"reference": REFERENCE}),
    "win_rate": Case(0, 1),
    "self_reward": Case(0, 1, bound=True),
    "region_map": Case(-1, 1, bound=True),
    "noise_aware": Case(-math.inf, math.inf, {"dimension": "legibility"}),
    "solace": Case(-math.inf, math.inf, {"call": {"height": 24, "width": 64}}, bound=True),
    "video_reward": Case(-math.inf, math.inf),
    "segmental": Case(0, 1, {"reward": "brightness"}),
    "per_frame_mean": Case(0, 1, {"reward": "brightness", "name": "per_frame_mean"}),
    "frame_difference": Case(0, 1),
    "flow_magnitude": Case(0, math.inf),
    "motion_smoothness": Case(-math.inf, 0),
    "gated": Case(0, 1),
    "hybrid": Case(-math.inf, math.inf),
    "sign_color": Case(0, 1, {"world": WORLD}),
    "jpeg_compressibility": Case(-math.inf, 0),
    "jpeg_incompressibility": Case(0, math.inf),
    "brightness": Case(0, 1),
}
COLOURS = ("blue", "red", "yellow", "white")


@functools.cache
def reward_of(name: str) -> Reward:
    options = dict(CASES[name].options)
    target = find(name)
    if issubclass(target, HasTiny):
        folder = Path(tempfile.mkdtemp(prefix=f"alignkit-{name}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        options = {**target.tiny(folder), **options}
    reward = load(name, **options)
    return reward.bind(generator()) if CASES[name].bound and isinstance(reward, Binds) else reward


@functools.cache
def generator() -> Policy:
    """The shipped generator, to which self-rewards are bound."""
    pipe = DiffusionPipeline.from_pretrained(shipped.path("assets", "signs", "generator"))
    pipe.set_progress_bar_config(disable=True)
    return Policy(pipe, train=None)


@pytest.fixture(params=sorted(TABLE))
def reward(request: pytest.FixtureRequest) -> Reward:
    if request.param == "tesseract" and not available():
        pytest.skip("the program tesseract is not installed (Debian: tesseract-ocr)")
    if issubclass(find(request.param), NoiseAwareReward):
        pytest.skip("is asked at noise levels: test_noise_aware.py")
    if request.param not in CASES:
        pytest.fail(f"reward {request.param!r} is in TABLE; add its line to CASES in {__file__}")
    return reward_of(request.param)


def batch(reward: Reward) -> tuple[torch.Tensor, list[Prompt]]:
    """Four signs that do what their prompt says or not; as video, each moves at its own speed; as latents, noise."""
    media = torch.stack([sign(word, colour) for word, colour in zip(WORDS, COLOURS)])
    texts = [prompt_text(WORDS[i], COLOURS[i]) for i in (0, 1, 3, 2)]
    columns = CASES[reward.name].columns
    prompts = [Prompt(text, id=i + 1, columns=columns) for i, text in enumerate(texts)]
    if isinstance(reward, ScoresGroups):
        prompts = [Prompt(texts[0], id=1, columns=columns)] * 4
    if reward.kind == "video":
        media = torch.stack([torch.stack([one.roll(t * i, -1) for t in range(4)]) for i, one in enumerate(media)])
    if reward.kind == "latent":
        cond = generator().condition(prompts, num_steps=2, height=24, width=64)
        media = generator().initial_latents(cond, torch.Generator().manual_seed(0))
    return media, prompts


def test_a_reward_has_name_kind_and_differentiable(reward: Reward) -> None:
    assert reward.name in TABLE
    assert reward.kind in SHAPES
    assert isinstance(reward.differentiable, bool)


def test_scores_are_finite_float32_one_per_sample_and_in_the_documented_range(reward: Reward) -> None:
    scores = evaluate(reward, *batch(reward)).scores
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    case = CASES[reward.name]
    assert ((scores >= case.lowest) & (scores <= case.highest)).all()
    assert scores.unique().numel() > 1, "the batch was made so that its samples differ"


def test_the_score_of_a_sample_does_not_depend_on_its_batch(reward: Reward) -> None:
    if isinstance(reward, ScoresGroups):
        pytest.skip("compares the samples of a group")
    media, prompts = batch(reward)
    together = evaluate(reward, media, prompts).scores
    alone = torch.cat([evaluate(reward, media[i : i + 1], prompts[i : i + 1]).scores for i in range(4)])
    tolerance = CASES[reward.name].twice
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def test_the_same_input_twice_gives_the_same_scores(reward: Reward) -> None:
    assert probe(reward, *batch(reward)).difference == 0


def test_media_are_left_as_they_were(reward: Reward) -> None:
    media, prompts = batch(reward)
    before = media.clone()
    evaluate(reward, media, prompts)
    assert torch.equal(media, before)


def test_a_differentiable_reward_has_gradients_and_the_others_promise_none(reward: Reward) -> None:
    gradient = probe(reward, *batch(reward)).gradient
    assert (gradient is not None and gradient > 0) == reward.differentiable


def test_half_precision_media_are_accepted(reward: Reward) -> None:
    media, prompts = batch(reward)
    assert evaluate(reward, media.bfloat16(), prompts).scores.dtype == torch.float32


def test_an_empty_batch_gives_no_scores(reward: Reward) -> None:
    media, _ = batch(reward)
    assert evaluate(reward, media[:0], []).scores.shape == (0,)


def test_the_record_of_a_reward_is_json_and_names_it(reward: Reward) -> None:
    record = json.loads(json.dumps(describe(reward)))
    assert record["name"] == reward.name
    assert record["spec"] == TABLE[reward.name]


def test_a_reward_has_a_card_for_the_table(reward: Reward) -> None:
    assert isinstance(reward, HasCard)
    assert reward.card.family in FAMILIES
    assert reward.card.summary and reward.card.range and reward.card.cost
    if record_of(reward.name)["weights"]:
        assert reward.card.licence, "weights have a licence"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_weights_that_are_nowhere_are_named_with_the_command_that_fetches_them(name: str) -> None:
    target = find(name)
    if not issubclass(target, HasWeights):
        pytest.skip("reads nothing")
    remote = load(name, **CASES[name].options)
    assert isinstance(remote, HasWeights) and isinstance(remote, Prepares)
    ids = [files.source for files in remote.files() if files.local is None]
    if not ids:
        pytest.skip("reads nothing from the hub by default")
    with pytest.raises(MissingWeights, match="alignkit fetch") as raised:
        remote.prepare()
    assert any(source in str(raised.value) for source in ids)


def test_every_case_is_a_reward_of_the_table() -> None:
    assert set(CASES) == set(TABLE)
