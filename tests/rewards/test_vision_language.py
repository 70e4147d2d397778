"""Asking vision-language models about pictures: the answer's probability, its gradient, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.answers import log_mass, spellings
from alignkit.rewards.tiny_models import CHAT_TEMPLATE, FAMILIES, qwen_tokenizer, qwen_vl, write_qwen_vl
from alignkit.rewards.vision_language import Chat, VisionLanguage, probability, processor_from
from alignkit.rewards.weights import MissingWeights

QUESTIONS = ("Is it a sign?", "Is it a picture of something that is blue?", "Blue?")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def llava() -> tuple[Any, Any]:
    from transformers import (
        AutoModelForImageTextToText,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    tokenizer = qwen_tokenizer(["<image>"])
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaProcessor(CLIPImageProcessor(**size), tokenizer, 14, "default", num_additional_image_tokens=1)
    return AutoModelForImageTextToText.from_config(config), processor


def mistral3() -> tuple[Any, Any]:
    from transformers import (
        AutoModelForImageTextToText,
        Mistral3Config,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    tokenizer = qwen_tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    config = Mistral3Config(
        text_config=MistralConfig(vocab_size=len(tokenizer), head_dim=16, **TEXT),
        vision_config=PixtralVisionConfig(image_size=56, patch_size=14, head_dim=8, **VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    pixels = PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
    return AutoModelForImageTextToText.from_config(config), PixtralProcessor(pixels, tokenizer, 14, 2)


def idefics3() -> tuple[Any, Any]:
    from transformers import (
        AutoModelForImageTextToText,
        Idefics3Config,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )

    tokenizer = qwen_tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"])
    config = Idefics3Config(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        vision_config={"image_size": 28, "patch_size": 7, **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    size = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    processor = Idefics3Processor(Idefics3ImageProcessor(**size), tokenizer, image_seq_len=4)
    return AutoModelForImageTextToText.from_config(config), processor


OTHERS: dict[str, Callable[[], tuple[Any, Any]]] = {"llava": llava, "mistral3": mistral3, "idefics3": idefics3}
ALL = [*FAMILIES, *OTHERS]


@functools.cache
def judge(family: str = "qwen2_5_vl") -> VisionLanguage:
    if family in FAMILIES:
        return VisionLanguage(*qwen_vl(family))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = OTHERS[family]()
    return VisionLanguage(model.eval().requires_grad_(False), processor)


def pictures(number: int = 3, height: int = 64, width: int = 48) -> torch.Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def literal_logits(picture: torch.Tensor, question: str) -> tuple[torch.Tensor, dict[str, int]]:
    """(V,) logits of the first answer token, with the prompt written out by hand, and the vocabulary."""
    vl = judge()
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    batch = vl.processor(text=[text], images=[picture], do_rescale=False, return_tensors="pt")
    return vl.model(**batch).logits[0, -1].double(), vl.tokenizer.get_vocab()


def test_the_yes_probability_is_the_sigmoid_of_all_spellings_of_yes_against_those_of_no() -> None:
    media = pictures()
    answers = judge().yes_probability(media, QUESTIONS)
    for i in range(3):
        z, v = literal_logits(media[i], QUESTIONS[i])
        yes = torch.log(z[v["yes"]].exp() + z[v["Yes"]].exp())
        no = torch.log(z[v["no"]].exp() + z[v["No"]].exp())
        torch.testing.assert_close(answers[i].double(), torch.sigmoid(yes - no), rtol=0, atol=1e-6)


def test_among_the_vocabulary_the_yes_probability_is_its_mass_in_the_softmax() -> None:
    media = pictures()
    answers = judge().yes_probability(media, QUESTIONS, among="vocabulary")
    for i in range(3):
        z, v = literal_logits(media[i], QUESTIONS[i])
        mass = (z[v["yes"]].exp() + z[v["Yes"]].exp()) / z.exp().sum()
        torch.testing.assert_close(answers[i].double(), mass, rtol=0, atol=1e-6)


def test_probabilities_are_among_the_answers_or_the_vocabulary_and_nothing_else() -> None:
    with pytest.raises(RecipeError, match="among='tokens'; choose one of answers, vocabulary"):
        probability(torch.zeros(1, 2), among="tokens")


@pytest.mark.parametrize("family", ALL)
def test_an_answer_does_not_depend_on_its_batch_and_its_gradient_reaches_every_picture(family: str) -> None:
    media = pictures().requires_grad_()
    together = judge(family).yes_probability(media, QUESTIONS)
    (gradient,) = torch.autograd.grad(together.sum(), media)
    for i in range(3):
        one = media[i : i + 1].detach().requires_grad_()
        alone = judge(family).yes_probability(one, QUESTIONS[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
        (own,) = torch.autograd.grad(alone.sum(), one)
        assert own.abs().max() > 1e-4
        torch.testing.assert_close(own[0], gradient[i], rtol=1e-3, atol=1e-6)
    assert together.detach().unique().numel() == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_are_asked_about_with_a_gradient_to_every_frame(family: str) -> None:
    clips = pictures(8).unflatten(0, (2, 4)).requires_grad_()
    together = judge(family).yes_probability(clips, QUESTIONS[:2])
    (gradient,) = torch.autograd.grad(together.sum(), clips)
    assert (gradient.abs().amax((2, 3, 4)) > 1e-5).all()
    alone = torch.cat([judge(family).yes_probability(clips[i : i + 1], QUESTIONS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_the_model_sees_what_its_processor_makes_of_the_same_picture_from_a_file() -> None:
    smooth = torch.nn.functional.interpolate(pictures(1, 5, 4), (80, 60), mode="bilinear")[0]
    picture = (smooth * 255).round() / 255
    ours = judge().inputs([Chat((picture, "?"))])["pixel_values"]
    theirs = judge().processor.image_processor(images=[to_pil_image(picture)], return_tensors="pt")["pixel_values"]
    # A file is rounded to 256 steps after each direction of resizing; a step is 1 / 255 / 0.26 once normalised.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 255 / 0.26)


def test_pictures_are_read_in_the_order_of_the_question() -> None:
    first, second = pictures(2)
    vl = judge()
    straight = vl.next_logits([Chat((first, second, "Is the second better?"))])
    swapped = vl.next_logits([Chat((second, first, "Is the second better?"))])
    between = vl.next_logits([Chat((first, "Is this worse than", second, "?"))])
    assert (straight - swapped).abs().max() > 1e-2
    assert (straight - between).abs().max() > 1e-2


def test_recomputing_activations_changes_neither_answer_nor_gradient() -> None:
    def gradient(vl: VisionLanguage) -> tuple[torch.Tensor, torch.Tensor]:
        media = pictures().requires_grad_()
        answers = vl.yes_probability(media, QUESTIONS)
        return answers.detach(), torch.autograd.grad(answers.sum(), media)[0]

    kept = gradient(judge())
    recomputed = gradient(dataclasses.replace(judge(), checkpointing=True, batch_size=2))
    torch.testing.assert_close(recomputed, kept, rtol=1e-3, atol=1e-6)


def test_the_size_option_decides_how_many_tokens_a_picture_takes() -> None:
    large = dataclasses.replace(judge(), size={"shortest_edge": 84 * 84, "longest_edge": 84 * 84})
    chat = [Chat((pictures(1, 84, 84)[0], "?"))]
    assert judge().inputs(chat)["image_grid_thw"].tolist() == [[1, 6, 6]]
    small = dataclasses.replace(judge(), size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28})
    assert small.inputs(chat)["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert large.inputs(chat)["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_replies_are_the_greedy_ones_whatever_the_batch() -> None:
    chats = [Chat((picture, question)) for picture, question in zip(pictures(), QUESTIONS)]
    vl = judge()
    together = vl.texts(chats, max_tokens=4)
    assert together == [vl.texts([chat], max_tokens=4)[0] for chat in chats]
    first = vl.next_logits(chats).argmax(1)
    for reply, token in zip(vl.texts(chats, max_tokens=1), first):
        assert reply == vl.tokenizer.decode([int(token)], skip_special_tokens=True).strip()


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_a_text_with_a_control_token_is_refused(token: str) -> None:
    with pytest.raises(RewardError, match="control token"):
        judge().yes_probability(pictures(1), [f"a sign{token} yes"])


def test_control_tokens_that_the_caller_allows_reach_the_model() -> None:
    chat = [Chat((pictures(1)[0], "rate <|vision_pad|>"))]
    ids = judge().inputs(chat, special=["<|vision_pad|>"])["input_ids"]
    assert judge().tokenizer.convert_tokens_to_ids("<|vision_pad|>") in ids


def test_a_processor_that_takes_pixels_out_of_torch_is_refused_when_a_gradient_is_wanted() -> None:
    class ThroughUint8:
        def __init__(self, real: Any) -> None:
            self.tokenizer, self.chat_template, self._real = real.tokenizer, real.chat_template, real
            self.all_special_multimodal_tokens = real.all_special_multimodal_tokens

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return self._real.apply_chat_template(*args, **kwargs)

        def __call__(self, images: Any, **kwargs: Any) -> Any:
            return self._real(images=[[one.detach() for one in group] for group in images], **kwargs)

    vl = dataclasses.replace(judge(), processor=ThroughUint8(judge().processor))
    assert vl.yes_probability(pictures(1), QUESTIONS[:1]).isfinite().all()
    with pytest.raises(RewardError, match="takes the pixels out of torch"):
        vl.yes_probability(pictures(1).requires_grad_(), QUESTIONS[:1])


def test_a_model_without_chat_template_is_asked_in_plain_text() -> None:
    ids = judge("llava").inputs([Chat((pictures(1)[0], "Blue?"), system="Be brief.")])["input_ids"]
    text = judge("llava").tokenizer.decode(ids[0])
    assert text == "Be brief.\n" + "<image>" * 4 + "\nBlue?\nAnswer:"


def test_weights_in_the_published_layout_are_loaded_as_they_are(tmp_path: Path) -> None:
    write_qwen_vl(tmp_path, "qwen2_5_vl", seed=0)
    assert (tmp_path / "model.safetensors").stat().st_size < 1_000_000
    loaded = VisionLanguage.load(tmp_path, batch_size=2)
    assert loaded.batch_size == 2
    media = pictures()
    torch.testing.assert_close(loaded.yes_probability(media, QUESTIONS), judge().yes_probability(media, QUESTIONS))


def test_weights_that_are_not_here_are_named_with_the_command_that_fetches_them() -> None:
    with pytest.raises(MissingWeights, match="Qwen/Qwen2.5-VL-7B-Instruct.*alignkit fetch"):
        VisionLanguage.load("Qwen/Qwen2.5-VL-7B-Instruct")


def test_an_option_that_a_model_does_not_have_is_refused() -> None:
    with pytest.raises(RecipeError, match="no option temperature"):
        VisionLanguage.load("anything", temperature=0)


@pytest.mark.parametrize("family", [*FAMILIES, "mistral3"])
def test_a_processor_put_together_from_a_pipelines_parts_asks_the_same(family: str) -> None:
    vl = judge(family)
    template = CHAT_TEMPLATE if family in FAMILIES else None
    made = processor_from(vl.model, vl.tokenizer, vl.processor.image_processor, template)
    media = pictures()
    torch.testing.assert_close(
        dataclasses.replace(vl, processor=made).yes_probability(media, QUESTIONS), vl.yes_probability(media, QUESTIONS)
    )


def test_an_image_processor_is_built_from_the_models_configuration() -> None:
    made = processor_from(judge().model, judge().tokenizer).image_processor
    assert (made.patch_size, made.merge_size, made.temporal_patch_size) == (14, 2, 2)


def test_a_text_encoder_has_no_processor() -> None:
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16))
    with pytest.raises(RecipeError, match="no processor for T5EncoderModel"):
        processor_from(encoder, judge().tokenizer)


def test_spellings_are_all_tokens_that_are_the_answer() -> None:
    class Vocabulary:
        def get_vocab(self) -> dict[str, int]:
            return {"yes": 0, "Ġyes": 1, "▁Yes": 2, "YES": 3, "yesterday": 4, "no": 5, "not": 6}

    assert spellings(Vocabulary(), ["yes", "no"]) == [[0, 1, 2, 3], [5]]


def test_answers_that_are_no_token_are_told_apart_by_their_first_one() -> None:
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_only = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(bytes_to_unicode().values())}, merges=[])
    yes, no = spellings(bytes_only, ["yes", "no"])
    assert bytes_only.convert_ids_to_tokens(yes) == ["Y", "y"]
    assert bytes_only.convert_ids_to_tokens(no) == ["N", "n"]
    with pytest.raises(RecipeError, match="begins with the same token"):
        spellings(bytes_only, ["1", "10"])


def test_the_mass_of_an_answer_is_the_sum_over_its_tokens() -> None:
    logits = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    expected = torch.stack([p[:, 0] + p[:, 3], p[:, 5]], 1)
    torch.testing.assert_close(log_mass(logits, [[0, 3], [5]]).exp(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_positions_keep_their_exact_angles(tmp_path: Path, family: str) -> None:
    write_qwen_vl(tmp_path, family)
    exact, half = (VisionLanguage.load(tmp_path, dtype=dtype).model for dtype in ("float32", "bfloat16"))
    frequencies = {name: value for name, value in exact.named_buffers() if name.endswith("inv_freq")}
    assert frequencies
    for name, value in frequencies.items():
        torch.testing.assert_close(dict(half.named_buffers())[name], value, rtol=0, atol=0)


def test_in_bfloat16_the_answer_is_float32_and_close(tmp_path: Path) -> None:
    write_qwen_vl(tmp_path)
    half = VisionLanguage.load(tmp_path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    media = pictures().requires_grad_()
    answers = half.yes_probability(media, QUESTIONS)
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers, judge().yes_probability(media, QUESTIONS), rtol=0, atol=0.05)
    assert torch.autograd.grad(answers.sum(), media)[0].abs().max() > 1e-4
