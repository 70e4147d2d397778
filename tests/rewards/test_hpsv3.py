"""HPSv3 on tiny random weights under the published names, against a transcription of the published forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate
from alignkit.rewards.base import Pairwise
from alignkit.rewards.card import HasTiny, HasWeights
from alignkit.rewards.hpsv3 import FILE, TEMPLATE, TOKEN, HPSv3, build_head, win_probability
from alignkit.rewards.token_head import load_state
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

PROMPTS = ["a cat", "a red bicycle in front of a very tall white wall", 'a sign that says "OPEN"']


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return HPSv3.tiny(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(options: dict[str, Any]) -> HPSv3:
    return HPSv3(**options)


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


def published(options: dict[str, Any], media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """(B, 2) as the authors compute it: right padding, no positions given, the head on every token, then a mask."""
    from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

    processor: Any = AutoProcessor.from_pretrained(options["base"], padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
    token = processor.tokenizer.convert_tokens_to_ids(TOKEN)
    config: Any = AutoConfig.from_pretrained(options["base"])
    config.text_config.vocab_size = len(processor.tokenizer)
    model, head = Qwen2VLModel(config).eval(), build_head(config.text_config.hidden_size).eval()
    state = load_state(Path(options["weights"]) / FILE)
    head.load_state_dict({n.removeprefix("rm_head."): v for n, v in state.items() if n.startswith("rm_head.")})
    body = {f"language_model.{n.removeprefix('model.')}": v for n, v in state.items() if n.startswith("model.")}
    model.load_state_dict(body | {n: v for n, v in state.items() if n.startswith("visual.")})

    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEMPLATE.replace("{prompt}", p)}]}]
        for p in prompts
    ]
    size = {"shortest_edge": options["pixels"], "longest_edge": options["pixels"]}
    batch = processor(
        text=processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        images=[[image] for image in media],
        images_kwargs={"do_rescale": False, "size": size},
        padding=True,
        return_tensors="pt",
    )
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    seen = model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    embeds = embeds.masked_scatter((ids == config.image_token_id).unsqueeze(-1), seen)
    hidden = model.language_model(
        input_ids=None, position_ids=None, attention_mask=batch["attention_mask"], inputs_embeds=embeds
    )[0]
    return head(hidden)[ids == token].view(len(prompts), 1, -1).view(len(prompts), -1)


def test_the_score_is_the_mean_and_the_uncertainty_the_deviation_of_the_published_model(
    reward: HPSv3, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        expected = published(options, pictures(), PROMPTS)
        sigma = reward.uncertainty(pictures(), [Prompt(p) for p in PROMPTS])
    torch.testing.assert_close(evaluate(reward, pictures(), PROMPTS).scores, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sigma, expected[:, 1].exp(), atol=1e-5, rtol=1e-5)


def test_the_score_depends_on_the_picture_on_the_prompt_and_not_on_the_batch(reward: HPSv3) -> None:
    media = pictures()
    together = evaluate(reward, media, PROMPTS).scores
    alone = torch.cat([evaluate(reward, media[i : i + 1], PROMPTS[i : i + 1]).scores for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (evaluate(reward, media.flip(0), PROMPTS).scores - together)[0].abs() > 1e-4
    assert (evaluate(reward, media, PROMPTS[::-1]).scores - together)[0].abs() > 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_pixels(options: dict[str, Any], checkpointing: bool) -> None:
    media = pictures().requires_grad_()
    evaluate(HPSv3(**options, checkpointing=checkpointing), media, PROMPTS).scores.sum().backward()
    assert media.grad is not None and media.grad.flatten(1).abs().amax(dim=1).gt(0).all()


def test_a_bfloat16_backbone_is_read_by_a_float32_head(options: dict[str, Any], reward: HPSv3) -> None:
    half = HPSv3(**{**options, "dtype": "bfloat16"})
    frequencies = [x for n, x in half.reader.model.model.named_buffers() if n.endswith("inv_freq")]
    assert frequencies and {x.dtype for x in frequencies} == {torch.bfloat16}  # as the published code has them
    scores = evaluate(half, pictures(), PROMPTS).scores
    assert scores.dtype == torch.float32 and half.reader.model.rm_head[0].weight.dtype == torch.float32
    torch.testing.assert_close(scores, evaluate(reward, pictures(), PROMPTS).scores, atol=0.1, rtol=0.1)


def test_a_picture_of_any_size_is_brought_to_the_pixels_the_model_was_trained_on(reward: HPSv3) -> None:
    from alignkit.rewards.vision_language import Chat

    for size in ((20, 30), (300, 200)):
        inputs = reward.reader.inputs([Chat((torch.rand(3, *size), f"a {TOKEN}"))], special=(TOKEN,), reply=False)
        assert inputs["image_grid_thw"].prod() * 14 * 14 <= 6 * 28 * 28


def test_the_probability_to_win_is_the_mean_over_both_gaussians() -> None:
    mean, std = torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64), torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    draws = torch.randn(3, 400_000, generator=rng, dtype=torch.float64) * std.unsqueeze(1) + mean.unsqueeze(1)
    torch.testing.assert_close(win_probability(mean, std), draws.sigmoid().mean(dim=1), atol=2e-3, rtol=0)
    torch.testing.assert_close(win_probability(mean, std * 0), mean.sigmoid())
    torch.testing.assert_close(win_probability(mean, std) + win_probability(-mean, std), torch.ones_like(mean))


def test_it_compares_two_pictures_the_same_in_either_order(reward: HPSv3) -> None:
    assert isinstance(reward, Pairwise)
    prompts = [Prompt(p) for p in PROMPTS]
    with torch.no_grad():
        one = reward.compare(pictures(0), pictures(1), prompts)
        other = reward.compare(pictures(1), pictures(0), prompts)
        mean = reward.gaussian(pictures(0), prompts)[0] - reward.gaussian(pictures(1), prompts)[0]
    torch.testing.assert_close(one + other, torch.ones(3))
    assert torch.equal(one > 0.5, mean > 0)


def test_the_template_may_be_a_file_of_the_users(options: dict[str, Any], reward: HPSv3, tmp_path: Path) -> None:
    file = tmp_path / "theirs.txt"
    file.write_text(TEMPLATE, encoding="utf-8")
    same = HPSv3(**options, template=str(file))
    assert torch.equal(evaluate(same, pictures(), PROMPTS).scores, evaluate(reward, pictures(), PROMPTS).scores)
    file.write_text("no place for anything", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"has \{prompt\} 0 times"):
        HPSv3(**options, template=str(file))


def test_a_prompt_cannot_bring_a_reward_token_or_end_its_turn(reward: HPSv3) -> None:
    with pytest.raises(RewardError, match=r"prompt 4 holds '<\|Reward\|>'"):
        reward.check_prompts([Prompt("fine"), Prompt(f"a cat {TOKEN}", id=4)])
    with pytest.raises(RewardError, match="control token"):
        evaluate(reward, pictures(), ["a cat", "a <|vision_start|> dog", "a bird"])


def test_nothing_is_read_until_it_is_needed_and_then_the_error_names_what_to_fetch() -> None:
    reward = HPSv3()
    assert isinstance(reward, HasWeights) and isinstance(reward, HasTiny)
    assert [files.source for files in reward.files()] == ["MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"]
    assert not any("safetensors" in pattern for pattern in reward.files()[1].patterns)
    with pytest.raises(MissingWeights, match="MizzenAI/HPSv3.*alignkit fetch"):
        reward.prepare()
