"""Qwen2-VL with a reward head on special tokens: what HPSv3 and VideoReward are made of.

The text of a question ends in, or contains, tokens of its own (`<|Reward|>`). What the language model knows at such
a token, of everything before it, is read by a small head. Causality decides what a rating may depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignkit import shipped
from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.dual_encoder import fill
from alignkit.rewards.vision_language import PATTERNS, Chat, VisionLanguage
from alignkit.rewards.weights import DTYPES, MissingWeights, frozen, on
from alignkit.types import Prompt

_TEXT = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
}
_VISION = {
    "depth",
    "embed_dim",
    "hidden_size",
    "mlp_ratio",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
}

BASE_PATTERNS = tuple(pattern for pattern in PATTERNS if not pattern.startswith("model"))
"""Of the base model's repository only configuration, tokenizer and processor are read: the reward brings weights."""

INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)


class TokenReward(nn.Module):
    """A Qwen2-VL without its vocabulary head, and a reward head that reads special tokens.

    Its state dictionary has the names of today's transformers (`model.visual.*`, `model.language_model.*`) and
    `rm_head.*`; `current_names` gives published ones these names.

    Args:
        backbone: `Qwen2VLModel`.
        head: from (..., hidden) to (..., D), float32.
        tokens: ids of the T special tokens, in the order of the ratings.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.model: Any = backbone
        self.rm_head = head
        self.tokens = tuple(tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone."""
        return next(self.model.parameters()).dtype

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **media: torch.Tensor) -> torch.Tensor:
        """(B, T, D) float32: the head's answer at each special token of each question.

        Positions count tokens, those of pictures too: the published models were trained that way, without
        Qwen2-VL's own positions in three dimensions.

        Args:
            input_ids, attention_mask: (B, L), padded on either side; each special token once in each row.
            media: patches and grids as Qwen2-VL's processor makes them.

        Raises:
            RewardError: a row has a special token not once.
        """
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=repeat(positions, "b l -> axes b l", axes=3),
            use_cache=False,
            **media,
        ).last_hidden_state
        return self.rm_head(at_tokens(hidden, input_ids, self.tokens).float())


def at_tokens(hidden: torch.Tensor, input_ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """(B, T, H) of (B, L, H): the states at the one place of each of T tokens in each row of (B, L).

    Raises:
        RewardError: a token stands not once in a row.
    """
    found = torch.stack([input_ids == token for token in tokens], dim=1)  # (B, T, L)
    counts = found.sum(dim=2)
    if (counts != 1).any():
        row, column = (counts != 1).nonzero()[0].tolist()
        raise RewardError(
            f"question {row} has the reward token of id {tokens[column]} {int(counts[row, column])} times, expected "
            "once; the template has each once, so the prompt or the tokenizer has it too, or not at all"
        )
    return torch.stack([hidden[row, places] for row, places in enumerate(found.int().argmax(dim=2))])


def current_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state dictionary with today's names: PEFT's prefix removed, Qwen2-VL's rooms as in transformers 5.

    `visual.*` is `model.visual.*`, `model.layers.*` (and `embed_tokens`, `norm`) `model.language_model.layers.*`.
    The vocabulary head is left out. Names of today stay.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("base_model.model.")
        if name.startswith("lm_head."):
            continue
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
            name = f"model.language_model.{name.removeprefix('model.')}"
        renamed[name] = value
    return renamed


def published_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dictionary of `TokenReward` with the names that published files have; `current_names` undoes it."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in state.items()
    }


def merge_lora(state: Mapping[str, torch.Tensor], scale: float | None) -> dict[str, torch.Tensor]:
    """The state dictionary of a model under PEFT's LoRA as that of the model itself: W + scale * up @ down.

    Args:
        state: with `X.base_layer.weight`, `X.lora_A.default.weight` and `X.lora_B.default.weight` where LoRA is.
        scale: alpha / rank; None where there is no LoRA.

    Raises:
        RecipeError: there is LoRA and no scale.
    """
    merged: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        down, up = (name.replace(".base_layer.", f".lora_{letter}.default.") for letter in "AB")
        if plain != name and name.endswith(".weight") and down in state:
            if scale is None:
                raise RecipeError("the weights hold LoRA matrices and nothing says how they are scaled")
            value = (value.float() + scale * state[up].float() @ state[down].float()).to(value.dtype)
        merged[plain] = value
    return merged


def load_token_reward(
    state: Mapping[str, torch.Tensor],
    base: Path,
    build_head: Callable[[int], nn.Module],
    tokens: Sequence[str],
    dtype: str,
    **options: Any,
) -> VisionLanguage:
    """The model of a state dictionary in today's names, ready to score, with the base model's processor.

    Args:
        state: as `current_names` returns it.
        base: folder of the base model's configuration, tokenizer and processor.
        build_head: makes the head from the width of the hidden states.
        tokens: the special tokens, appended to the base tokenizer's vocabulary in this order.
        options: attributes of `VisionLanguage`.

    Raises:
        RewardError: the weights are not those of this base model and head; names what lacks or is too much.
    """
    from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

    processor: Any = AutoProcessor.from_pretrained(base, local_files_only=True)
    processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
    ids: list[int] = processor.tokenizer.convert_tokens_to_ids(list(tokens))
    config: Any = AutoConfig.from_pretrained(base, local_files_only=True)
    embedding = "model.language_model.embed_tokens.weight"
    if embedding not in state:
        raise RewardError(f"the weights lack {embedding}; expected those of a Qwen2-VL, found {_some(state)}")
    rows, width = state[embedding].shape
    if max(ids) >= rows:
        raise RewardError(
            f"the weights have {rows} tokens and {tokens[-1]!r} would be number {max(ids)}: they were trained without "
            f"it, or base {str(base)!r} is not their base model"
        )
    config.text_config.vocab_size = rows
    head = build_head(width)
    fill(head, {n.removeprefix("rm_head."): v for n, v in state.items() if n.startswith("rm_head.")}, "rm_head.*")
    body = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}
    loaded: Any = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=body, dtype=dtype, output_loading_info=True
    )
    backbone, report = loaded
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise RewardError(f"the weights are not those of base {str(base)!r}: {wrong}")
    # The published code trains and scores with the rotary frequencies in bfloat16 too, which `frozen` would keep exact.
    module = TokenReward(frozen(backbone, dtype).to(DTYPES[dtype]), frozen(head), ids).eval()
    return VisionLanguage(module, processor, **options)


