"""The base of the video reward: a tiny Qwen2-VL that can say what it sees in clips of moving shapes.

What `shapes_reward:base` trains, before anything is preferred: VideoReward starts from a Qwen2-VL that knows what it
sees, and so does ours. Qwen2-VL's own classes with our sizes, and a tokenizer of our words.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alignkit import Prompt
from alignkit.rewards.frames import uniform
from alignkit.rewards.loading import load_file
from alignkit.rewards.tiny_models import VISION_TOKENS
from alignkit.rewards.token_head import INPUTS, published_names, write_base
from alignkit.rewards.vision_language import Chat, VisionLanguage
from alignkit.shipped import path
from alignkit.training.examples import LabelBatch

contests = load_file(path("recipes", "shapes", "contests.py"))
world = contests.world

PATCH, MERGE, WIDTH, LAYERS = 8, 2, 96, 3
RATE = 8.0  # frames per second, of clips and of what is looked at: all but one of 9 frames, since Qwen2-VL pairs them
PIXELS = world.SIZE**2
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
LOOKED_AT = uniform(world.FRAMES, world.FRAMES // 2 * 2)
GRAIN = 0.015  # standard deviation of the noise on every clip


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE whose only merges spell the words of the world, of questions and of answers, one token each."""
    known = [*world.COLOURS, *world.SHAPES, *contests.LOOKS, *world.DIRECTIONS, contests.ANSWER_WORDS]
    spaced = [f"Ġ{word}" for word in dict.fromkeys(" ".join(known).split())]
    symbols, merges = list(bytes_to_unicode().values()), []
    for word in (*spaced, "look", "motion"):  # those with a space first: merges of plain words would break them up
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
    pieces = dict.fromkeys([*symbols, *(a + b for a, b in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    token: Any = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "hidden_size": WIDTH,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def write_base_files(folder: Path) -> Qwen2VLConfig:
    """Configuration, tokenizer and processor of the base model; returns the configuration."""
    tokenizer = build_tokenizer()
    config, size = build_config(tokenizer), {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    pictures = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    write_base(folder, config, tokenizer, pictures, CHAT_TEMPLATE)
    return config


def softened(media: Tensor, rng: torch.Generator) -> Tensor:
    """(B, ..., 3, H, W) less crisp, by another amount in each row, and grainy: what a generator's decoder draws never
    has clean edges, and a reward should not take that for a flaw."""
    flat = rearrange(media, "b ... c h w -> b (...) c h w")
    padded = F.pad(flat, (1, 1, 1, 1, 0, 0), mode="replicate")
    rows = 0.25 * padded[..., :-2, :] + 0.5 * padded[..., 1:-1, :] + 0.25 * padded[..., 2:, :]
    blurred = 0.25 * rows[..., :-2] + 0.5 * rows[..., 1:-1] + 0.25 * rows[..., 2:]
    share = torch.rand(len(media), 1, 1, 1, 1, generator=rng)
    grain = GRAIN * torch.randn(flat.shape, generator=rng)
    return (torch.lerp(flat, blurred, share) + grain).clamp(0, 1).view(media.shape)


class Speaker(nn.Module):
    """The base model while it learns to answer questions about clips: a Qwen2-VL with its vocabulary head.

    VideoReward starts from a Qwen2-VL that knows what it sees, and so does ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.config = write_base_files(Path(self.folder.name))
        self.model = Qwen2VLForConditionalGeneration(self.config)
        processor = AutoProcessor.from_pretrained(self.folder.name, local_files_only=True)
        size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        self.reader = VisionLanguage(self.model, processor, batch_size=64, video_size=size, fps=RATE)
        self.places = nn.Linear(WIDTH, 4)  # only helps to learn, and is not saved

    def forward(self, media: Tensor, said: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """((N, V) logits, (N,) tokens, (B, T / 2, 4) places): for every word of the answers what came and what was
        expected, and where the shape is, as `pointed` has it."""
        chosen = media[:, LOOKED_AT]
        chats = [Chat((clip, text)) for clip, text in zip(chosen, said, strict=True)]
        inputs = self.reader.inputs(chats, reply=False)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # as VideoReward counts, see TokenReward
        hidden = self.model.model(
            **{n: v for n, v in inputs.items() if n in INPUTS},
            position_ids=repeat(positions, "b l -> axes b l", axes=3),
            use_cache=False,
        ).last_hidden_state
        seen = hidden[inputs["input_ids"] == self.config.video_token_id]
        seen = rearrange(seen, "(b t n) d -> b t n d", b=len(media), t=len(LOOKED_AT) // 2)[:, :, -1]
        starts = torch.tensor(self.reader.tokenizer.convert_tokens_to_ids(["Ġis", "Ġcolour"]))
        begun = torch.isin(inputs["input_ids"], starts).cumsum(dim=1) > 0
        logits = self.model.lm_head(hidden[:, :-1][begun[:, :-1]])
        return logits, inputs["input_ids"][:, 1:][begun[:, :-1]], self.places(seen)

    def save(self, folder: Path) -> None:
        """The folder of a Qwen2-VL, float16."""
        write_base_files(folder)
        state = {n: v.detach().cpu().half().contiguous() for n, v in published_names(self.model.state_dict()).items()}
        save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})


def speaker() -> Speaker:
    return Speaker()


def answers(model: Speaker, batch: LabelBatch, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the next word, over the words of the answers, and the squared error of places: without pointing
    at the shape it learnt colours, and directions not in 400 steps; with it they take 200."""
    logits, expected, places = model(softened(batch.media, rng), batch.prompts)
    right = (logits.argmax(dim=1) == expected).float().mean()
    missed = F.mse_loss(places, batch.labels)
    return F.cross_entropy(logits, expected) + missed, {"words": float(right), "places": float(missed.detach())}


class Descriptions:
    """Clips, questions about them and their answers.

    Args:
        clips: how many are drawn, before training.
    """

    def __init__(self, clips: int = 12000) -> None:
        train, held_out = world.split_prompts()
        self.train, self.held_out = (
            described_clips(count, prompts, seed) for count, prompts, seed in ((clips, train, 0), (256, held_out, 1))
        )

    def batch(self, size: int, rng: torch.Generator) -> LabelBatch:
        rows = torch.randint(len(self.train[1]), (size,), generator=rng).tolist()
        clips, said, places = self.train
        return LabelBatch(contests.as_media(clips[rows]), [said[i] for i in rows], places[rows])

    def measure(self, model: Speaker) -> dict[str, float]:
        """Share of right words in answers about held-out prompts: of all, and of those that say what matters."""
        clips, said, _ = self.held_out
        logits, expected, _ = model(contests.as_media(clips), said)
        right, names = logits.argmax(dim=1) == expected, model.reader.tokenizer.convert_ids_to_tokens(expected)
        groups = {
            "match": ("yes", "no"),
            "colour": world.COLOURS,
            "shape": world.SHAPES,
            "direction": ("right", "left", "rises", "falls", "stands"),
            "look": ("fine", "slight", "strong", "low", *contests.LOOKS),
            "motion": ("steady", "shaky", "jerky"),
        }
        picked = {g: torch.tensor([name[1:] in words for name in names]) for g, words in groups.items()}
        return {group: float(right[rows].float().mean()) for group, rows in picked.items()}


def described_clips(count: int, asked: Sequence[str], seed: int) -> tuple[np.ndarray, list[Prompt], Tensor]:
    """(N, T, H, W, 3) uint8, and what is said about each: of one half what it shows, of the other whether it is what
    one of the prompts asks for, which is as often right as wrong in colour, shape and direction; and `pointed`."""
    rng, clips, said, places = np.random.default_rng([6, seed]), [], [], []
    for i in range(count):
        prompt = asked[int(rng.integers(len(asked)))]
        shown = contests.random_shown(rng, prompt, other=0.5)
        clip, centres = contests.filmed(rng, shown)
        words = contests.described(shown) if i % 2 else f"{prompt} {contests.matched(shown, prompt)}"
        clips.append(clip)
        said.append(Prompt(f" {words}", i))
        places.append(pointed(torch.from_numpy(centres).float()))
    return np.stack(clips), said, torch.stack(places)


def pointed(centres: Tensor) -> Tensor:
    """(P, 4) of (T, 2) centres in pixels: for each pair of frames that is looked at together, where the shape is, in
    [-1, 1], and how far it has moved between the two, in multiples of 2 pixels."""
    pairs = rearrange(centres[LOOKED_AT], "(p two) xy -> p two xy", two=2)
    return torch.cat([pairs.mean(dim=1) / (world.SIZE / 2) - 1, (pairs[:, 1] - pairs[:, 0]) / 2], dim=1)
