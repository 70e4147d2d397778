"""Tiny random vision-language models in the published layout, for trying what is built on the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import RecipeError

VISION_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("yes", "Yes", "no", "No")
PATCH, MERGE, WIDTH = 14, 2, 32
PIXELS = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 16 * (PATCH * MERGE) ** 2}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def qwen_tokenizer(special: Sequence[str] = ()) -> Any:
    """A byte-level tokenizer with the control tokens of Qwen's models, `special`, and yes and no as words."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = list(bytes_to_unicode().values())
    tokens = {piece: i for i, piece in enumerate(pieces)}
    merges: Any = []
    for word in WORDS:  # a word is found by merging its letters from the left
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens[word[:end]] = len(tokens)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Qwen2Tokenizer(vocab=tokens, merges=merges, model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": [*VISION_TOKENS, *special]})
    return tokenizer


def qwen_config(family: str, tokenizer: Any) -> Any:
    """The configuration of a model of two language and two vision layers; see `FAMILIES`."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    if family not in FAMILIES:
        raise RecipeError(f"there is no tiny model {family!r}; choose one of {', '.join(FAMILIES)}")
    token = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "initializer_range": 0.2,  # large, so that untrained answers differ between pictures
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": WIDTH}
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    else:
        text |= {"head_dim": 16}
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": WIDTH}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    cls = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family]
    return cls(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def qwen_processor(family: str, tokenizer: Any) -> Any:
    """The processor that goes with `qwen_config`; at most 16 merged patches per picture."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": PIXELS}
    cls, video = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    return cls(Qwen2VLImageProcessor(**sizes), tokenizer, video(**sizes), chat_template=CHAT_TEMPLATE)


def qwen_vl(family: str = "qwen2_5_vl", special: Sequence[str] = (), seed: int = 0) -> tuple[Any, Any]:
    """(model, processor): about 70 thousand random parameters, of the classes that published weights load into.

    Args:
        special: control tokens beyond Qwen's own, such as a reward token; they come last in the vocabulary.
    """
    from transformers import AutoModelForImageTextToText

    tokenizer = qwen_tokenizer(special)
    config = qwen_config(family, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model.eval().requires_grad_(False), qwen_processor(family, tokenizer)


def write_qwen_vl(folder: Path, family: str = "qwen2_5_vl", special: Sequence[str] = (), seed: int = 0) -> None:
    """`qwen_vl` as files in `folder`, named as on the hub."""
    model, processor = qwen_vl(family, special, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_qwen_vl_that_says(folder: Path, stages: Sequence[Sequence[str]], seed: int = 0) -> None:
    """A tiny Qwen2.5-VL whose reply is one text of each stage in turn; which one depends on the picture.

    Every text is one token. The last dimensions of the hidden state are kept for the stage: layers do not write to
    them, a token's embedding says which stage it ends, and the head lets only texts of the next stage follow.

    Args:
        stages: fewer than eight; texts that the question does not contain.
    """
    model, processor = qwen_vl(seed=seed)
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([text for stage in stages for text in stage])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    token = tokenizer.convert_tokens_to_ids
    turns = [[token("Ċ")], *([token(text) for text in stage] for stage in stages), [token("<|im_end|>")]]
    first = WIDTH - len(turns) + 1
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight[first:] = 0
            layer.mlp.down_proj.weight[first:] = 0
        embeddings.zero_()  # words say nothing, so that the picture alone decides within a stage
        head[:, first:] = 0
        for stage, (before, after) in enumerate(pairwise(turns)):
            embeddings[before, first + stage] = 4
            head[after, first + stage] = 40
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
