"""ImageReward: a BLIP text encoder that looks at the picture, and a linear head on its first token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torchvision.transforms.v2 import functional as TF

from alignkit.rewards.aesthetic import LinearHead
from alignkit.rewards.blip_weights import TINY, to_published, to_transformers, vision_config
from alignkit.rewards.card import Card
from alignkit.rewards.dual_encoder import distinct, fill
from alignkit.rewards.fit import fit
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.tensor_files import named, read_tensors
from alignkit.rewards.weights import DTYPES, Files, frozen, locate, on
from alignkit.types import Prompt

CHECKPOINT, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
TOKENIZER = ("vocab.txt|tokenizer.json", "tokenizer_config.json|vocab.txt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, as in the authors' ImageReward.py
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's CLIP
MAX_TOKENS = 35


class ImageRewardNetwork(nn.Module):
    """BLIP's image encoder, its text encoder with cross-attention, and the head, which stays in float32."""

    def __init__(self, vision: Any, text: Any, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.mlp = vision, text, head

    def forward(self, pixel_values: torch.Tensor, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B,) raw scores from normalised images, token ids (B, m) and their mask."""
        patches = self.vision(pixel_values=pixel_values).last_hidden_state
        words = self.text(input_ids=tokens, attention_mask=attention_mask, encoder_hidden_states=patches)
        return self.mlp(words.last_hidden_state[:, 0].float())


def normalised(raw: torch.Tensor) -> torch.Tensor:
    """Reward of mean 0 and variance 1 on the authors' training set, from the head's raw score."""
    return (raw - MEAN) / STD


@dataclass(frozen=True, eq=False)
class ImageReward:
    """What people prefer of the pictures of a prompt, ImageReward: a BLIP model with a linear head, normalised.

    Xu et al., 2304.05977. Prompts are cut to 35 BERT tokens.

    Attributes:
        weights: hub id or folder with `ImageReward.pt` and `med_config.json`.
        tokenizer: hub id or folder of BERT's tokenizer.
        dtype: of BLIP, "float32", "bfloat16" or "float16"; head and scores are float32.
    """

    name: str = "image_reward"
    weights: str = "THUDM/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"
    dtype: str = "float32"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people prefer this picture of the prompt",
        range="about -2 to 2",
        licence="Apache-2.0",
        cost="446 M parameters, 1.8 GB",
        source="2304.05977",
    )

    def files(self) -> tuple[Files, ...]:
        """Weights with the text encoder's configuration, then BERT's tokenizer."""
        return (Files(self.weights, (CHECKPOINT, TEXT_CONFIG)), Files(self.tokenizer, TOKENIZER))

    @cached_property
    def network(self) -> ImageRewardNetwork:
        weights, _ = self.files()
        folder = locate(weights)
        config = json.loads(named(folder, TEXT_CONFIG).read_text(encoding="utf-8"))
        state = to_transformers(read_tensors(folder, CHECKPOINT))
        network = empty_network(config, vision_config(state))
        fill(network, state, self.weights)
        for part in (network.vision, network.text):
            frozen(part, self.dtype)
        frozen(network.mlp)
        return network

    @cached_property
    def words(self) -> Any:
        """The tokenizer itself."""
        from transformers import AutoTokenizer

        _, tokenizer = self.files()
        return AutoTokenizer.from_pretrained(locate(tokenizer))

    def prepare(self) -> None:
        """Read the weights now; raises what the first call would raise."""
        _ = self.network, self.words

    def pixels(self, media: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S): shorter side to the network's size (224), centre cut out, CLIP's mean and std."""
        size = self.network.vision.config.image_size
        return TF.normalize(fit(media.float(), (size, size)), IMAGE_MEAN, IMAGE_STD).to(DTYPES[self.dtype])

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) float32."""
        if not len(prompts):
            return media.float().sum(dim=(1, 2, 3))
        network = on(self.network, media.device)
        texts, rows = distinct(prompts)
        tokens = self.words(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(media.device)
        return normalised(network(self.pixels(media), tokens.input_ids[rows], tokens.attention_mask[rows]))

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random network of 64 dimensions with a vocabulary of characters, in the published layout."""
        letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
        (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
        config = {**TINY, "vocab_size": len(pieces)}
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
        network = random_network(lambda: empty_network(config, {**vision, "image_size": 32, "patch_size": 8}))
        torch.save(to_published(network.state_dict()), folder / CHECKPOINT)
        (folder / TEXT_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        return {"weights": str(folder), "tokenizer": str(folder)}


def empty_network(text: dict[str, Any], vision: dict[str, Any]) -> ImageRewardNetwork:
    """The network, weights not yet read.

    Args:
        text: what `med_config.json` says of the text encoder. Its `encoder_width` is not the width of ViT-L: the
            published code replaces it by the image encoder's, and so does this.
        vision: keywords of transformers' `BlipVisionConfig`.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    same += ("layer_norm_eps", "max_position_embeddings", "vocab_size", "pad_token_id")
    # A "decoder" of BLIP is a text encoder with cross-attention; its attention is causal only when it is called so.
    config = BlipTextConfig(
        **{name: text[name] for name in same},
        is_decoder=True,
        encoder_hidden_size=vision["hidden_size"],
        bos_token_id=None,  # it writes no text; the defaults need BERT's own vocabulary
        eos_token_id=None,
        sep_token_id=None,
    )
    return ImageRewardNetwork(
        BlipVisionModel(BlipVisionConfig(**vision, hidden_act="gelu", layer_norm_eps=1e-6)),
        BlipTextModel(config, add_pooling_layer=False),
        LinearHead(config.hidden_size),
    )
