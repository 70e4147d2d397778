"""A tiny DINO: a vision transformer that learns what signs look like from unlabelled signs.

What `recipes/sign_features.py` trains. Saved in transformers' layout, it loads with `AutoModel.from_pretrained` and
`AutoImageProcessor.from_pretrained`, which keeps the pictures at 24 x 64.

Two views of a sign differ in colour and grain alone, so every token, patches too, has its counterpart at the same
place; each token of the student predicts the teacher's class of that counterpart. With crops and class tokens alone, as
DINO has them, nothing but brightness was learnt in the minutes that this may take.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from alignkit.rewards.dino import pooled, similarities
from alignkit.rewards.features import Features, normalised
from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.examples import ViewBatch
from alignkit.training.self_distillation import SelfDistilled

world = load_file(path("recipes", "signs", "world.py"))

PATCH, WIDTH, LAYERS, HEADS = 8, 64, 3, 2
CLASSES, BOTTLENECK = 64, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SATURATION, CONTRAST, BRIGHTNESS, GRAIN = (0.0, 1.3), (0.6, 1.2), (0.3, 0.7), 0.03  # of a view
DEFOCUSED = 0.1  # share of signs
NEIGHBOURS, STYLE_NEIGHBOURS = 10, 4
REFERENCES = 12  # of a style, in each colour


class Head(nn.Module):
    """DINO's projection: (B, N, WIDTH) -> (B * N, CLASSES) cosines with one vector per class.

    Tokens of one place are standardised over the batch first. Class tokens of an untrained transformer hardly differ
    between pictures, and patches differ most by their place, which all views have in common.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, BOTTLENECK))
        self.classes = nn.Parameter(torch.randn(CLASSES, BOTTLENECK))

    def forward(self, tokens: Tensor) -> Tensor:
        spread = F.batch_norm(rearrange(tokens, "b n d -> b (n d)"), None, None, training=True)
        inner = self.inner(rearrange(spread, "b (n d) -> (b n) d", d=WIDTH))
        return F.normalize(inner, dim=-1) @ F.normalize(self.classes, dim=-1).T


class Network(nn.Module):
    """The vision transformer and its head."""

    def __init__(self) -> None:
        super().__init__()
        # Positions are a square that the model interpolates to each view's size, as with DINOv2's own weights.
        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=4 * PATCH,
            patch_size=PATCH,
            layerscale_value=1.0,
        )
        self.backbone = Dinov2Model(config)
        self.head = Head()

    def tokens(self, media: Tensor) -> Tensor:
        """(B, 1 + N, WIDTH) of (B, 3, h, w) in [0, 1], class token first."""
        mean, std = (torch.tensor(value, device=media.device)[:, None, None] for value in (MEAN, STD))
        return self.backbone(pixel_values=(media - mean) / std).last_hidden_state

    def forward(self, view: Tensor) -> Tensor:
        return self.head(self.tokens(view))


