from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from alignkit.errors import RewardError
from alignkit.rewards import evaluate
from alignkit.rewards.aesthetic import Aesthetic
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = [Prompt("a cat", id=0), Prompt("", id=1), Prompt("a dog", id=2)]
LAYERS = (0, 2, 4, 6, 7)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return Aesthetic.tiny(tmp_path_factory.mktemp("aesthetic"))


def pictures(height: int = 48, width: int = 48) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_score_is_five_linear_layers_on_features_of_length_one(options: dict[str, Any]) -> None:
    clip = CLIPModel.from_pretrained(options["clip"]).eval()
    resized = F.interpolate(pictures(), (32, 32), mode="bicubic", antialias=True)
    values = (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    features = clip.get_image_features(values).pooler_output
    x = (features / features.norm(dim=-1, keepdim=True)).double()
    state = torch.load(options["weights"], weights_only=True)
    assert [tuple(state[f"layers.{i}.weight"].shape) for i in LAYERS[1:]] == [(128, 1024), (64, 128), (16, 64), (1, 16)]
    for i in LAYERS:
        x = x @ state[f"layers.{i}.weight"].double().T + state[f"layers.{i}.bias"].double()
    scores = Aesthetic(**options)(pictures(), PROMPTS)
    torch.testing.assert_close(scores, x[:, 0].float().detach(), atol=1e-5, rtol=1e-5)


def test_a_score_depends_neither_on_the_prompt_nor_on_the_other_pictures(options: dict[str, Any]) -> None:
    reward = Aesthetic(**options)
    together = reward(pictures(), PROMPTS)
    alone = torch.cat([reward(pictures()[i : i + 1], [Prompt("else")]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_gradients_reach_the_pixels_that_are_shown(options: dict[str, Any]) -> None:
    media = pictures(32, 64).requires_grad_()
    evaluate(Aesthetic(**options), media, PROMPTS).scores.sum().backward()
    assert media.grad is not None
    shown = media.grad.abs().sum(dim=1) > 0
    assert shown[..., 16:48].all() and not shown[..., :16].any()


def test_a_head_without_its_last_layer_is_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    state = torch.load(options["weights"], weights_only=True)
    del state["layers.7.bias"]
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=r"lack 1 tensors of LinearHead: layers\.7\.bias"):
        Aesthetic(weights=str(tmp_path / "head.pth"), clip=options["clip"]).prepare()


def test_a_head_for_another_clip_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(1024, 512)}, tmp_path / "head.pth")
    with pytest.raises(RewardError, match="lack 9 tensors of LinearHead"):
        Aesthetic(weights=str(tmp_path / "head.pth"), clip=options["clip"]).prepare()
    state = torch.load(options["weights"], weights_only=True)
    torch.save({**state, "layers.9.weight": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=r"1 tensors that LinearHead has not: layers\.9\.weight"):
        Aesthetic(weights=str(tmp_path / "head.pth"), clip=options["clip"]).prepare()


def test_a_file_of_something_else_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "head.pth")
    with pytest.raises(RewardError, match="holds list, expected tensors by name"):
        Aesthetic(weights=str(tmp_path / "head.pth"), clip=options["clip"]).prepare()


def test_half_precision_weights_give_float32_scores_near_the_exact_ones(options: dict[str, Any]) -> None:
    exact, half = (Aesthetic(**options, dtype=dtype)(pictures(), PROMPTS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=0.02, rtol=0)


def test_missing_weights_name_the_hub_id_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="trl-lib/ddpo-aesthetic-predictor.*`alignkit fetch NAME`"):
        evaluate(Aesthetic(), pictures(), PROMPTS)