def _some(state: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(sorted(state)[:3]) + ", ..."


def ratings(reader: VisionLanguage, chats: Sequence[Chat], tokens: Sequence[str], outputs: int) -> torch.Tensor:
    """(B, T, outputs) float32 of `TokenReward`, `reader.batch_size` questions at a time."""

    def forward(group: Sequence[Chat]) -> torch.Tensor:
        inputs = reader.inputs(group, special=tokens, reply=False)
        return on(reader.model, group[0].device)(**{name: inputs[name] for name in INPUTS if name in inputs})

    if not chats:
        return torch.empty(0, len(tokens), outputs)
    groups = [chats[i : i + reader.batch_size] for i in range(0, len(chats), reader.batch_size)]
    recompute = reader.checkpointing and torch.is_grad_enabled()
    parts = [checkpoint(forward, group, use_reentrant=False) if recompute else forward(group) for group in groups]
    return torch.cat(parts)  # type: ignore[arg-type]


def template_of(path: str | None, default: str, tokens: Sequence[str]) -> str:
    """The text asked about a medium, with `{prompt}` where the prompt goes: a file's, or the default.

    Raises:
        RecipeError: no such file, or it has not `{prompt}` and every token exactly once.
    """
    if path is None:
        return default
    file = Path(shipped.resolved(path))
    if not file.is_file():
        raise RecipeError(f"template={path!r}: there is no such file")
    text = file.read_text(encoding="utf-8")
    for needed in ("{prompt}", *tokens):
        if text.count(needed) != 1:
            raise RecipeError(f"template={path!r} has {needed} {text.count(needed)} times, expected once")
    return text


def check_for_tokens(prompts: Sequence[Prompt], tokens: Sequence[str]) -> None:
    """Raises RewardError naming the first prompt that holds one of the reward tokens."""
    for prompt in prompts:
        for token in tokens:
            if token in prompt:
                raise RewardError(f"prompt {prompt.id} holds {token!r}, at which the reward is read; take it out")


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from `.safetensors`, or from PyTorch's own format without running code from it.

    Raises:
        MissingWeights: no such file.
    """
    if not path.is_file():
        raise MissingWeights(f"weights {str(path)!r}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state.get("model", state)


def write_tiny_base(folder: Path) -> Any:
    """Configuration, tokenizer and processor of a tiny Qwen2-VL, in the files of `Qwen/Qwen2-VL-2B-Instruct`.

    Returns:
        The configuration, as `Qwen2VLConfig`.
    """
    from transformers import Qwen2VLImageProcessor

    from alignkit.rewards.tiny_models import CHAT_TEMPLATE, MERGE, PATCH, PIXELS, qwen_config, qwen_tokenizer

    tokenizer = qwen_tokenizer()
    config = qwen_config("qwen2_vl", tokenizer)
    pictures = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=PIXELS)
    write_base(folder, config, tokenizer, pictures, CHAT_TEMPLATE)
    return config


def write_base(folder: Path, config: Any, tokenizer: Any, pictures: Any, chat_template: str) -> None:
    """What a reward reads of its base model, in the files of `Qwen/Qwen2-VL-2B-Instruct`: all but the weights.

    Args:
        config: `Qwen2VLConfig`.
        pictures: `Qwen2VLImageProcessor`; its sizes and colours are those of videos too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}), encoding="utf-8")
    known = pictures.to_dict()
    kept = {name: known[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
    kept |= {"image_mean": list(known["image_mean"]), "image_std": list(known["image_std"])}
    kept |= {"min_pixels": known["size"]["shortest_edge"], "max_pixels": known["size"]["longest_edge"]}
    kept |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_flat(config)), encoding="utf-8")


def _flat(config: Any) -> dict[str, Any]:
    """The configuration as the hub has it: the language model's entries at the top, positions as `rope_scaling`."""
    both = config.to_dict()
    text = {name: both["text_config"][name] for name in both["text_config"] if name in _TEXT}
    rope = both["text_config"]["rope_parameters"]
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    tokens = {name: value for name, value in both.items() if name.endswith("_token_id")}
    vision = {name: value for name, value in both["vision_config"].items() if name in _VISION}
    return {"model_type": "qwen2_vl", "tie_word_embeddings": False, **text, **tokens, "vision_config": vision}


def tiny_state(config: Any, head: nn.Module, extra_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names of the hub: no `language_model`, no `model.visual`, a vocabulary head."""
    from transformers import Qwen2VLModel

    from alignkit.rewards.random_weights import random_network

    config.text_config.vocab_size += extra_tokens
    network = random_network(lambda: nn.ModuleDict({"model": Qwen2VLModel._from_config(config), "rm_head": head}), seed)
    state = network.state_dict()
    embedding = state["model.language_model.embed_tokens.weight"]
    return {**published_names(state), "lm_head.weight": embedding.clone()}
