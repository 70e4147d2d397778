"""DINO features, and the rewards that compare them with reference images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import PerFrameMean, evaluate
from alignkit.rewards.dino import DinoSimilarity, DinoStyle, pooled, similarities
from alignkit.rewards.features import DinoFeatures, Features, normalised, tiny_dinov2
from alignkit.rewards.references import fit
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_dinov2(tmp_path_factory.mktemp("dinov2")))


@pytest.fixture(scope="module")
def timm_dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
    model = timm.create_model("vit_base_patch14_reg4_dinov2", pretrained=False, num_classes=0, **small)
    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(model, str(folder), model_config={"num_classes": 0}, model_args=small, safe_serialization=True)
    return str(folder)


def images(count: int, seed: int = 0, height: int = 48, width: int = 96) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def referring(references: list[Any]) -> list[Prompt]:
    return [Prompt("a sign", id=i, columns={"reference": one}) for i, one in enumerate(references)]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def pair(seed: int = 0, patches: int = 5) -> tuple[Features, Features]:
    return Features(unit(2, 8, seed=seed), unit(2, patches, 8, seed=seed + 1)), Features(
        unit(3, 8, seed=seed + 2), unit(3, patches, 8, seed=seed + 3)
    )


def test_features_are_those_of_the_model_after_its_own_preprocessing_and_have_length_one(dinov2: str) -> None:
    from torchvision.transforms.v2 import functional as V
    from transformers import Dinov2Model

    media = images(2)
    resized = V.resize(media, [64], interpolation=V.InterpolationMode.BICUBIC, antialias=True)
    pixels = (V.center_crop(resized, [56, 56]) - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    tokens = Dinov2Model.from_pretrained(dinov2).eval()(pixel_values=pixels).last_hidden_state.detach()
    found = DinoFeatures(dinov2).features(media)
    torch.testing.assert_close(found.cls, tokens[:, 0] / tokens[:, 0].norm(dim=-1, keepdim=True))
    torch.testing.assert_close(found.patches, tokens[:, 1:] / tokens[:, 1:].norm(dim=-1, keepdim=True))
    assert found.patches.shape == (2, 16, 32)


def test_a_size_resizes_the_whole_image_instead_of_cropping_it(dinov2: str, timm_dinov2: str) -> None:
    media = images(1)
    ends = media.clone()
    ends[..., :8] = 1 - ends[..., :8]  # outside the centre crop
    for weights in (dinov2, timm_dinov2):
        cropped, whole = DinoFeatures(weights), DinoFeatures(weights, size=(28, 42))
        assert torch.equal(cropped.features(media).cls, cropped.features(ends).cls)
        assert not torch.allclose(whole.features(media).cls, whole.features(ends).cls)
        assert whole.features(media).patches.shape[1] == 2 * 3


def test_timm_weights_give_the_features_of_timm_without_the_registers(timm_dinov2: str) -> None:
    import timm

    media = images(2, height=56, width=56)  # no resize needed
    model: Any = timm.create_model(f"local-dir:{timm_dinov2}", pretrained=True).eval()
    with torch.no_grad():
        tokens = model.forward_features((media - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    assert model.num_prefix_tokens == 5
    found = DinoFeatures(timm_dinov2).features(media)
    torch.testing.assert_close(found.cls, normalised(tokens[:, 0]))
    torch.testing.assert_close(found.patches, normalised(tokens[:, 5:]))
    assert found.patches.shape == (2, 16, 32)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3"])
def test_the_registers_of_transformers_models_are_left_out(kind: str, tmp_path: Path) -> None:
    import transformers as t

    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "dinov3":
        config = t.DINOv3ViTConfig(**small, intermediate_size=64, image_size=32, patch_size=8, num_register_tokens=4)
        model, processor = t.DINOv3ViTModel(config), t.DINOv3ViTImageProcessor(size={"height": 32, "width": 32})
    else:
        config = t.Dinov2WithRegistersConfig(**small, image_size=32, patch_size=8, num_register_tokens=4)
        model = t.Dinov2WithRegistersModel(config)
        processor = t.BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert DinoFeatures(str(tmp_path)).features(images(1)).patches.shape == (1, 16, 32)


def test_weights_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_dinov2(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"lack 1 tensors of Dinov2Model: \['layernorm.weight'\]"):
        _ = DinoFeatures(str(folder)).network


def test_weights_that_are_nowhere_are_named_with_the_command_that_gets_them() -> None:
    with pytest.raises(MissingWeights, match=r"facebook/dinov2-base.*alignkit fetch"):
        DinoSimilarity().prepare()


@pytest.mark.parametrize("match", ["position", "best", "gram"])
def test_similarities_are_those_of_a_literal_transcription(match: str) -> None:
    image, reference = pair()
    found = similarities(image, reference, "both", match)
    for b in range(2):
        for r in range(3):
            p, q = image.patches[b].numpy(), reference.patches[r].numpy()
            cosines = p @ q.T
            grams = p.T @ p, q.T @ q
            expected = {
                "position": np.trace(cosines) / 5,
                "best": (cosines.max(axis=1).mean() + cosines.max(axis=0).mean()) / 2,
                "gram": (grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1]),
            }[match]
            of_cls = float(image.cls[b] @ reference.cls[r])
            assert found[b, r].item() == pytest.approx((of_cls + expected) / 2, abs=1e-12)


def test_cls_and_patches_can_be_used_alone() -> None:
    image, reference = pair()
    parts = [similarities(image, reference, use, "best") for use in ("cls", "patches", "both")]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, parts[2])
    assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize("use", ["cls", "patches"])
@pytest.mark.parametrize("match", ["position", "best", "gram"])
def test_an_image_is_most_similar_to_itself(use: str, match: str) -> None:
    image, _ = pair()
    found = similarities(image, image, use, match)
    torch.testing.assert_close(found.diagonal(), torch.ones(2, dtype=torch.float64))
    assert found[0, 1] < 1 and found[1, 0] < 1


def test_moving_the_patches_changes_only_the_match_by_position() -> None:
    image, reference = pair()
    moved = Features(image.cls, image.patches.roll(1, dims=1))
    for match, same in (("position", False), ("best", True), ("gram", True)):
        before, after = (similarities(one, reference, "patches", match) for one in (image, moved))
        assert torch.allclose(before, after) == same


def test_an_image_of_one_repeated_patch_is_not_like_a_rich_reference() -> None:
    _, reference = pair()
    one_patch = Features(reference.cls, reference.patches[:, :1].expand(-1, 5, -1))
    assert (similarities(one_patch, reference, "patches", "best").diagonal() < 0.9).all()


def test_patches_of_different_grids_cannot_be_compared_by_position() -> None:
    with pytest.raises(RewardError, match="5 patches cannot be compared place by place with 7"):
        similarities(pair(patches=5)[0], pair(patches=7)[1], "patches", "position")


def test_pooling_is_the_mean_the_nearest_or_the_mean_of_the_k_nearest() -> None:
    values = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    assert pooled(values, "mean", 3).item() == pytest.approx(0.45)
    assert pooled(values, "nearest", 3).item() == pytest.approx(0.9)
    assert pooled(values, "top_k", 2).item() == pytest.approx(0.7)
    assert pooled(values, "top_k", 9).item() == pytest.approx(0.45)


def test_the_reference_of_the_prompt_itself_scores_one_and_others_less(dinov2: str) -> None:
    media = images(3)
    for use in ("cls", "patches", "both"):
        reward = DinoSimilarity(weights=dinov2, use=use)
        torch.testing.assert_close(reward(media, referring(list(media))), torch.ones(3))
        assert (reward(media, referring([media[1], media[2], media[0]])) < 0.9999).all()


def test_a_reference_may_be_a_file_of_another_size(dinov2: str, tmp_path: Path) -> None:
    media = (images(1) * 255).round() / 255
    array = (media[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    Image.fromarray(array).save(tmp_path / "same.png")
    Image.fromarray(array).resize((192, 96), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    reward = DinoSimilarity(weights=dinov2)
    same, large = reward(media.repeat(2, 1, 1, 1), referring([tmp_path / "same.png", tmp_path / "large.png"]))
    assert same.item() == pytest.approx(1, abs=1e-5) and large.item() > 0.9


def test_several_references_are_pooled(dinov2: str) -> None:
    media = images(3)
    prompts = referring([[media[0], media[1]]])
    alone = [DinoSimilarity(weights=dinov2)(media[:1], referring([one]))[0] for one in media[:2]]
    mean = DinoSimilarity(weights=dinov2)(media[:1], prompts)
    nearest = DinoSimilarity(weights=dinov2, pool="nearest")(media[:1], prompts)
    torch.testing.assert_close(mean[0], (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(nearest[0], alone[0])


@pytest.mark.parametrize("value", [None, [], "sign.png", torch.zeros(1, 4, 4), torch.zeros(3, 4, 4).int(), Path("no")])
def test_a_prompt_without_a_usable_reference_is_named(value: Any, dinov2: str) -> None:
    good = Prompt("good", id=1, columns={"reference": torch.zeros(3, 4, 4)})
    columns = {} if value is None else {"reference": value}
    with pytest.raises(RewardError, match="prompt 7 .*reference"):
        DinoSimilarity(weights=dinov2).check_prompts([good, Prompt("bad", id=7, columns=columns)])


def test_fitting_crops_to_the_aspect_ratio_and_does_not_distort() -> None:
    wide = torch.zeros(3, 20, 60)
    wide[:, :, 20:40] = 1  # the centre, a square
    assert torch.equal(fit(wide, 20, 20), torch.ones(3, 20, 20))
    assert fit(wide, 10, 30).shape == (3, 10, 30)
    assert fit(wide, 20, 60) is wide


@pytest.fixture
def style(tmp_path: Path) -> Path:
    for index, image in enumerate(images(2, seed=5)):
        array = (image.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    return tmp_path


def test_the_style_score_is_the_pooled_similarity_to_the_folder(dinov2: str, style: Path) -> None:
    media = images(2)
    reward = DinoStyle(references=str(style), weights=dinov2, pool="nearest")
    references = (images(2, seed=5) * 255).round() / 255
    extractor = DinoFeatures(dinov2)
    expected = similarities(extractor.features(media), extractor.features(references), "both", "best").amax(dim=1)
    torch.testing.assert_close(reward(media, ["", ""]), expected)  # type: ignore[list-item]


def test_references_are_encoded_once(dinov2: str, style: Path) -> None:
    reward = DinoStyle(references=str(style), weights=dinov2)
    reward(images(2), [Prompt("a"), Prompt("b")])
    first = reward.encoded(48, 96, torch.device("cpu"))
    for path in style.iterdir():
        path.unlink()
    reward(images(1), [Prompt("a")])
    assert torch.equal(reward.encoded(48, 96, torch.device("cpu")).cls, first.cls)


def test_the_record_of_a_style_reward_changes_with_its_references(dinov2: str, style: Path) -> None:
    reward = DinoStyle(references=str(style), weights=dinov2)
    before = reward.describe()
    assert before["references"]["files"] == 2
    Image.new("RGB", (8, 8)).save(style / "1.png")
    assert reward.describe() != before


def test_style_images_count_whatever_the_case_of_their_ending(dinov2: str, style: Path) -> None:
    Image.new("RGB", (8, 8)).save(style / "CAMERA.JPG")
    assert len(DinoStyle(references=str(style), weights=dinov2).images) == 3


def test_weights_in_several_files_are_read_with_their_index(dinov2: str, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    Dinov2Model.from_pretrained(dinov2).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    asked = [one for pattern in DinoFeatures(str(tmp_path)).files()[0].patterns for one in pattern.split("|")]
    assert all(any(path.match(one) for one in asked) for path in tmp_path.iterdir())


def test_an_empty_style_folder_is_refused(dinov2: str, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match="lack"):
        DinoStyle(references=str(tmp_path), weights=dinov2).prepare()


@pytest.mark.parametrize("use", ["cls", "patches"])
def test_scores_are_batch_independent_and_reach_the_pixels(use: str, dinov2: str, style: Path) -> None:
    media = images(3).requires_grad_()
    prompts = referring(list(images(3, seed=9)))
    style_reward = DinoStyle(references=str(style), weights=dinov2, use=use)
    rewards: list[Any] = [DinoSimilarity(weights=dinov2, use=use), style_reward]
    for reward in rewards:
        together = evaluate(reward, media, prompts).scores
        alone = torch.cat([evaluate(reward, media[[i]], prompts[i : i + 1]).scores for i in range(3)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        (gradient,) = torch.autograd.grad(together[0], media)
        assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() == 0


def test_timm_features_reach_the_pixels(timm_dinov2: str) -> None:
    media = images(1).requires_grad_()
    DinoFeatures(timm_dinov2).features(media).patches.sum().backward()
    assert media.grad is not None and media.grad.abs().sum() > 0


def test_video_is_scored_frame_by_frame(dinov2: str) -> None:
    video = images(4).view(2, 2, 3, 48, 96)
    reward = DinoSimilarity(weights=dinov2)
    prompts = referring(list(images(2, seed=9)))
    frames = torch.stack([reward(video[:, t], prompts) for t in range(2)])
    torch.testing.assert_close(PerFrameMean(reward)(video, prompts), frames.mean(dim=0))


def test_half_precision_networks_give_float32_scores_close_to_the_full_ones(dinov2: str) -> None:
    media, prompts = images(2), referring(list(images(2, seed=9)))
    half = DinoSimilarity(weights=dinov2, dtype="bfloat16")(media, prompts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, DinoSimilarity(weights=dinov2)(media, prompts), atol=0.02, rtol=0)


@pytest.mark.parametrize("options", [{"use": "all"}, {"match": "nearest"}, {"pool": "max"}, {"k": 0}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        DinoSimilarity(**options)