class SignFeatures(SelfDistilled):
    """Student and teacher; the teacher is what is measured and saved."""

    def __init__(self) -> None:
        super().__init__(Network(), CLASSES, momentum=0.98, teacher_temperature=0.02, balance="sinkhorn")

    def save(self, folder: Path) -> None:
        """transformers' checkpoint, float16, and the configuration of its image processor."""
        backbone = Dinov2Model(self.teacher.backbone.config)
        backbone.load_state_dict(self.teacher.backbone.state_dict())
        backbone.half().save_pretrained(folder)
        # What a plain `from_pretrained` loads, in whatever dtype its caller computes, is float32.
        config = folder / "config.json"
        config.write_text(config.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")
        plain = {"do_resize": False, "do_center_crop": False, "image_mean": list(MEAN), "image_std": list(STD)}
        BitImageProcessor(**plain, do_convert_rgb=True).save_pretrained(folder)


def scorer() -> SignFeatures:
    return SignFeatures()


class UnlabelledSigns:
    """Views of signs for training; signs with known properties only to measure what the features tell apart."""

    def __init__(self) -> None:
        train_words, held_out = world.split_words()
        self.known = labelled(train_words, 720, seed=1)
        self.asked = labelled(held_out, 360, seed=2)
        self.pairs = font_pairs(held_out, seed=3)
        self.references = [style_references(train_words, font, seed=4) for font in world.FINAL.fonts]

    def batch(self, size: int, rng: torch.Generator) -> ViewBatch:
        own = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        names, drawn = list(world.COLOURS), []
        for _ in range(size):
            blur = float(own.uniform(*world.DEFOCUS_PIXELS)) if own.random() < DEFOCUSED else 0.0
            colour = names[own.integers(len(names))]
            drawn.append(world.draw(world.random_sign(own, world.pretraining_word(own), colour, defocus=blur)))
        media = as_media(drawn)
        return ViewBatch((recoloured(media, rng), recoloured(media, rng)), teacher_views=2)

    def measure(self, model: SignFeatures) -> dict[str, float]:
        """What class token and patches know of signs with held-out words.

        "near": share of signs whose NEIGHBOURS nearest training signs mostly have their colour, font or length.
        "style": share of pairs (one word, colour, shade and place in two fonts) in which the sign in the references'
        font is the more similar one, as `dino_style` measures it with pool="top_k"; the mean over references in
        either font, since features may lean towards one of them.
        """
        found: dict[str, float] = {}
        known, asked = (features(model, signs["media"]) for signs in (self.known, self.asked))
        drawn = [features(model, media) for media in self.pairs]
        folders = [features(model, media) for media in self.references]
        for use, match in (("cls", "position"), ("patches", "position")):
            near = similarities(asked, known, use, match).topk(NEIGHBOURS, dim=1).indices
            for name in ("colour", "font", "length"):
                votes = F.one_hot(self.known[name][near]).sum(dim=1)
                found[f"near {name}, {use}"] = float((votes.argmax(dim=1) == self.asked[name]).float().mean())
        for use, match in (("cls", "best"), ("patches", "position"), ("patches", "best"), ("patches", "gram")):
            won = [prefers(drawn[own], drawn[1 - own], folders[own], use, match) for own in (0, 1)]
            found[f"style, {use}" + (f" {match}" if use == "patches" else "")] = sum(won) / 2
        return found


def prefers(own: Features, other: Features, references: Features, use: str, match: str) -> float:
    """Share of pairs in which the sign in the references' font is the more similar one to its nearest references."""
    own_score, other_score = (
        pooled(similarities(signs, references, use, match), "top_k", STYLE_NEIGHBOURS) for signs in (own, other)
    )
    return float((own_score > other_score).float().mean())


def features(model: SignFeatures, media: Tensor) -> Features:
    """As `alignkit.rewards` makes them of the saved model."""
    tokens = normalised(torch.cat([model.teacher.tokens(part) for part in media.split(256)]))
    return Features(tokens[:, 0], tokens[:, 1:])


def as_media(pictures: list[np.ndarray]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w").float() / 255


def font_pairs(words: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """The same signs in the first and in the second font."""
    rng, colours, fonts = np.random.default_rng([seed, 5]), list(world.COLOURS), world.FINAL.fonts
    signs = [world.random_sign(rng, word, colours[rng.integers(len(colours))]) for word in words]
    mono, serif = (as_media([world.draw(replace(sign, font=font)) for sign in signs]) for font in fonts)
    return mono, serif


def style_references(words: list[str], font: str, seed: int) -> Tensor:
    """Signs of training words in one font, REFERENCES in each colour."""
    rng = np.random.default_rng([seed, 5])
    chosen = [(words[rng.integers(len(words))], colour) for colour in world.COLOURS for _ in range(REFERENCES)]
    return as_media([world.draw(replace(world.random_sign(rng, *one), font=font)) for one in chosen])


def labelled(words: list[str], count: int, seed: int) -> dict[str, Tensor]:
    """{"media"} of signs, and the numbers of their "colour", "font" and "length"."""
    rng, colours, fonts = np.random.default_rng([seed, 5]), list(world.COLOURS), list(world.FINAL.fonts)
    chosen = [words[rng.integers(len(words))] for _ in range(count)]
    signs = [world.random_sign(rng, word, colours[rng.integers(len(colours))]) for word in chosen]
    return {
        "media": as_media([world.draw(sign) for sign in signs]),
        "colour": torch.tensor([colours.index(sign.colour) for sign in signs]),
        "font": torch.tensor([fonts.index(sign.font) for sign in signs]),
        "length": torch.tensor([len(sign.word) - 3 for sign in signs]),
    }


def recoloured(media: Tensor, rng: torch.Generator) -> Tensor:
    """A view: random hue, saturation, contrast and brightness of each picture, and grain; shapes stay."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(media), 1, 1, 1, generator=rng)

    turned = torch.einsum("bdc,bchw->bdhw", hue_turns(2 * torch.pi * uniform(0, 1)[:, 0, 0, 0]), media)
    grey = turned.mean(dim=1, keepdim=True)
    coloured = grey + uniform(*SATURATION) * (turned - grey)
    level = coloured.mean(dim=(1, 2, 3), keepdim=True)
    made = uniform(*BRIGHTNESS) + uniform(*CONTRAST) * (coloured - level)
    return (made + GRAIN * torch.randn(made.shape, generator=rng)).clamp(0, 1)


def hue_turns(angle: Tensor) -> Tensor:
    """(B, 3, 3) rotations of RGB about the grey axis by (B,) radians."""
    axis = torch.full((3,), 3**-0.5)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * 3**-0.5
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along = repeat(torch.outer(axis, axis), "i j -> b i j", b=len(angle))
    return cosine * torch.eye(3) + sine * across + (1 - cosine) * along
