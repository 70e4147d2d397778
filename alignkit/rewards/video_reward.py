"""VideoReward: visual quality, motion quality and text alignment of videos (VideoAlign, arXiv 2501.13918)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from alignkit.errors import RecipeError
from alignkit.rewards.card import Card
from alignkit.rewards.frames import count_at_rate, uniform
from alignkit.rewards.token_head import (
    BASE_PATTERNS,
    check_for_tokens,
    current_names,
    load_state,
    load_token_reward,
    merge_lora,
    ratings,
    template_of,
    tiny_state,
    write_tiny_base,
)
from alignkit.rewards.vision_language import Chat, VisionLanguage
from alignkit.rewards.weights import Files, MissingWeights, locate
from alignkit.types import Prompt

DIMENSIONS = ("VQ", "MQ", "TA")
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
NORMALISATION = {  # mean and standard deviation on the authors' data, also in their model_config.json
    "VQ_mean": 3.6757,
    "VQ_std": 2.2476,
    "MQ_mean": 1.1646,
    "MQ_std": 1.3811,
    "TA_mean": 2.8105,
    "TA_std": 2.5121,
}
CONFIG, TEMPLATE_FILE = "model_config.json", "template.txt"
FILE = "checkpoint-*/model.pth|checkpoint-*/model.safetensors"
LEAST_PIXELS = 128 * 28 * 28  # per frame, of Qwen2-VL's videos
TEMPLATE = (
    "Rate this generated video in three respects, each on its own, from 0 (worst) to 10 (best).\n"
    "Look of single frames: sharpness, detail, light and colour, composition, bodies and objects as they should be. "
    "Visual quality: <|VQ_reward|>\n"
    "Motion: steady from frame to frame, natural, smooth, neither frozen nor flickering. "
    "Motion quality: <|MQ_reward|>\n"
    "What was asked for: {prompt}\n"
    "Subjects, what they do, place, style and camera as asked for. Text alignment: <|TA_reward|>"
)


def build_head(width: int) -> nn.Module:
    """Three ratings of every token, without bias; only those on the diagonal of tokens and ratings count."""
    return nn.Linear(width, len(DIMENSIONS), bias=False)


@dataclass(frozen=True, eq=False)
class VideoReward:
    """Weighted sum of VideoReward's visual quality (VQ), motion quality (MQ) and text alignment (TA).

    Each is read at a token of its own. The tokens of VQ and MQ stand before the prompt, so that causality keeps
    them from knowing it. Published scores come from the authors' template; the one here is alignkit's own, so scores
    are close to published ones in order and not in value. For theirs give `template` a file with their text.

    Attributes:
        weights: a hub id or folder with `model_config.json` and `checkpoint-N/model.pth` (the highest N is read).
        base: the model it was trained from, of which configuration, tokenizer and processor are read.
        template: file with the text that is asked, `{prompt}` and the three tokens once each; None: `template.txt`
            beside the settings, and where there is none, as in the authors' repository, alignkit's.
        importance: weights of VQ, MQ and TA in the score; (1, 1, 1) is the published overall score.
        normalised: subtract the means and divide by the deviations in `model_config.json`.
        media_fps: the rate at which the generator's frames are played, which they do not say themselves.
        fps: frames per second that are looked at, evenly spaced, an even number and at least 4; None: what it was
            trained with, as `model_config.json` has it (2 of the authors').
        max_frame_pixels: frames are made smaller than this, sides multiples of 28; None: likewise (448 x 448).
        batch_size: videos in one forward.
        checkpointing: recompute each batch in the backward.
        dtype: of the backbone; the head is float32.
    """

    weights: str = "KwaiVGI/VideoReward"
    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    template: str | None = None
    importance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    normalised: bool = True
    media_fps: float = 16.0
    fps: float | None = None
    max_frame_pixels: int | None = None
    batch_size: int = 2
    checkpointing: bool = False
    dtype: str = "bfloat16"
    name: str = "video_reward"

    kind = "video"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="video",
        summary="people would prefer the video for its look, its motion and its prompt",
        range="about -9 to 9, a sum of three z-scores",
        licence="Apache-2.0",
        cost="2.2 billion parameters, 5 GB in bfloat16; a GPU",
        source="2501.13918",
    )

    def __post_init__(self) -> None:
        if len(self.importance) != len(DIMENSIONS) or not any(self.importance):
            raise RecipeError(f"importance={self.importance}; expected a weight for each of {', '.join(DIMENSIONS)}")
        if self.media_fps <= 0 or (self.fps is not None and self.fps <= 0):
            raise RecipeError(f"media_fps={self.media_fps}, fps={self.fps}; expected frames per second above 0")
        if self.max_frame_pixels is not None and self.max_frame_pixels < 28 * 28:
            raise RecipeError(f"max_frame_pixels={self.max_frame_pixels}; expected at least {28 * 28}: one patch")
        if self.template is not None:
            _ = self.question

    @cached_property
    def question(self) -> str:
        """The text asked, with `{prompt}`."""
        if self.template is None and (self.folder / TEMPLATE_FILE).is_file():
            return template_of(str(self.folder / TEMPLATE_FILE), TEMPLATE, TOKENS)
        return template_of(self.template, TEMPLATE, TOKENS)

    @cached_property
    def rate(self) -> float:
        """Frames per second that are looked at."""
        return float(self.settings["data_config"]["fps"]) if self.fps is None else self.fps

    @cached_property
    def frame_pixels(self) -> int:
        """The most pixels of a frame."""
        return self.max_frame_pixels or int(self.settings["data_config"]["max_frame_pixels"])

    def files(self) -> tuple[Files, ...]:
        """The reward's weights and settings, and the base model's tokenizer and processor."""
        return Files(self.weights, (CONFIG, FILE)), Files(self.base, BASE_PATTERNS)

    @cached_property
    def folder(self) -> Path:
        """Where the reward's weights and settings are.

        Raises:
            RecipeError: `weights` names a file.
        """
        found = locate(self.files()[0])
        if found.is_file():
            raise RecipeError(f"weights={self.weights!r} is a file; expected the folder that holds {CONFIG} beside it")
        return found

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The published `model_config.json`."""
        return json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))

    @cached_property
    def normalisation(self) -> Mapping[str, float]:
        """Mean and standard deviation of each dimension; 0 and 1 with `normalised=False`.

        Raises:
            RecipeError: the weights come without.
        """
        if not self.normalised:
            return {
                f"{dimension}_{what}": value
                for dimension in DIMENSIONS
                for what, value in (("mean", 0.0), ("std", 1.0))
            }
        if "inference_config" not in self.settings:
            raise RecipeError(
                f"{CONFIG} of {self.weights!r} has no `inference_config` with the means and deviations to normalise "
                f"by; choose normalised=False or add {', '.join(NORMALISATION)}"
            )
        return {name: float(self.settings["inference_config"][name]) for name in NORMALISATION}

    @cached_property
    def reader(self) -> VisionLanguage:
        """The network; read at its first use."""
        state = merge_lora(load_state(newest_checkpoint(self.folder)), lora_scale(self.settings))
        base = locate(self.files()[1])
        options = {"batch_size": self.batch_size, "checkpointing": self.checkpointing, "fps": self.rate}
        size = {"shortest_edge": min(LEAST_PIXELS, self.frame_pixels), "longest_edge": self.frame_pixels}
        return load_token_reward(current_names(state), base, build_head, TOKENS, self.dtype, video_size=size, **options)

    def prepare(self) -> None:
        """Read the weights now."""
        _ = self.reader, self.normalisation, self.question

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError for a prompt that holds a reward token."""
        check_for_tokens(prompts, TOKENS)

    def components(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """{"VQ", "MQ", "TA"}: (B,) each, normalised as configured, of (B, T, 3, H, W); differentiable."""
        self.check_prompts(prompts)
        frames = media[:, uniform(media.shape[1], count_at_rate(media.shape[1], self.media_fps, self.rate))]
        asked = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        chats = [Chat((video, text)) for video, text in zip(frames, asked, strict=True)]
        rated = ratings(self.reader, chats, TOKENS, len(DIMENSIONS)).diagonal(dim1=1, dim2=2)  # (B, 3)
        return normalise(dict(zip(DIMENSIONS, rated.unbind(dim=1), strict=True)), self.normalisation)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) sum of the components, weighted by `importance`."""
        parts = torch.stack(list(self.components(media, prompts).values()), dim=1)
        return (parts * torch.tensor(self.importance, device=parts.device)).sum(dim=1)

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """Random weights under the published names, LoRA and all; returns the options that load them."""
        base, weights = folder / "Qwen2-VL-2B-Instruct", folder / "VideoReward"
        config = write_tiny_base(base)
        state = with_lora(tiny_state(config, build_head(config.text_config.hidden_size), len(TOKENS)), rank=4)
        (weights / "checkpoint-11352").mkdir(parents=True, exist_ok=True)
        torch.save(state, weights / "checkpoint-11352" / "model.pth")
        settings = {
            "data_config": {"fps": 2.0, "max_frame_pixels": 200704, "eval_dim": list(DIMENSIONS)},
            "model_config": {"output_dim": 3, "use_special_tokens": True, "reward_token": "special"},
            "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False},
            "inference_config": NORMALISATION,
        }
        (weights / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        options = {"weights": str(weights), "base": str(base)}
        return {**options, "max_frame_pixels": 4 * 28 * 28, "dtype": "float32"}


def normalise(parts: Mapping[str, torch.Tensor], by: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """(part - mean) / std of each dimension."""
    return {name: (part - by[f"{name}_mean"]) / by[f"{name}_std"] for name, part in parts.items()}


def newest_checkpoint(folder: Path) -> Path:
    """The weights of the highest-numbered `checkpoint-N`.

    Raises:
        MissingWeights: none has a whole model; says what an adapter alone would need.
    """
    found = [path for pattern in FILE.split("|") for path in folder.glob(pattern)]
    if not found:
        raise MissingWeights(
            f"weights {str(folder)!r} have no checkpoint-N/model.pth; a folder with adapter_model.safetensors alone "
            "holds no whole model: save it with save_full_model=True"
        )
    return max(found, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")))


def lora_scale(settings: Mapping[str, Any]) -> float | None:
    """alpha / rank (alpha / sqrt(rank) with rank stabilisation) of `model_config.json`; None without LoRA."""
    lora = settings["peft_lora_config"]
    if not lora["lora_enable"]:
        return None
    return lora["lora_alpha"] / (lora["lora_r"] ** 0.5 if lora["use_rslora"] else lora["lora_r"])


def with_lora(state: Mapping[str, torch.Tensor], rank: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """A plain state dictionary under PEFT's names, with random LoRA on the language model's linear layers."""
    rng = torch.Generator().manual_seed(seed)
    wrapped: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not name.startswith("model.layers.") or "_proj." not in name:
            wrapped[f"base_model.model.{name}"] = value
            continue
        place = f"base_model.model.{name.rpartition('.')[0]}"
        wrapped[f"{place}.base_layer.{name.rpartition('.')[2]}"] = value
        if name.endswith(".weight"):
            rows, columns = value.shape
            wrapped[f"{place}.lora_A.default.weight"] = torch.randn(rank, columns, generator=rng) * columns**-0.5
            wrapped[f"{place}.lora_B.default.weight"] = torch.randn(rows, rank, generator=rng) * rank**-0.5
    return wrapped
