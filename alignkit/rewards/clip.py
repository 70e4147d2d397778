"""CLIPScore and PickScore: cosine rewards on transformers' CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from alignkit.rewards.card import Card
from alignkit.rewards.dual_encoder import DualEncoder, refuse_incomplete
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.weights import Files, frozen, locate

MODEL = ("config.json", "model*.safetensors")
IMAGES = ("preprocessor_config.json",)
TEXTS = ("tokenizer.json|vocab.json", "tokenizer_config.json|merges.txt|special_tokens_map.json")


class CLIPTowers:
    """A CLIP model of transformers with its own image processor and tokenizer.

    Texts are cut to the model's number of positions (77), with the end token kept, by the tokenizer's own rule.
    """

    def __init__(self, network: Any, images: Any, tokenizer: Any) -> None:
        self.network: Any = network
        self.images = images
        self.tokenizer = tokenizer

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.network.logit_scale

    def image(self, media: torch.Tensor) -> torch.Tensor:
        """(B, D) from (B, 3, H, W) in [0, 1]."""
        values = pixels(self.images, media, self.network.visual_projection.weight.dtype)
        return self.network.get_image_features(values).pooler_output

    def text(self, texts: list[str], device: torch.device) -> torch.Tensor:
        """(B, D)."""
        longest = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return self.network.get_text_features(**tokens.to(device)).pooler_output


def pixels(images: Any, media: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an image processor of transformers (torchvision backend) makes of (B, 3, H, W) in [0, 1]; differentiable."""
    return images(images=media.float(), do_rescale=False, return_tensors="pt")["pixel_values"].to(dtype)


def clip_model(source: str, dtype: str) -> Any:
    """CLIP of transformers from a hub id or folder, complete and frozen.

    Raises:
        MissingWeights: they are not here.
        RewardError: tensors are missing.
    """
    from transformers import CLIPModel

    folder = locate(Files(source, MODEL))
    loaded: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    model, report = loaded
    refuse_incomplete(report["missing_keys"], source, "CLIPModel")
    return frozen(model, dtype)


def image_processor(source: str) -> Any:
    """The image processor that is published with a model, on tensors and differentiable."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(locate(Files(source, IMAGES)))


def clip_towers(weights: str, processor: str, dtype: str) -> CLIPTowers:
    """Model from `weights`, image processor and tokenizer from `processor`."""
    from transformers import AutoTokenizer

    network = clip_model(weights, dtype)
    tokenizer = AutoTokenizer.from_pretrained(locate(Files(processor, TEXTS)))
    return CLIPTowers(network, image_processor(processor), tokenizer)


@dataclass(frozen=True, eq=False)
class CLIPScore(DualEncoder):
    """How well the picture fits the prompt, by OpenAI's CLIP: 100 cos(image, text) / 30.

    Hessel et al., 2104.08718, for the cosine; the scale is flow_grpo's. Prompts are cut to 77 tokens.

    Attributes:
        weights: hub id or folder of a transformers CLIP.
        dtype: of the network, "float32", "bfloat16" or "float16"; scores are float32.
    """

    name: str = "clip_score"
    weights: str = "openai/clip-vit-large-patch14"
    dtype: str = "float32"
    card: ClassVar[Card] = Card(
        family="preference",
        summary="the picture fits the prompt",
        range="about 0.9, at most 3.33",
        licence="MIT (code); none stated for the weights",
        cost="428 M parameters, 1.7 GB",
        source="2104.08718; scale of flow_grpo",
    )

    def files(self) -> tuple[Files, ...]:
        """Weights, image processor and tokenizer."""
        return (Files(self.weights, (*MODEL, *IMAGES, *TEXTS)),)

    def load(self) -> CLIPTowers:
        """Read the weights."""
        return clip_towers(self.weights, self.weights, self.dtype)

    def scaled(self, cosine: torch.Tensor) -> torch.Tensor:
        """(B,)."""
        return 100 * cosine / 30

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random CLIP of 32 dimensions with a tokenizer of characters."""
        write_tiny_clip(folder)
        return {"weights": str(folder)}


@dataclass(frozen=True, eq=False)
class PickScore(DualEncoder):
    """What people picked of two pictures of their prompt: exp(logit_scale) cos(image, text).

    Kirstain et al., 2305.01569. exp(logit_scale) is close to 100. Prompts are cut to 77 tokens.

    Attributes:
        weights: hub id or folder of the fine-tuned CLIP-H.
        processor: hub id or folder of its image processor and tokenizer, which are CLIP-H's own.
        divisor: the score is divided by it; flow_grpo uses 26, for scores near 0.85.
        dtype: of the network, "float32", "bfloat16" or "float16"; scores are float32.
    """

    name: str = "pickscore"
    weights: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    divisor: float = 1.0
    dtype: str = "float32"
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people would pick this picture for the prompt",
        range="about 18 to 24",
        licence="MIT (code); none stated for the weights",
        cost="986 M parameters, 3.9 GB",
        source="2305.01569",
    )

    def files(self) -> tuple[Files, ...]:
        """Weights, then image processor and tokenizer."""
        return (Files(self.weights, MODEL), Files(self.processor, (*IMAGES, *TEXTS)))

    def load(self) -> CLIPTowers:
        """Read the weights."""
        return clip_towers(self.weights, self.processor, self.dtype)

    def scaled(self, cosine: torch.Tensor) -> torch.Tensor:
        """(B,)."""
        return self.towers.logit_scale.float().exp() * cosine / self.divisor

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random CLIP of 32 dimensions with a tokenizer of characters."""
        write_tiny_clip(folder)
        return {"weights": str(folder), "processor": str(folder)}


def write_tiny_clip(folder: Path) -> None:
    """A random CLIP with image processor and tokenizer in transformers' layout, under 0.3 MB."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(pieces), "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config={**tower, **text, "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=32,
        logit_scale_init_value=4.6,
    )
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    random_network(lambda: CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
