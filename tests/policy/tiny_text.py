"""Tokenizers and text encoders of a few kilobytes, built from literal vocabularies: nothing comes from a hub.

Every tokenizer knows each printable character, so two different texts never get the same tokens; most also
know the words below as one token each, so that prompts and chat templates keep their real length in tokens.
"""

# fmt: off
# A configuration stays a few lines long.

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 16  # hidden size of every text encoder here
LENGTH = 16  # tokens that a CLIP tokenizer pads to

WORDS = (
    "a", "red", "blue", "green", "cat", "dog", "sign", "that", "says", "on", "the", "grass", "bad", "quality",
    "system", "user", "Describe", "image", "video", "by", "detailing", "color", "shape", "size",
    "texture", "quantity", "text", "spatial", "relationships", "of", "objects", "and", "background", "Key",
    "features", "Prompt", "Start", "assistant", "You", "are", "an",
)

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer(
    special: tuple[str, ...] = ("<pad>", "<unk>", "<bos>", "<eos>"),
    pad: str = "<pad>",
    bos: str | None = None,
    eos: str | None = None,
    **settings: Any,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer that splits at words, punctuation and newlines: unknown words fall into characters.

    On Qwen's image template it gives the 34 tokens that the real tokenizer gives. `bos` and `eos`, when
    given, are put around every text; `settings` go to `PreTrainedTokenizerFast` (`padding_side`, ...).
    """
    characters = [c for c in string.printable if not c.isspace()]
    pieces = [*special, "[UNK]", "\n", *characters, *(f"##{c}" for c in characters), *WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    around = [f"{bos} " if bos else "", "$A", f" {eos}" if eos else ""]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="".join(around), special_tokens=[(t, vocabulary[t]) for t in (bos, eos) if t]
    )
    settings.setdefault("chat_template", CHAT_TEMPLATE)
    names = {"pad_token": pad, "unk_token": "[UNK]", "bos_token": bos, "eos_token": eos}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings)
    fast.add_special_tokens({"additional_special_tokens": [t for t in special if t not in (pad, bos, eos)]})
    return fast


def clip_tokenizer(length: int = LENGTH) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer without merges: one token a character, padded to `length`."""
    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=length)


def clip(projection: bool = False, width: int = WIDTH, length: int = LENGTH) -> torch.nn.Module:
    """A CLIP text encoder for `clip_tokenizer`: (B, length) -> (B, length, width)."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def clip_vision() -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """An image encoder and its processor: 28 px pictures -> (B, 5, WIDTH) hidden states."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14, projection_dim=WIDTH,
    )
    return CLIPVisionModelWithProjection(config), CLIPImageProcessor(crop_size=28, size=28)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: the words of `WORDS` are one token, anything else its characters."""
    characters = [c for c in string.printable if not c.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -4.0)]
    pieces += [(f"\u2581{w}", -1.0) for w in WORDS if len(w) > 1] + [(c, -4.0) for c in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def t5(width: int = WIDTH, vocabulary: int | None = None) -> T5EncoderModel:
    """A T5 encoder, for `t5_tokenizer` unless another size of vocabulary is given: (B, L) -> (B, L, width)."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary or len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
            use_cache=False,
        )
    )


def umt5(width: int = WIDTH) -> UMT5EncoderModel:
    """The encoder of AuraFlow, for `llama_tokenizer`."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(llama_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            relative_attention_num_buckets=8, is_encoder_decoder=False, use_cache=False,
        )
    )


def llama_tokenizer(pad: str = "<pad>", **settings: Any) -> PreTrainedTokenizerFast:
    """Words between `<bos>` and `<eos>`."""
    return word_tokenizer(pad=pad, bos="<bos>", eos="<eos>", **settings)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Words after `<bos>`."""
    return word_tokenizer(bos="<bos>", padding_side="right")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Words; a text that is too long loses its beginning, so the prompt outlives FLUX.2's long system message."""
    return word_tokenizer(QWEN_SPECIAL, pad="<|endoftext|>", padding_side="left", truncation_side="left")


def _decoder(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What every small decoder-only text encoder shares."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def gemma() -> Gemma2Model:
    """The encoder of Sana and Lumina 2."""
    return Gemma2Model(Gemma2Config(**_decoder(gemma_tokenizer()), sliding_window=64))


def qwen3() -> Qwen3Model:
    """The encoder of Z-Image."""
    return Qwen3Model(Qwen3Config(**_decoder(qwen_tokenizer())))


def glm() -> GlmForCausalLM:
    """The encoder of CogView 4."""
    return GlmForCausalLM(GlmConfig(**_decoder(llama_tokenizer())))


def llama() -> LlamaModel:
    """The encoder of HunyuanVideo."""
    return LlamaModel(LlamaConfig(**_decoder(llama_tokenizer())))


def mistral() -> Mistral3ForConditionalGeneration:
    """The encoder of FLUX.2."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 28, "patch_size": 14, "model_type": "pixtral"}
    decoder = {**_decoder(mistral_tokenizer()), "model_type": "mistral", "sliding_window": None}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=decoder, vision_config=vision))


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens and chat template of Qwen; 34 tokens for the image template, as the real one gives."""
    return word_tokenizer(QWEN_SPECIAL, pad="<|endoftext|>")


def qwen_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer and picture processor of Qwen2.5-VL for pictures of 56 to 112 px."""
    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=112 * 112)
    return Qwen2_5_VLProcessor(
        image_processor=pictures, tokenizer=qwen_tokenizer(), video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def qwen_vl(width: int = WIDTH, head_dim: int = 8) -> Qwen2_5_VLForConditionalGeneration:
    """The vision-language text encoder of Qwen-Image and HunyuanImage."""
    tokenizer = qwen_tokenizer()
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in QWEN_SPECIAL}
    rotary = {"mrope_section": [1, 1, head_dim // 2 - 2], "rope_type": "default", "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": width // head_dim, "num_key_value_heads": width // head_dim,
            "vocab_size": len(tokenizer), "rope_parameters": rotary, "max_position_embeddings": 512,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
            "patch_size": 14, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)
