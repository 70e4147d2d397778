"""Self-reward: which part of a pipeline can judge, what it is asked, and that judging leaves the generator alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from alignkit import shipped
from alignkit.errors import RecipeError, RewardError
from alignkit.policy import LoRA, Policy
from alignkit.rewards.base import Binds, Reward, evaluate
from alignkit.rewards.region_map import RegionMap, ScoresRegions, region_map, signed
from alignkit.rewards.tiny_models import CHAT_TEMPLATE, qwen_config, qwen_tokenizer, qwen_vl
from alignkit.rewards.understanding import SelfReward, crop, fill, image_processor_for, understanding_of
from alignkit.rewards.vision_language import VisionLanguage
from alignkit.types import Prompt

SIGN = r'an? (?P<colour>\w+) sign that says "(?P<word>\w+)"'
PROMPTS = [Prompt('a red sign that says "CAT"', id=1), Prompt('a blue sign that says "OPEN"', id=2)]


class NamedPipeline:
    """A pipeline that is nothing but its components."""

    def __init__(self, **components: Any) -> None:
        self.components = components


@pytest.fixture
def pair() -> tuple[Any, Any]:
    return qwen_vl("qwen2_5_vl")


@pytest.fixture
def pipe(pair: tuple[Any, Any]) -> NamedPipeline:
    model, processor = pair
    return NamedPipeline(text_encoder=model, tokenizer=processor)


@pytest.fixture(scope="module")
def signs() -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(shipped.path("assets", "signs", "generator"))


def pictures(count: int = 2, height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def text_only() -> dict[str, nn.Module]:
    clip = CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    t5 = T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=8, num_layers=1, num_heads=1)
    qwen = Qwen3Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    return {
        "CLIPTextModel": CLIPTextModel(clip),
        "T5EncoderModel": T5EncoderModel(t5),
        "Qwen3ForCausalLM": Qwen3ForCausalLM(qwen),
    }


@pytest.mark.parametrize("name", ["CLIPTextModel", "T5EncoderModel", "Qwen3ForCausalLM"])
def test_an_encoder_that_only_reads_is_refused_by_its_class(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"text_encoder is a {name}, which reads text only"):
        understanding_of(NamedPipeline(text_encoder=text_only()[name]))


def test_a_model_that_sees_but_cannot_answer_is_refused() -> None:
    mute = Qwen2_5_VLModel(qwen_config("qwen2_5_vl", qwen_tokenizer()))
    with pytest.raises(RecipeError, match="Qwen2_5_VLModel, which sees pictures but has no language head"):
        understanding_of(NamedPipeline(text_encoder=mute))
    with pytest.raises(RecipeError, match="no encoder of transformers"):
        understanding_of(NamedPipeline(vae=nn.Linear(1, 1)))


def test_it_is_found_by_what_it_can_do_wherever_it_stands(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    clip = text_only()["CLIPTextModel"]
    found = understanding_of(NamedPipeline(text_encoder=clip, text_encoder_2=model, processor=processor))
    assert found.component == "text_encoder_2"
    assert found.model is model
    assert found.processor is processor
    with pytest.raises(RecipeError, match="text_encoder is a CLIPTextModel"):
        understanding_of(NamedPipeline(text_encoder=clip, text_encoder_2=model), component="text_encoder")
    with pytest.raises(RecipeError, match="no encoder 'judge'; it has text_encoder"):
        understanding_of(NamedPipeline(text_encoder=clip), component="judge")


def test_a_processor_made_from_the_config_answers_as_the_published_one(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    tokenizer = processor.tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    found = understanding_of(NamedPipeline(text_encoder=model, tokenizer=tokenizer))
    vision, made = model.config.vision_config, found.processor.image_processor
    assert (made.patch_size, made.merge_size, made.temporal_patch_size) == (vision.patch_size, 2, 2)
    answers = [
        VisionLanguage(model, p).yes_probability(pictures(), ["red?", "blue?"]) for p in (processor, found.processor)
    ]
    torch.testing.assert_close(*answers)


def test_a_family_whose_config_does_not_say_how_pictures_are_normalised_needs_its_processor() -> None:
    model, processor = qwen_vl("qwen3_vl")
    with pytest.raises(RecipeError, match=r"Qwen3VLForConditionalGeneration.*give `processor`"):
        understanding_of(NamedPipeline(text_encoder=model, tokenizer=processor.tokenizer))
    assert understanding_of(NamedPipeline(text_encoder=model, processor=processor)).model is model


def test_the_judge_is_the_pipelines_own_module_frozen(pipe: NamedPipeline) -> None:
    model = pipe.components["text_encoder"].train().requires_grad_(True)
    reward = SelfReward().bind(SimpleNamespace(pipe=pipe))
    assert reward.module is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(reward, Reward)
    assert isinstance(reward, Binds)
    assert isinstance(reward, ScoresRegions)


def test_the_sign_generator_is_judged_by_its_own_text_encoder(signs: Any) -> None:
    policy = Policy(signs, LoRA(rank=2, alpha=2.0))
    before = signs.encode_prompt(list(PROMPTS))[0]
    reward = SelfReward(questions=("is the sign {colour}?", 'does the sign say "{word}"?'), pattern=SIGN).bind(policy)
    assert reward.module is signs.text_encoder
    media = pictures(2, 24, 64)
    scores = evaluate(reward, media, PROMPTS).scores
    assert ((scores >= 0) & (scores <= 1)).all()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1.0
    torch.testing.assert_close(evaluate(reward, media, PROMPTS).scores, scores, rtol=0, atol=0)
    torch.testing.assert_close(signs.encode_prompt(list(PROMPTS))[0], before, rtol=0, atol=0)
    policy.close()


def test_a_sign_is_shown_to_the_judge_pixel_by_pixel(signs: Any) -> None:
    processor = image_processor_for(signs.text_encoder)
    grid = processor(images=[torch.rand(3, 24, 64)], do_rescale=False, return_tensors="pt")["image_grid_thw"]
    patch = signs.text_encoder.config.vision_config.patch_size
    assert grid.tolist() == [[1, 24 // patch, 64 // patch]]


def test_the_score_is_sigmoid_of_yes_minus_no(pipe: NamedPipeline) -> None:
    reward = SelfReward(questions=("red?",)).bind(SimpleNamespace(pipe=pipe))
    model, processor, media = reward.module, pipe.components["tokenizer"], pictures()
    for row, score in zip(media, reward(media, PROMPTS), strict=True):
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>red?<|im_end|>\n<|im_start|>assistant\n"
        inputs = processor(text=[text], images=[row], images_kwargs={"do_rescale": False}, return_tensors="pt")
        logits = model(**inputs).logits[0, -1].double()  # type: ignore[operator]
        vocabulary = processor.tokenizer.get_vocab()
        yes, no = (
            logits[[vocabulary[word] for word in words]].logsumexp(0) for words in (("yes", "Yes"), ("no", "No"))
        )
        torch.testing.assert_close(score.double(), (yes - no).sigmoid())


def test_several_questions_are_averaged_or_multiplied(pipe: NamedPipeline) -> None:
    policy, media = SimpleNamespace(pipe=pipe), pictures()
    questions = ("is it {colour}?", "does it say {word}?")
    first, second = (SelfReward(questions=(q,), pattern=SIGN).bind(policy)(media, PROMPTS) for q in questions)
    both = {c: SelfReward(questions=questions, pattern=SIGN, combine=c).bind(policy) for c in ("mean", "product")}  # type: ignore[arg-type]
    torch.testing.assert_close(both["mean"](media, PROMPTS), (first + second) / 2)
    torch.testing.assert_close(both["product"](media, PROMPTS), first * second)
    with pytest.raises(RecipeError, match="combine='max'"):
        SelfReward(combine="max")  # type: ignore[arg-type]


def test_gradients_reach_the_pixels_and_a_sample_does_not_depend_on_its_batch(pipe: NamedPipeline) -> None:
    reward = SelfReward().bind(SimpleNamespace(pipe=pipe))
    media = pictures(3).requires_grad_()
    prompts = [*PROMPTS, Prompt("a much longer prompt than the others, about a teapot", id=3)]
    scores = evaluate(reward, media, prompts).scores
    (gradient,) = torch.autograd.grad(scores.sum(), media)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    alone = torch.cat([reward(media[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)


def test_questions_are_filled_from_the_prompt_its_columns_and_the_pattern() -> None:
    prompt = Prompt('a red sign that says "CAT"', id=7, columns={"place": "street"})
    assert fill("{prompt}?", prompt, None) == 'a red sign that says "CAT"?'
    assert fill("{colour} {word} {place}", prompt, SIGN) == "red CAT street"
    with pytest.raises(RewardError, match=r"prompt 7 .* has no 'style'"):
        fill("is it {style}?", prompt, SIGN)
    with pytest.raises(RewardError, match="prompt 3 'a dog' does not match"):
        fill("is it {colour}?", Prompt("a dog", id=3), SIGN)


def test_prompts_that_cannot_be_asked_about_are_named_before_a_run() -> None:
    reward = SelfReward(questions=("is it {style}?",))
    with pytest.raises(RewardError, match="prompt 1 .*'style'"):
        reward.check_prompts(PROMPTS)
    with pytest.raises(RewardError, match="prompt 4: box 0"):
        SelfReward().check_prompts([Prompt("x", id=4, columns={"boxes": [[0, 0, 64, 24]]})])


def test_unbound_it_says_who_binds_it() -> None:
    for call in (lambda r: r.prepare(), lambda r: r(pictures(), PROMPTS), lambda r: r.module):
        with pytest.raises(RecipeError, match="a run binds it"):
            call(SelfReward())


def test_regions_come_from_the_grid_the_prompt_or_a_detector(pipe: NamedPipeline) -> None:
    def top_half(media: torch.Tensor, prompts: Any) -> list[torch.Tensor]:
        return [torch.tensor([[0.0, 0.0, 1.0, 0.5]])] * len(media)

    policy, media = SimpleNamespace(pipe=pipe), pictures(1)
    given = Prompt("x", columns={"boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]})
    assert len(SelfReward(grid=(2, 3)).bind(policy).regions(media, PROMPTS[:1])[0].boxes) == 6
    assert SelfReward().bind(policy).regions(media, [given])[0].boxes.tolist() == given.columns["boxes"]
    assert SelfReward(detector=top_half).bind(policy).regions(media, [given])[0].boxes.tolist() == [[0, 0, 1, 0.5]]


def test_regions_are_the_largest_boxes_that_a_detector_of_the_library_finds(pipe: NamedPipeline) -> None:
    media = torch.full((2, 3, 56, 112), 0.95)
    media[0, :, 10:20, 10:20] = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    media[0, :, 28:56, 56:84] = torch.tensor([0.15, 0.3, 0.8]).view(3, 1, 1)
    found = "alignkit.rewards.found_boxes:FoundBoxes(detector='alignkit.rewards.drawn_shapes:DrawnShapes', most=1"
    reward = SelfReward(detector=f"{found}, labels=('square',))").bind(SimpleNamespace(pipe=pipe))
    square, nothing = reward.regions(media, PROMPTS[:2])
    assert square.boxes.tolist() == [[0.5, 0.5, 0.75, 1.0]]
    assert nothing.boxes.shape == (0, 4) and nothing.overall is not None
    with pytest.raises(RewardError, match="what to look for"):
        SelfReward(detector=f"{found})").check_prompts(PROMPTS[:1])


def test_the_processor_and_the_detectors_weights_are_among_what_is_fetched() -> None:
    reward = SelfReward(processor="nobody/processor", detector="alignkit.rewards.found_boxes:FoundBoxes")
    sources = ["nobody/processor", "PekingU/rtdetr_r50vd_coco_o365"]
    assert [one.source for one in reward.files()] == sources
    assert [one.source for one in RegionMap(judge=reward).files()] == sources
    assert SelfReward().files() == ()


def test_a_region_is_judged_by_its_crop_alone(pipe: NamedPipeline) -> None:
    policy, media = SimpleNamespace(pipe=pipe), pictures(1)
    reward = SelfReward(questions=("red?",), grid=(1, 2), region_question="blue?").bind(policy)
    found = reward.regions(media, PROMPTS[:1])[0]
    left = SelfReward(questions=("blue?",)).bind(policy)(media[..., :28], PROMPTS[:1])
    torch.testing.assert_close(found.scores[0], signed(left)[0])
    assert found.overall == pytest.approx(2 * reward(media, PROMPTS[:1]).item() - 1)
    changed = media.clone()
    changed[..., 28:] = 0
    torch.testing.assert_close(reward.regions(changed, PROMPTS[:1])[0].scores[0], found.scores[0])


def test_a_crop_takes_columns_from_x_and_rows_from_y() -> None:
    picture = torch.arange(24 * 64).view(1, 24, 64).expand(3, -1, -1)
    part = crop(picture, (0.25, 0.5, 0.75, 1.0))
    assert part.shape == (3, 12, 32)
    assert part[0, 0, 0] == 12 * 64 + 16


def test_a_region_map_of_the_self_reward_is_bound_with_it(pipe: NamedPipeline) -> None:
    reward = RegionMap(judge=SelfReward(grid=(1, 2)), size=(4, 8)).bind(SimpleNamespace(pipe=pipe))
    media = pictures()
    maps = reward.maps(media, PROMPTS)  # type: ignore[attr-defined]
    assert maps.shape == (2, 4, 8)
    found = reward.judge.regions(media, PROMPTS)[0]  # type: ignore[attr-defined]
    whole = region_map(found.boxes, found.scores, found.overall, 56, 56)
    torch.testing.assert_close(maps[0, 0, 0], whole[0, 0])
