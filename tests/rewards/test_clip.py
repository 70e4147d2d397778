from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate
from alignkit.rewards.clip import CLIPScore, PickScore
from alignkit.rewards.dual_encoder import DualEncoder
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = [Prompt('a red sign that says "CAT"', id=0), Prompt("dog", id=1), Prompt("a small boat " * 12, id=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    PickScore.tiny(folder)
    return folder


def pictures(height: int = 48, width: int = 48, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def features(folder: Path, media: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised image and text features and exp(logit_scale), as the model card of PickScore computes them."""
    model = CLIPModel.from_pretrained(folder).eval()
    resized = F.interpolate(media, (32, 32), mode="bicubic", antialias=True)
    values = (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([str(p) for p in PROMPTS], padding=True, truncation=True, max_length=77, return_tensors="pt")
    out = model(pixel_values=values, **tokens)
    image = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    text = out.text_embeds / out.text_embeds.norm(dim=-1, keepdim=True)
    return image, text, model.logit_scale.exp()


def test_clip_score_is_100_cosines_over_30(folder: Path) -> None:
    image, text, _ = features(folder, pictures())
    expected = 100 * (image * text).sum(dim=-1) / 30
    torch.testing.assert_close(CLIPScore(weights=str(folder))(pictures(), PROMPTS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("divisor", [1.0, 26.0])
def test_pickscore_is_the_learnt_scale_times_the_cosine_over_the_divisor(folder: Path, divisor: float) -> None:
    image, text, scale = features(folder, pictures())
    expected = scale * torch.diagonal(text @ image.T) / divisor
    assert 99 < scale < 101
    reward = PickScore(weights=str(folder), processor=str(folder), divisor=divisor)
    torch.testing.assert_close(reward(pictures(), PROMPTS), expected.detach(), atol=2e-4 / divisor, rtol=1e-5)


def test_a_score_does_not_depend_on_the_other_pictures_nor_on_the_longest_prompt(folder: Path) -> None:
    reward = CLIPScore(weights=str(folder))
    together = reward(pictures(), PROMPTS)
    alone = [reward(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_samples_that_share_a_prompt_are_scored_as_with_prompts_of_their_own(folder: Path) -> None:
    reward = CLIPScore(weights=str(folder))
    shared = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    alone = [reward(pictures()[i : i + 1], [shared[i]]) for i in range(3)]
    torch.testing.assert_close(reward(pictures(), shared), torch.cat(alone), atol=1e-5, rtol=0)


def test_words_after_the_77th_token_do_not_count_and_the_end_token_stays(folder: Path) -> None:
    reward = CLIPScore(weights=str(folder))
    long = "a" * 80
    cut, longer, other = (reward.text_features([text]) for text in (long, long + " dog", "b" + long))
    assert torch.equal(cut, longer)
    assert not torch.allclose(cut, other)
    tokens = reward.towers.tokenizer([long], truncation=True, max_length=77).input_ids[0]
    assert len(tokens) == 77 and tokens[-1] == reward.towers.tokenizer.eos_token_id


def test_the_gradient_of_the_score_is_its_slope(folder: Path) -> None:
    reward = CLIPScore(weights=str(folder))
    media = pictures(20, 36, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(media, PROMPTS[:1]).sum(), media)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = reward(media + step, PROMPTS[:1]) - reward(media - step, PROMPTS[:1])
    torch.testing.assert_close(slope, 2 * (gradient * step).sum()[None], rtol=0.02, atol=0)


def test_of_a_wide_picture_the_centre_is_scored(folder: Path) -> None:
    reward = CLIPScore(weights=str(folder))
    wide = pictures(32, 96, 1)
    edges, centre = wide.clone(), wide.clone()
    edges[..., :24] = 0
    centre[..., 44:52] = 0
    scores = reward(torch.cat([wide, edges, centre]), [PROMPTS[0]] * 3)
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs() > 1e-3


def test_features_have_length_one_and_give_the_score(folder: Path) -> None:
    reward = PickScore(weights=str(folder), processor=str(folder))
    image, text = reward.image_features(pictures()), reward.text_features(PROMPTS)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(reward.scaled((image * text).sum(dim=-1)), reward(pictures(), PROMPTS))


def test_half_precision_weights_give_float32_scores_near_the_exact_ones(folder: Path) -> None:
    exact, half = (
        CLIPScore(weights=str(folder), dtype=dtype)(pictures(), PROMPTS) for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=0.1, rtol=0)


def test_half_precision_does_not_round_the_scale_of_pickscore(folder: Path) -> None:
    exact, half = (
        PickScore(weights=str(folder), processor=str(folder), dtype=dtype).towers.logit_scale
        for dtype in ("float32", "bfloat16")
    )
    torch.testing.assert_close(half, exact, rtol=0, atol=0)


def test_an_unknown_dtype_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(RecipeError, match="'float8'; choose one of float32, bfloat16, float16"):
        CLIPScore(weights=str(folder), dtype="float8").prepare()


def test_weights_have_no_gradient_of_their_own(folder: Path) -> None:
    reward = CLIPScore(weights=str(folder))
    assert not any(p.requires_grad for p in reward.towers.network.parameters())
    assert not reward.towers.network.training


@pytest.mark.parametrize(
    ("reward", "hub"),
    [(CLIPScore(), "openai/clip-vit-large-patch14"), (PickScore(), "yuvalkirstain/PickScore_v1")],
)
def test_missing_weights_name_the_hub_id_and_the_command(
    reward: DualEncoder, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=f"{hub}.*`alignkit fetch NAME`"):
        evaluate(reward, pictures(), PROMPTS)


def test_a_missing_tensor_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    CLIPScore.tiny(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"lack 1 tensors of CLIPModel: visual_projection\.weight"):
        CLIPScore(weights=str(tmp_path)).prepare()


def test_tiny_weights_are_the_same_every_time_and_leave_the_global_generator_alone(
    folder: Path, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    CLIPScore.tiny(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
