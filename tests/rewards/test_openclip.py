from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as TF

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate, load
from alignkit.rewards.dual_encoder import DualEncoder
from alignkit.rewards.hps import HPSv2, HPSv21, SocialReward
from alignkit.rewards.openclip import OpenCLIP
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = [Prompt('a red sign that says "CAT"', id=0), Prompt("dog", id=1), Prompt("a small boat " * 40, id=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random model in the layouts of the hub, of HPSv2, of HPSv2.1 and of Social Reward."""
    folder = tmp_path_factory.mktemp("open_clip")
    for cls in (OpenCLIP, HPSv2, HPSv21, SocialReward):
        cls.tiny(folder)
    return folder


def pictures(height: int = 48, width: int = 48, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def cosine(folder: Path, values: torch.Tensor) -> torch.Tensor:
    """diagonal(image_features @ text_features.T), as the published code of HPSv2 computes it."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    model.output_dict = True
    normalise = [torch.tensor(one)[:, None, None] for one in (MEAN, STD)]
    tokens = open_clip.get_tokenizer("ViT-H-14")([str(p) for p in PROMPTS])
    out = model((values - normalise[0]) / normalise[1], tokens)
    return torch.diagonal(out["image_features"] @ out["text_features"].T).detach()


def longest(media: torch.Tensor, size: int = 32) -> torch.Tensor:
    """The preprocessing of HPSv2's own open_clip: the long side to `size`, zeros around."""
    height, width = media.shape[-2:]
    scale = size / max(height, width)
    new = [round(side * scale) for side in (height, width)]
    resized = TF.resize(media, new, TF.InterpolationMode.BICUBIC, antialias=True)
    down, right = size - new[0], size - new[1]
    return F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2))


@pytest.mark.parametrize("cls", [HPSv2, HPSv21])
@pytest.mark.parametrize("shape", [(48, 48), (40, 90)])
def test_hps_is_the_plain_cosine_of_the_whole_padded_picture(
    folder: Path, cls: type[HPSv2], shape: tuple[int, int]
) -> None:
    media = pictures(*shape)
    reward = cls(weights=str(folder), architecture=str(folder))
    torch.testing.assert_close(reward(media, PROMPTS), cosine(folder, longest(media)), atol=1e-5, rtol=1e-5)


def test_social_reward_is_the_cosine_of_the_centre_and_orders_as_its_loss(folder: Path) -> None:
    reward = SocialReward(weights=str(folder), architecture=str(folder))
    media = pictures(32, 56)
    scores = reward(media, PROMPTS)
    torch.testing.assert_close(scores, cosine(folder, media[..., 12:44]), atol=1e-5, rtol=1e-5)
    distance = (reward.image_features(media) - reward.text_features(PROMPTS)).square().sum(dim=-1)
    torch.testing.assert_close(2 - 2 * scores, distance, atol=1e-5, rtol=1e-5)


def test_open_clip_is_the_cosine_times_its_scale(folder: Path) -> None:
    media = pictures(32, 32)
    expected = cosine(folder, media)
    learnt = float(open_clip.create_model(f"local-dir:{folder}").logit_scale.detach().exp())
    for scale, factor in ((1.0, 1.0), (2.5, 2.5), ("logit", learnt)):
        reward = OpenCLIP(model=str(folder), scale=scale)
        torch.testing.assert_close(reward(media, PROMPTS), factor * expected, atol=2e-4, rtol=1e-5)


def test_prefixes_of_open_clip_are_accepted(folder: Path) -> None:
    scores = [OpenCLIP(model=model)(pictures(), PROMPTS) for model in (str(folder), f"local-dir:{folder}")]
    assert torch.equal(*scores)
    assert OpenCLIP(model="hf-hub:org/name").files()[0].source == "org/name"


