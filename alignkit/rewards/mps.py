"""Multi-dimensional Preference Score: CLIP-H whose image tokens look at the words that matter for a criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from alignkit.rewards.card import Card
from alignkit.rewards.clip import IMAGES, TEXTS, image_processor, pixels, write_tiny_clip
from alignkit.rewards.dual_encoder import cosines, distinct, fill
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.tensor_files import read_tensors
from alignkit.rewards.weights import Files, frozen, locate, on
from alignkit.types import Prompt

OVERALL = (  # the words of the released model's criterion; other criteria's models are not public
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
LAYERS, HEAD_WIDTH, EXPANSION, RELEVANT = 4, 64, 4, 0.01


class Gated(nn.Module):
    """silu(gate) * x, of the two halves of the last axis (SwiGLU, 2002.05202)."""

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """(..., n) from (..., 2 n)."""
        x, gate = both.chunk(2, dim=-1)
        return F.silu(gate) * x


class Rotary(nn.Module):
    """Angles of rotary positions (2104.09864); the frequencies are in the published file."""

    inv_freq: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, width, 2) / width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n, d) turned by its position."""
        angles = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), self.inv_freq.float())
        angles = repeat(angles, "n d -> n (twice d)", twice=2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos().to(x.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(x.dtype)


class Residual(nn.Module):
    """fn(x, ...) + x; a module only for the name `fn` in the published file."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        """Of x's shape."""
        return self.fn(x, *context) + x


class CrossAttention(nn.Module):
    """Image tokens ask the text, and beside it a feed-forward; all heads share one key and one value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner, hidden = heads * HEAD_WIDTH, EXPANSION * width
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        feed_in, feed_out = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.ff = nn.Sequential(feed_in, Gated(), feed_out)

    def forward(self, x: torch.Tensor, context: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
        """(B, n, width) from image tokens (B, n, width), text tokens (B, m, width) and bool (B, m)."""
        x = self.norm(x)
        queries = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        attended = shared_attention(queries, keys, values, relevant)
        return self.to_out(attended) + self.ff(x)


class SelfAttention(nn.Module):
    """Rotary self-attention of the image tokens and a feed-forward from one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner, hidden = heads * HEAD_WIDTH, EXPANSION * width
        self.heads = heads
        self.parts = (inner, HEAD_WIDTH, HEAD_WIDTH, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = Rotary(HEAD_WIDTH)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(Gated(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, width) from (B, n, width)."""
        queries, keys, values, fed = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        queries = self.rotary_emb(rearrange(queries, "b n (h d) -> b h n d", h=self.heads))
        return self.attn_out(shared_attention(queries, self.rotary_emb(keys), values)) + self.ff_out(fed)


def shared_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v with the same key and value for every head.

    Args:
        queries: (B, h, n, d).
        keys, values: (B, m, d).
        allowed: (B, m) bool, which keys may be looked at; at least one of each sample.

    Returns:
        (B, n, h * d).
    """
    mask = None if allowed is None else rearrange(allowed, "b m -> b 1 1 m")
    shared = (repeat(one, "b m d -> b h m d", h=queries.shape[1]) for one in (keys, values))
    return rearrange(F.scaled_dot_product_attention(queries, *shared, attn_mask=mask), "b h n d -> b n (h d)")


class CrossModel(nn.Module):
    """Four layers of cross- and self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        pairs = ((CrossAttention(width, heads), SelfAttention(width, heads)) for _ in range(LAYERS))
        self.layers = nn.ModuleList(nn.ModuleList(map(Residual, pair)) for pair in pairs)

    def forward(self, images: torch.Tensor, texts: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
        """(B, n, width) from (B, n, width), (B, m, width) and bool (B, m)."""
        for cross, own in self.layers:  # type: ignore[misc]
            images = own(cross(images, texts, relevant))
        return images


class MPSNetwork(nn.Module):
    """CLIP and the layers on top, named as in the published file."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.model = clip
        self.cross_model = CrossModel(clip.config.projection_dim)

    def texts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, m, D) features of every token and (B, D) of the end token, of padded token ids (B, m)."""
        out = self.model.text_model(input_ids=tokens)
        return self.model.text_projection(out.last_hidden_state), self.model.text_projection(out.pooler_output)

    def forward(self, pixel_values: torch.Tensor, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(B,) from normalised images, token ids (B, m) of the prompts and (1, k) of the criterion."""
        words, sentence = self.texts(tokens)
        criterion, _ = self.texts(condition)
        patches = self.model.visual_projection(self.model.vision_model(pixel_values=pixel_values).last_hidden_state)
        seen = self.cross_model(patches, words, relevant_words(words, criterion[0]))[:, 0]
        cosine = cosines(F.normalize(seen.float(), dim=-1), F.normalize(sentence.float(), dim=-1))
        return self.model.logit_scale.float().exp() * cosine


def relevant_words(words: torch.Tensor, criterion: torch.Tensor) -> torch.Tensor:
    """(B, m) bool: which words of the prompt the criterion is about.

    A word counts where its largest product with a word of the criterion is over 1 % of the largest of its sentence.
    The published code divides by the largest of the batch, which for the single prompt it was written for is the same.

    Args:
        words: (B, m, D).
        criterion: (k, D).
    """
    product = torch.einsum("bmd,kd->bmk", words, criterion).amax(dim=-1)
    return product / product.amax(dim=1, keepdim=True) > RELEVANT


@dataclass(frozen=True, eq=False)
class MPS:
    """What people prefer overall, Multi-dimensional Preference Score: exp(logit_scale) cos(seen image, text).

    Zhang et al., CVPR 2024, 2405.14705. The authors publish a pickled Python object, which is not read here; the
    default is its conversion to safetensors by the imscore project, with tensors named `mps.model.*` and
    `mps.cross_model.*`. `model.state_dict()` of the original, saved as safetensors, is read too. Prompts are cut to 77
    tokens.

    Attributes:
        weights: hub id, folder or file.
        clip: hub id or folder of CLIP-H in transformers' layout: configuration, image processor, tokenizer.
        condition: the criterion in words, of which the released model knows one.
        dtype: of the network, "float32", "bfloat16" or "float16"; scores are float32.
    """

    name: str = "mps"
    weights: str = "RE-N-Y/mpsv1"
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    condition: str = OVERALL
    dtype: str = "float32"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people prefer this picture of the prompt",
        range="[-100, 100], about 0 to 20",
        licence="MIT (code); none stated for the weights",
        cost="1.1 B parameters, 4.3 GB",
        source="2405.14705",
    )

    def files(self) -> tuple[Files, ...]:
        """The weights, then configuration, image processor and tokenizer."""
        return (Files(self.weights, ("*.safetensors",)), Files(self.clip, ("config.json", *IMAGES, *TEXTS)))

    @cached_property
    def network(self) -> MPSNetwork:
        from transformers import CLIPConfig, CLIPModel

        weights, clip = self.files()
        state = published(read_tensors(locate(weights), weights.patterns[0]))
        network = MPSNetwork(CLIPModel(CLIPConfig.from_pretrained(locate(clip))))
        fill(network, state, self.weights)
        frozen(network, self.dtype)
        for name, module in network.named_modules():
            if isinstance(module, Rotary):  # bfloat16 cannot tell the angles of 257 patches apart
                module.inv_freq = state[f"{name}.inv_freq"].float()
        return network

    @cached_property
    def images(self) -> Any:
        return image_processor(self.clip)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(locate(Files(self.clip, TEXTS)))

    def prepare(self) -> None:
        """Read the weights now; raises what the first call would raise."""
        _ = self.network, self.images, self.tokenizer

    def tokens(self, texts: list[str], device: torch.device) -> torch.Tensor:
        """(B, 77) token ids; every text is padded to the end, because the network looks at the padding too."""
        longest = self.network.model.config.text_config.max_position_embeddings
        padded = self.tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        return padded.input_ids.to(device)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) float32."""
        if not len(prompts):
            return media.float().sum(dim=(1, 2, 3))
        network = on(self.network, media.device)
        texts, rows = distinct(prompts)
        tokens = self.tokens(texts, media.device)[rows]
        values = pixels(self.images, media, self.network.model.visual_projection.weight.dtype)
        return network(values, tokens, self.tokens([self.condition], media.device))

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random network on a CLIP of 32 dimensions, in the published layout."""
        from safetensors.torch import save_file
        from transformers import CLIPConfig, CLIPModel

        write_tiny_clip(folder)
        network = random_network(lambda: MPSNetwork(CLIPModel(CLIPConfig.from_pretrained(folder))))
        (folder / "model.safetensors").unlink()
        state = {f"mps.{name}": tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        return {"weights": str(folder), "clip": str(folder)}


def published(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by this module's names: without `mps.`, and without position ids, which were once saved."""
    named = {name.removeprefix("mps."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith(".position_ids")}
