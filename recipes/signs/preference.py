"""A tiny open_clip dual encoder that prefers the sign its prompt asks for, legible and rightly spelt.

What `recipes/sign_preference.py` trains: the scorer, its examples and its loss. Saved in open_clip's own layout, it
loads with `open_clip.create_model_and_transforms("local-dir:FOLDER")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from alignkit import Prompt
from alignkit.objectives.preference import softmax_preference
from alignkit.rewards.loading import load_file
from alignkit.shipped import path

world = load_file(path("recipes", "signs", "world.py"))

SPELLING = ("misspelt", "transposed", "other word")
LOOKS = ("defocused", "other colour", "low contrast")  # learnt at once, so a training prompt has one of them
FLAWS = (*SPELLING, *LOOKS)
CONTRAST = (0.1, 0.3)  # of the letters against the ground, in low-contrast signs
SOFTNESS = (0.0, 0.9)  # pixels of blur on every picture: what the generator's decoder draws is never crisp
GRAIN = 0.03  # standard deviation of the noise on every picture
PLACES = 9  # where a letter can stand in a word that is centred: half a cell apart, five letters fill 1, 3, 5, 7, 9
COLUMN = 4  # pixels, the width of a patch
NO_LETTER = len(world.LETTERS)
READING_STEPS = 600  # before anything is preferred: the two losses at once learn neither
SHARPNESS = 10.0  # factor of the embeddings that are read
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        # Patches are columns as high as the sign, three to a letter.
        "vision_cfg": {
            "image_size": [world.HEIGHT, world.WIDTH],
            "patch_size": [world.HEIGHT, COLUMN],
            "width": 96,
            "layers": 3,
            "head_width": 32,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 0,  # set below, with the tokenizer
            "hf_tokenizer_name": ".",
            "tokenizer_kwargs": {"clean": "whitespace"},
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the template, each colour, and each capital letter at each of its places.

    "CAT" becomes 3C 5A 7T, the places of its letters on a sign: with plain letters the two towers learnt within the
    time there is which letters a sign has, and not in which order. The end token is the last id.
    """
    starts = [(f'(?<=")(?=[A-Z]{{{count}}}")', str(6 - count)) for count in (3, 4, 5)]
    steps = [(f"(?<={place}[A-Z])(?=[A-Z])", str(place + 2)) for place in range(1, PLACES - 1)]
    words = dict.fromkeys(re.findall(r"[a-z]+", world.prompt_for("", " ".join(world.COLOURS))))
    letters = [f"{place}{letter}" for place in range(1, PLACES + 1) for letter in world.LETTERS]
    pieces = ["<pad>", "<start>", "<unknown>", '"', *words, *world.LETTERS, *letters, "<end>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unknown>"))
    rules = [normalizers.Replace(Regex(pattern), place) for pattern, place in (*starts, *steps)]
    tokenizer.normalizer = normalizers.Sequence(rules)
    split = Regex(r'[a-z]+|[1-9]?[A-Z]|"|\S')
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="removed", invert=True)
    ends = [("<start>", pieces.index("<start>")), ("<end>", pieces.index("<end>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=ends)
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class SignPreference(nn.Module):
    """The dual encoder, and heads that read, which only help while it is trained.

    `spelling` and `colours` say what a picture shows and what a prompt asks for, from the embeddings that are compared;
    they learn from prompts, and pictures have to be embedded so that they can be read in the same way. `letters` reads
    columns of the picture.
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        CONFIG["model_cfg"]["text_cfg"]["vocab_size"] = len(self.tokenizer)
        self.clip = open_clip.CLIP(**CONFIG["model_cfg"])
        self.spelling = nn.Linear(CONFIG["model_cfg"]["embed_dim"], PLACES * (NO_LETTER + 1))
        self.colours = nn.Linear(CONFIG["model_cfg"]["embed_dim"], len(world.COLOURS))
        self.letters = nn.Linear(CONFIG["model_cfg"]["vision_cfg"]["width"], PLACES * NO_LETTER + 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        mean, std = (torch.tensor(CONFIG["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def image(self, media: Tensor) -> Tensor:
        """(B, D) of (B, 3, H, W) in [0, 1], not normalised."""
        return self.clip.encode_image((media - self.mean) / self.std)

    def image_and_columns(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and (B, W / COLUMN, width) features of the picture's columns."""
        visual = self.clip.visual
        visual.output_tokens = True
        try:
            return visual((media - self.mean) / self.std)
        finally:
            visual.output_tokens = False

    def text(self, prompts: Sequence[str]) -> Tensor:
        """(B, D), of length 1."""
        length = CONFIG["model_cfg"]["text_cfg"]["context_length"]
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids
        return self.clip.encode_text(torch.tensor(ids, device=self.mean.device), normalize=True)

    def forward(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) exp(logit_scale) cos(image, text)."""
        cosine = torch.einsum("bd,bd->b", F.normalize(self.image(media), dim=-1), self.text(prompts))
        return self.clip.logit_scale.exp() * cosine

    def after_step(self, step: int) -> None:
        """Counts, and keeps CLIP's own limit of the scale."""
        with torch.no_grad():
            self.steps += 1
            self.clip.logit_scale.clamp_(0, np.log(100))

    def save(self, folder: Path) -> None:
        """open_clip's checkpoint, float16, with its tokenizer; the spelling head is left out."""
        state = {name: value.detach().cpu().half().contiguous() for name, value in self.clip.state_dict().items()}
        save_file(state, str(folder / "open_clip_model.safetensors"), metadata={"format": "pt"})
        (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", "utf-8")
        self.tokenizer.save_pretrained(folder)


def scorer() -> SignPreference:
    return SignPreference()


def flawed(kind: str, word: str, colour: str, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
    """(the sign, its pixels (H, W, 3) uint8): what the prompt asks for with one flaw, none where `kind` is ""."""
    says, defocus = word, 0.0
    if kind == "misspelt":
        says = _unlike(word, lambda: world.misspell(word, rng))
    elif kind == "transposed":
        says = transposed(word)
    elif kind == "other word":
        says = _unlike(word, lambda: world.pretraining_word(rng))
    elif kind == "other colour":
        colour = _unlike(colour, lambda: list(world.COLOURS)[rng.integers(len(world.COLOURS))])
    elif kind == "defocused":
        defocus = float(rng.uniform(*world.DEFOCUS_PIXELS))
    sign = world.random_sign(rng, says, colour, defocus=defocus)
    pixels = world.draw(sign)
    if kind == "low contrast":
        ground = world.draw(replace(sign, word="")).astype(np.float32)
        pixels = (ground + rng.uniform(*CONTRAST) * (pixels - ground)).round().astype(np.uint8)
    return sign, pixels


def transposed(word: str) -> str:
    """The last two letters exchanged, as the generator does; where they are the same, the last two that differ."""
    for i in range(len(word) - 1, 0, -1):
        if word[i] != word[i - 1]:
            return word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :]
    return word[:-1] + ("A" if word[-1] != "A" else "B")


def training_word(rng: np.random.Generator) -> str:
    """Never a held-out word, nor one that the exchange of two letters makes one."""
    while transposed(word := world.pretraining_word(rng)) in _held_out():
        pass
    return word


def _unlike(given: str, draw: Any) -> str:
    while (found := draw()) == given or found in _held_out():
        pass
    return found


@cache
def _held_out() -> frozenset[str]:
    return frozenset(world.split_words()[1])


class Contests:
    """For each prompt its right sign first, then signs with one flaw each.

    Args:
        shuffled: the control. Signs get the prompt of other signs, and what they are said to show, and which of them is
            preferred, is drawn at random.
        held_out_words: how many words the measures use; None: all 120.
    """

    def __init__(self, shuffled: bool = False, held_out_words: int | None = None) -> None:
        self.shuffled = shuffled
        colours = list(world.COLOURS)
        words = world.split_words()[1][:held_out_words]
        self.prompts = [Prompt(world.prompt_for(w, colours[i % len(colours)]), i) for i, w in enumerate(words)]
        rng = np.random.default_rng([0, 1])
        kinds = ("", *FLAWS)
        drawn = [[flawed(k, w, colours[i % len(colours)], rng)[1] for k in kinds] for i, w in enumerate(words)]
        self.media = as_media(np.stack([np.stack(row) for row in drawn]))

    def batch(self, size: int, rng: torch.Generator) -> dict[str, Any]:
        """Tensors of B prompts with G signs each.

        media (B, G, 3, H, W); right (B,) which is preferred; says (B, G, PLACES) and columns (B, G, W / COLUMN), the
        letters of the signs and at the middle of their columns; shown (B, G) and asked (B,) colours; prompts, B times
        the prompt and one for each sign with another word; words (B, 1 + len(SPELLING), PLACES), their letters.
        """
        own = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        names, rows = list(world.COLOURS), []
        for _ in range(size):
            word, colour = training_word(own), names[own.integers(len(names))]
            kinds = ("", *SPELLING, LOOKS[own.integers(len(LOOKS))])
            drawn = [flawed(kind, word, colour, own) for kind in kinds]
            words = [sign.word for sign, _ in drawn[: 1 + len(SPELLING)]]
            rows.append((drawn, words, [world.prompt_for(w, colour) for w in words], names.index(colour)))
        signs = [[sign for sign, _ in drawn] for drawn, *_ in rows]
        media = softened(as_media(np.stack([np.stack([p for _, p in drawn]) for drawn, *_ in rows])), rng)
        says = torch.tensor([[letters(sign.word) for sign in row] for row in signs])
        columns = torch.tensor([[letters_by_column(sign) for sign in row] for row in signs])
        shown = torch.tensor([[names.index(sign.colour) for sign in row] for row in signs])
        right, asked = torch.zeros(size, dtype=torch.long), list(range(size))
        if self.shuffled:
            right = torch.randint(media.shape[1], (size,), generator=rng)
            asked = torch.randperm(size, generator=rng).tolist()
            other = torch.randperm(size, generator=rng)
            says, columns, shown = says[other], columns[other], shown[other]
        return {
            "media": media,
            "right": right,
            "says": says,
            "columns": columns,
            "shown": shown,
            "asked": torch.tensor([rows[i][3] for i in asked]),
            "prompts": [rows[i][2] for i in asked],
            "words": torch.tensor([[letters(word) for word in rows[i][1]] for i in asked]),
        }

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Share of held-out prompts whose right sign beats the flawed one, by flaw and over all flaws; strictly."""
        count = self.media.shape[1]
        repeated = [prompt for prompt in self.prompts for _ in range(count)]
        scores = rearrange(model(rearrange(self.media, "b g c h w -> (b g) c h w"), repeated), "(b g) -> b g", g=count)
        won = scores[:, :1] > scores[:, 1:]
        by_flaw = {f"beats {flaw}": float(won[:, i].float().mean()) for i, flaw in enumerate(FLAWS)}
        return {"pair accuracy": float(won.float().mean()), **by_flaw}


def as_media(pixels: np.ndarray) -> Tensor:
    """(..., 3, H, W) in [0, 1] of (..., H, W, 3) uint8."""
    return rearrange(torch.from_numpy(pixels), "... h w c -> ... c h w").float() / 255


def softened(media: Tensor, rng: torch.Generator) -> Tensor:
    """Blur and grain, the same blur for all signs of one prompt, so that neither tells right from wrong."""
    sigma = SOFTNESS[0] + (SOFTNESS[1] - SOFTNESS[0]) * torch.rand(len(media), generator=rng)
    reach = torch.arange(-2, 3)
    kernel = torch.exp(-0.5 * (reach / sigma.clamp_min(0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    flat = rearrange(media, "b g c h w -> 1 (b g c) h w")
    each = repeat(kernel, "b k -> (b n) 1 k", n=media.shape[1] * media.shape[2])
    flat = F.pad(flat, (2, 2, 2, 2), mode="replicate")
    flat = F.conv2d(flat, each[:, :, None, :], groups=len(each))
    flat = F.conv2d(flat, each[:, :, :, None], groups=len(each))
    blurred = flat.reshape(media.shape)
    return (blurred + GRAIN * torch.randn(blurred.shape, generator=rng)).clamp(0, 1)


def letters(word: str) -> list[int]:
    """The letter at each place, 0 = A."""
    at = {PLACES // 2 + 2 * i + 1 - len(word): letter for i, letter in enumerate(word)}
    return [world.LETTERS.index(at[place]) if place in at else NO_LETTER for place in range(PLACES)]


def letters_by_column(sign: Any) -> list[int]:
    """What stands at the middle of each column: letter and place together, so that columns learn to bind the two."""
    count, start = len(sign.word), (world.WIDTH - world.CELL * len(sign.word)) // 2 + sign.offset[0]
    at = [(x - start) // world.CELL for x in range(COLUMN // 2, world.WIDTH, COLUMN)]
    inside = [(PLACES // 2 + 2 * i + 1 - count, sign.word[i]) if 0 <= i < count else None for i in at]
    return [PLACES * NO_LETTER if one is None else one[0] * NO_LETTER + world.LETTERS.index(one[1]) for one in inside]


def loss(model: SignPreference, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Softmax over the images of a prompt, over the prompts of an image, and reading.

    A prompt's images are its own signs and the preferred signs of the other prompts; an image's prompts are its own,
    the same with other words, and those of the other images.
    """
    media, right = batch["media"], batch["right"]
    size, count = media.shape[:2]
    embedded, columns = model.image_and_columns(rearrange(media, "b g c h w -> (b g) c h w"))
    flat = F.normalize(embedded, dim=-1)
    images = rearrange(flat, "(b g) d -> b g d", b=size)
    texts = model.text([prompt for prompts in batch["prompts"] for prompt in prompts])
    prompts = rearrange(texts, "(b n) d -> b n d", b=size)
    rows, scale = torch.arange(size), model.clip.logit_scale.exp()
    preferred = images[rows, right]
    own = scale * torch.einsum("bgd,bd->bg", images, prompts[:, 0])
    named = scale * torch.einsum("bd,bnd->bn", preferred, prompts)
    across = (scale * prompts[:, 0] @ preferred.T).masked_fill(torch.eye(size, dtype=torch.bool), -torch.inf)
    of_images = -torch.cat([own, across], dim=1).log_softmax(dim=1)[rows, right].mean()
    of_prompts = -torch.cat([named, across.T], dim=1).log_softmax(dim=1)[:, 0].mean()
    spelt = rearrange(as_prompts_are_read(model.spelling, flat, texts), "n (l k) -> n k l", l=PLACES)
    says, words = (rearrange(batch[name], "b g l -> (b g) l") for name in ("says", "words"))
    coloured = as_prompts_are_read(model.colours, flat, prompts[:, 0])
    colours = torch.cat([batch["shown"].flatten(), batch["asked"]])
    seen = rearrange(model.letters(columns), "n w k -> n k w")
    shown = rearrange(batch["columns"], "b g l -> (b g) l")
    reading = F.cross_entropy(spelt, torch.cat([says, words])) + F.cross_entropy(seen, shown)
    reading = reading + F.cross_entropy(coloured, colours)
    with torch.no_grad():
        right_letters = (spelt.argmax(dim=1) == torch.cat([says, words])).float().mean(dim=1)
        logs = {
            "accuracy": float((own.argmax(dim=1) == right).float().mean()),
            "among_own": float(softmax_preference(own, F.one_hot(right, count).float()).mean()),
            "image_letters": float(right_letters[: len(says)].mean()),
            "prompt_letters": float(right_letters[len(says) :].mean()),
            "column_letters": float((seen.argmax(dim=1) == shown).float().mean()),
            "colours": float((coloured.argmax(dim=1) == colours).float().mean()),
        }
    preference = of_images + of_prompts if int(model.steps) >= READING_STEPS else 0.0
    return reading + preference, logs


def as_prompts_are_read(head: nn.Linear, images: Tensor, texts: Tensor) -> Tensor:
    """Logits of images, then of texts; the head learns from the texts alone. Both of length 1."""
    of_images = F.linear(SHARPNESS * images, head.weight.detach(), head.bias.detach())
    return torch.cat([of_images, head(SHARPNESS * texts)])