def test_the_resize_mode_of_the_user_replaces_the_models_own(folder: Path) -> None:
    media = pictures(24, 64)
    crop, pad, squash = (
        OpenCLIP(model=str(folder), resize_mode=mode)(media, PROMPTS) for mode in ("", "longest", "squash")
    )
    torch.testing.assert_close(pad, cosine(folder, longest(media)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(crop, pad, atol=1e-3) and not torch.allclose(crop, squash, atol=1e-3)


def test_a_model_for_wide_pictures_with_its_own_preprocessing_and_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="!")
    tokenizer.save_pretrained(tmp_path)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": [24, 64], "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {
            "context_length": 40,
            "vocab_size": 514,
            "layers": 1,
            "width": 16,
            "heads": 2,
            "hf_tokenizer_name": "x",
        },
    }
    own = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": own}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config).eval()
    save_file(model.half().state_dict(), tmp_path / "open_clip_model.safetensors")
    media = pictures(24, 64)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")([str(p) for p in PROMPTS])
    out = model.float()((media - 0.5) / 0.25, tokens)
    reward = OpenCLIP(model=str(tmp_path))
    torch.testing.assert_close(reward(media, PROMPTS), (out[0] * out[1]).sum(dim=-1).detach(), atol=1e-5, rtol=1e-5)
    together, alone = reward(media, PROMPTS), [reward(media[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_the_score_of_a_sample_does_not_depend_on_its_batch(folder: Path) -> None:
    reward = HPSv2(weights=str(folder), architecture=str(folder))
    together = reward(pictures(), PROMPTS)
    alone = [reward(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [OpenCLIP, HPSv2, SocialReward])
def test_gradients_reach_the_pixels(folder: Path, tmp_path: Path, cls: type[DualEncoder]) -> None:
    reward = load(f"{cls.__module__}:{cls.__name__}", **cls.tiny(tmp_path))  # type: ignore[attr-defined]
    media = pictures(32, 32).requires_grad_()
    evaluate(reward, media, PROMPTS).scores.sum().backward()
    assert media.grad is not None and (media.grad.abs().sum(dim=1) > 0).all()


def test_an_architecture_with_a_file_and_with_a_tag(folder: Path) -> None:
    assert OpenCLIP(model="ViT-B-32", pretrained="laion2b_s34b_b79k").files()[0].source == OpenCLIP().files()[0].source
    file = folder / "open_clip_model.safetensors"
    reward = OpenCLIP(model="ViT-S-32-alt", pretrained=str(file))
    assert reward.files()[0].local == file
    with pytest.raises(RewardError, match=r"open_clip_model\.safetensors do not load into open_clip's ViT-S-32-alt"):
        reward.prepare()


def test_an_architecture_without_weights_names_its_tags() -> None:
    for pretrained in ("", "laion3b"):
        with pytest.raises(RecipeError, match=f"needs pretrained=.*given '{pretrained}', known: .*laion2b_s34b_b79k"):
            OpenCLIP(model="ViT-B-32", pretrained=pretrained).files()


def test_options_that_contradict_each_other_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="leave pretrained out"):
        OpenCLIP(model=str(folder), pretrained="openai").files()
    with pytest.raises(RecipeError, match="resize_mode='tile'; choose one of shortest, longest, squash"):
        OpenCLIP(resize_mode="tile")
    with pytest.raises(RecipeError, match="scale='exp'; give a number, or 'logit'"):
        OpenCLIP(scale="exp")
    with pytest.raises(RecipeError, match="architecture='ViT-Z-9' is no architecture"):
        HPSv2(weights=str(folder), architecture="ViT-Z-9").prepare()


@pytest.mark.parametrize(
    ("reward", "hub"),
    [
        (OpenCLIP(), "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        (HPSv2(), "xswu/HPSv2 .HPS_v2_compressed.pt"),
        (HPSv21(), "xswu/HPSv2 .HPS_v2.1_compressed.pt"),
    ],
)
def test_missing_weights_name_the_hub_id_and_the_command(
    reward: DualEncoder, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=f"{hub}.*`alignkit fetch NAME`"):
        evaluate(reward, pictures(), PROMPTS)


def test_a_checkpoint_with_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    options = HPSv2.tiny(tmp_path)
    file = tmp_path / "HPS_v2_compressed.pt"
    state = torch.load(file, weights_only=True)
    del state["state_dict"]["visual.proj"]
    torch.save(state, file)
    with pytest.raises(RewardError, match=r"HPS_v2_compressed\.pt do not load .*[Mm]issing key.*visual\.proj"):
        HPSv2(**options).prepare()
    options = OpenCLIP.tiny(tmp_path)
    state = load_file(tmp_path / "open_clip_model.safetensors")
    del state["text_projection"]
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(RewardError, match="text_projection"):
        OpenCLIP(**options).prepare()


def test_half_precision_weights_give_float32_scores_near_the_exact_ones(folder: Path) -> None:
    options = {"weights": str(folder), "architecture": str(folder)}
    exact, half = (HPSv2(**options, dtype=dtype)(pictures(), PROMPTS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=0.03, rtol=0)


class Code:
    """Something that a file of tensors must not hold."""


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    options = HPSv2.tiny(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(RewardError, match=r"more than tensors .*Code.*a file that runs code is not read"):
        HPSv2(**options).prepare()
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(RewardError, match=r"more than tensors .TorchScript."):
        HPSv2(**options).prepare()
