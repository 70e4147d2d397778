"""VideoReward on tiny random weights under the published names, against a transcription of the published forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate
from alignkit.rewards.token_head import load_state
from alignkit.rewards.video_reward import (
    CONFIG,
    NORMALISATION,
    TEMPLATE,
    TOKENS,
    VideoReward,
    build_head,
    lora_scale,
    newest_checkpoint,
)
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

PROMPTS = [Prompt("a dog runs"), Prompt("a red ball rolls slowly from the left to the right of a table", id=1)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return VideoReward.tiny(tmp_path_factory.mktemp("video_reward"))


@pytest.fixture(scope="module")
def reward(options: dict[str, Any]) -> VideoReward:
    return VideoReward(**options)


def videos(seed: int = 0, frames: int = 41) -> torch.Tensor:
    return torch.rand(2, frames, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


class RewardModel(nn.Module):
    """The authors' model: Qwen2-VL and a linear head."""

    def __init__(self, config: Any) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = build_head(config.text_config.hidden_size)


def published(options: dict[str, Any], media: torch.Tensor, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """As the authors compute it: LoRA by PEFT, right padding, no positions, the head everywhere, mask, diagonal."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(options["base"], padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokens = processor.tokenizer.convert_tokens_to_ids(list(TOKENS))
    config: Any = AutoConfig.from_pretrained(options["base"])
    config.text_config.vocab_size = len(processor.tokenizer)
    model: Any = RewardModel(config)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    linear = [n for n in linear if "rm_head" not in n and "visual" not in n]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=linear)).eval()
    state = {}
    for name, value in load_state(Path(options["weights"]) / "checkpoint-11352" / "model.pth").items():
        name = name.replace("base_model.model.model.", "base_model.model.model.language_model.")
        name = name.replace("base_model.model.visual.", "base_model.model.model.visual.")
        state[name] = value
    state.pop("base_model.model.lm_head.weight")
    model.load_state_dict(state)
    body, head = model.base_model.model.model, model.base_model.model.rm_head

    picked = torch.linspace(0, media.shape[1] - 1, 6).round().long()  # 41 frames at 16 a second, 2 a second: 5.1
    messages = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TEMPLATE.replace("{prompt}", p)}]}]
        for p in prompts
    ]
    limit = options["max_frame_pixels"]
    batch = processor(
        text=processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        videos=list(media[:, picked]),
        videos_kwargs={
            "do_rescale": False,
            "do_sample_frames": False,
            "size": {"shortest_edge": limit, "longest_edge": limit},
        },
        padding=True,
        return_tensors="pt",
    )
    ids = batch["input_ids"]
    embeds = body.get_input_embeddings()(ids)
    seen = body.visual(batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"]).pooler_output
    embeds = embeds.masked_scatter((ids == config.video_token_id).unsqueeze(-1), seen)
    hidden = body.language_model(
        input_ids=None, position_ids=None, attention_mask=batch["attention_mask"], inputs_embeds=embeds
    )[0]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        mask = mask | (ids == token)
    raw = head(hidden)[mask].view(len(prompts), 3, -1).diagonal(dim1=1, dim2=2)
    return {
        "VQ": (raw[:, 0] - 3.6757) / 2.2476,
        "MQ": (raw[:, 1] - 1.1646) / 1.3811,
        "TA": (raw[:, 2] - 2.8105) / 2.5121,
    }


def test_components_and_their_sum_are_those_of_the_published_model(
    reward: VideoReward, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        expected = published(options, videos(), PROMPTS)
        components = reward.components(videos(), PROMPTS)
    assert list(components) == ["VQ", "MQ", "TA"]
    for name in components:
        torch.testing.assert_close(components[name], expected[name], atol=1e-5, rtol=1e-5)
    overall = expected["VQ"] + expected["MQ"] + expected["TA"]
    torch.testing.assert_close(evaluate(reward, videos(), PROMPTS).scores, overall, atol=1e-5, rtol=1e-5)


def test_the_lora_matrices_have_a_say(reward: VideoReward, options: dict[str, Any], tmp_path: Path) -> None:
    with torch.no_grad():
        with_lora = reward.components(videos(), PROMPTS)["TA"]
        state = load_state(Path(options["weights"]) / "checkpoint-11352" / "model.pth")
        (tmp_path / "checkpoint-1").mkdir()
        torch.save({n: v * ("lora_B" not in n) for n, v in state.items()}, tmp_path / "checkpoint-1" / "model.pth")
        (tmp_path / CONFIG).write_text((Path(options["weights"]) / CONFIG).read_text())
        without = VideoReward(**{**options, "weights": str(tmp_path)}).components(videos(), PROMPTS)["TA"]
    assert (with_lora - without).abs().min() > 1e-3


def test_quality_is_blind_to_the_prompt_and_alignment_is_not(reward: VideoReward) -> None:
    with torch.no_grad():
        one = reward.components(videos(), PROMPTS)
        other = reward.components(videos(), PROMPTS[::-1])
    for name in ("VQ", "MQ"):
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)
    assert (one["TA"] - other["TA"]).abs().min() > 1e-3


def test_what_stands_after_the_quality_tokens_changes_nothing_for_them(
    options: dict[str, Any], reward: VideoReward, tmp_path: Path
) -> None:
    head, _, _ = TEMPLATE.partition("What was asked for")
    file = tmp_path / "template.txt"
    file.write_text(head + "Something else. {prompt} <|TA_reward|>", encoding="utf-8")
    with torch.no_grad():
        one, other = (r.components(videos(), PROMPTS) for r in (reward, VideoReward(**options, template=str(file))))
    torch.testing.assert_close(one["MQ"], other["MQ"], atol=1e-5, rtol=1e-5)
    assert (one["TA"] - other["TA"]).abs().min() > 1e-3


def test_the_score_weighs_the_components(options: dict[str, Any], reward: VideoReward) -> None:
    parts = reward.components(videos(), PROMPTS)
    alignment = VideoReward(**options, importance=(0.0, 0.0, 1.0))
    torch.testing.assert_close(evaluate(alignment, videos(), PROMPTS).scores, parts["TA"])
    both = VideoReward(**options, importance=(0.5, -1.0, 0.0))
    torch.testing.assert_close(evaluate(both, videos(), PROMPTS).scores, 0.5 * parts["VQ"] - parts["MQ"])


def test_without_normalisation_the_components_are_the_heads_own(options: dict[str, Any], reward: VideoReward) -> None:
    raw = VideoReward(**options, normalised=False).components(videos(), PROMPTS)
    normalised = reward.components(videos(), PROMPTS)
    for name, part in raw.items():
        expected = (part - NORMALISATION[f"{name}_mean"]) / NORMALISATION[f"{name}_std"]
        torch.testing.assert_close(normalised[name], expected)


def test_weights_that_come_without_constants_are_not_normalised_by_those_of_others(
    options: dict[str, Any], tmp_path: Path
) -> None:
    settings = json.loads((Path(options["weights"]) / CONFIG).read_text())
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.pth").write_bytes(b"")
    del settings["inference_config"]
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    own = {**options, "weights": str(tmp_path)}
    with pytest.raises(RecipeError, match="no `inference_config`.*choose normalised=False"):
        _ = VideoReward(**own).normalisation
    assert VideoReward(**own, normalised=False).normalisation["TA_std"] == 1


def test_scores_do_not_depend_on_the_batch_and_gradients_reach_the_sampled_frames_alone(
    reward: VideoReward,
) -> None:
    media = videos().requires_grad_()
    together = evaluate(reward, media, PROMPTS).scores
    alone = torch.cat([evaluate(reward, media[i : i + 1], PROMPTS[i : i + 1]).scores for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(together.sum(), media)
    touched = gradient.abs().flatten(2).amax(dim=2).gt(0)
    assert touched[0].nonzero().flatten().tolist() == [0, 8, 16, 24, 32, 40] and torch.equal(touched[0], touched[1])


def test_every_frame_rate_gives_an_even_number_of_frames(reward: VideoReward, options: dict[str, Any]) -> None:
    slow = VideoReward(**options, media_fps=8.0)
    with torch.no_grad():
        assert not torch.equal(slow(videos(), PROMPTS), reward(videos(), PROMPTS))
        assert reward(videos(frames=1), PROMPTS).isfinite().all(), "a single frame is repeated by the processor"


def test_the_newest_checkpoint_is_read_and_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    for step in (200, 1000, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.pth").write_bytes(b"")
    assert newest_checkpoint(tmp_path).parent.name == "checkpoint-1000"
    with pytest.raises(MissingWeights, match="save_full_model=True"):
        newest_checkpoint(tmp_path / "checkpoint-9")
    with pytest.raises(RecipeError, match=r"is a file; expected the folder that holds model_config.json"):
        VideoReward(weights=str(tmp_path / "checkpoint-9" / "model.pth")).prepare()


@pytest.mark.parametrize(("stabilised", "expected"), [(False, 2.0), (True, 16.0)])
def test_the_scale_of_lora_is_that_of_the_settings(stabilised: bool, expected: float) -> None:
    lora = {"lora_enable": True, "lora_r": 64, "lora_alpha": 128, "use_rslora": stabilised}
    assert lora_scale({"peft_lora_config": lora}) == expected
    assert lora_scale({"peft_lora_config": lora | {"lora_enable": False}}) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"importance": (1.0, 1.0)}, "a weight for each of VQ, MQ, TA"),
        ({"importance": (0.0, 0.0, 0.0)}, "a weight for each"),
        ({"media_fps": 0.0}, "media_fps=0.0"),
        ({"max_frame_pixels": 100}, "expected at least 784"),
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VideoReward(**wrong)


def test_a_prompt_with_a_reward_token_and_missing_weights_are_named() -> None:
    reward = VideoReward()
    with pytest.raises(RewardError, match=r"prompt 7 holds '<\|TA_reward\|>'"):
        reward.check_prompts([Prompt("a <|TA_reward|>", id=7)])
    with pytest.raises(MissingWeights, match="KwaiVGI/VideoReward.*alignkit fetch"):
        reward.prepare()


def test_what_it_was_trained_with_is_read_from_its_settings_unless_said_otherwise(
    options: dict[str, Any], tmp_path: Path
) -> None:
    weights = Path(options["weights"])
    checkpoint = newest_checkpoint(weights)
    (tmp_path / checkpoint.parent.name).mkdir()
    (tmp_path / checkpoint.parent.name / checkpoint.name).symlink_to(checkpoint)
    settings = json.loads((weights / CONFIG).read_text("utf-8"))
    settings["data_config"] |= {"fps": 6.0, "max_frame_pixels": 1568}
    (tmp_path / CONFIG).write_text(json.dumps(settings), "utf-8")
    (tmp_path / "template.txt").write_text("{prompt}" + "".join(TOKENS), "utf-8")
    plain = {name: value for name, value in options.items() if name != "max_frame_pixels"}
    trained = VideoReward(**{**plain, "weights": str(tmp_path)})
    assert (trained.rate, trained.frame_pixels, trained.question) == (6.0, 1568, "{prompt}" + "".join(TOKENS))
    said = VideoReward(**{**plain, "weights": str(tmp_path)}, fps=3.0, max_frame_pixels=784)
    assert (said.rate, said.frame_pixels) == (3.0, 784)
    assert (VideoReward(**plain).rate, VideoReward(**plain).question) == (2.0, TEMPLATE)
