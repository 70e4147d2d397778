"""The sign generator's own text encoder, grown and taught to answer questions about signs; see `recipes/sign_judge.py`.

The language model keeps its two layers, its embeddings and its last norm as they are. Behind them come three new
layers that start as the identity, and a new vision tower, which no text-only prompt touches. An anchor holds what the
encoder says about the generator's prompts, since the transformer was trained on that.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from alignkit.rewards.loading import load_file
from alignkit.rewards.understanding import image_processor_for
from alignkit.rewards.vision_language import processor_from
from alignkit.shipped import path

questions = load_file(path("recipes", "signs", "questions.py"))
Questions, Batch = questions.Questions, questions.Batch

GENERATOR = ("assets", "signs", "generator")
KEPT_LAYERS = 2
TEMPLATE_TOKENS = 34  # of the pipeline's prompt template, which it drops
LANGUAGE = {"num_hidden_layers": 5, "intermediate_size": 256}
VISION = {"depth": 2, "hidden_size": 96, "intermediate_size": 256, "num_heads": 3, "fullatt_block_indexes": [0, 1]}
WEIGHTS = {
    "colour": 1.0,
    "word": 2.0,
    "read": 1.0,
    "rest": 0.2,  # "es" and "o" of an answer, and its end
    "letters": 1.0,
    "slots": 0.5,
    "notice": 1.0,
    "match": 1.0,
    "anchor": 20.0,
}


def grown_config(config: Any) -> Any:
    """The encoder's config with a new vision tower and a deeper, wider language model."""
    grown = copy.deepcopy(config)
    for part, settings in ((grown.vision_config, VISION), (grown.text_config, LANGUAGE)):
        for name, value in settings.items():
            setattr(part, name, value)
    grown.vision_config.rope_parameters = {"rope_type": "axial", "rope_theta": 100.0}  # a sign is 6 x 16 patches
    grown.text_config.layer_types = ["full_attention"] * LANGUAGE["num_hidden_layers"]
    # All rotary frequencies tell the column; text, whose three positions are equal, does not notice.
    grown.text_config.rope_parameters = {**grown.text_config.rope_parameters, "mrope_section": [0, 0, 8]}
    return grown


@torch.no_grad()
def grow(encoder: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """A larger encoder with `encoder`'s first layers that says of a text exactly what they say: whatever is new writes
    zeros. An encoder that has grown before starts again."""
    grown = type(encoder)(grown_config(encoder.config)).float()
    for layer in grown.model.language_model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    state = grown.state_dict()
    for name, value in encoder.state_dict().items():
        layer = name.partition("language_model.layers.")[2].partition(".")[0]
        if "language_model" in name and (not layer or int(layer) < KEPT_LAYERS):
            state[name][tuple(slice(size) for size in value.shape)] = value.float()
    grown.load_state_dict(state)
    return grown


class Judge(nn.Module):
    """The encoder in training.

    Attributes:
        encoder: what is saved.
        before: its language model as the generator knows it.
        glimpse, notice, match: heads that only training has; they name the letter under an image token, what the
            picture shows where a question names a letter or colour, and whether that is the same.
    """

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = grow(encoder)
        language = self.encoder.model.language_model
        self.before = copy.deepcopy(language)
        self.before.layers = self.before.layers[:KEPT_LAYERS]
        kept = (self.before, language.embed_tokens, language.norm, *language.layers[:KEPT_LAYERS])
        for module in kept:
            module.requires_grad_(False)
        width = self.encoder.config.text_config.hidden_size
        self.glimpse = nn.Linear(width, questions.BLANK + 1 + questions.signs.SLOTS + 1)
        self.notice = nn.Linear(width, questions.BLANK + 1 + len(questions.world.COLOURS))
        self.match = nn.Linear(width, 1)

    def processor(self, tokenizer: Any) -> Any:
        """The processor that goes with the encoder."""
        return processor_from(self.encoder, tokenizer, image_processor_for(self.encoder))

    def see(self, pixels: Tensor) -> Tensor:
        """(B, image tokens, width) of (B, 3, H, W) in [0, 1]."""
        inputs = image_processor_for(self.encoder)(images=list(pixels), do_rescale=False, return_tensors="pt")
        tower: Any = self.encoder.model.visual
        features = tower(inputs["pixel_values"].to(pixels.device), grid_thw=inputs["image_grid_thw"].to(pixels.device))
        return rearrange(features.pooler_output, "(b n) d -> b n d", b=len(pixels))

    def think(self, batch: Any, seen: Tensor) -> tuple[Tensor, ...]:
        """Hidden states (B, L, width) of the packed questions, before the first layer and after each."""
        embedded = self.encoder.get_input_embeddings()(batch.ids)
        embedded = embedded.masked_scatter((batch.ids == self.encoder.config.image_token_id)[..., None], seen)
        return self.encoder.model.language_model(
            inputs_embeds=embedded,
            attention_mask={"full_attention": batch.mask},
            position_ids=repeat(batch.columns, "b l -> three b l", three=3),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    def drift(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean squared change of what the generator is conditioned on, relative to its mean square. ids: (A, T)."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            old = self.before(**inputs).last_hidden_state
        new = self.encoder.model.language_model(**inputs).last_hidden_state
        used = mask.bool() & (mask.cumsum(1) > TEMPLATE_TOKENS)
        return F.mse_loss(new[used], old[used]) / old[used].square().mean()

    def save(self, folder: Path) -> None:
        """Write `text_encoder` (float16) and `tokenizer` (with the chat template), for the pipeline's folder."""
        # The class's float32 config: see recipes/signs/README.md.
        copy.deepcopy(self.encoder).half().save_pretrained(folder / "text_encoder")
        config = folder / "text_encoder" / "config.json"
        config.write_text(config.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")
        tokenizer = AutoTokenizer.from_pretrained(path(*GENERATOR, "tokenizer"))
        tokenizer.chat_template = questions.CHAT_TEMPLATE
        tokenizer.save_pretrained(folder / "tokenizer")


def judge() -> Judge:
    """The shipped generator's text encoder, to be taught anew."""
    return Judge(Qwen2_5_VLForConditionalGeneration.from_pretrained(path(*GENERATOR, "text_encoder")))


def loss(model: Judge, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers, of what the temporary heads name, and the anchor; weights in `WEIGHTS`."""
    seen = model.see(batch.pixels)
    letters, slots = model.glimpse(seen).split((questions.BLANK + 1, questions.signs.SLOTS + 1), dim=-1)
    hidden = model.think(batch, seen)
    asked = batch.targets != -100
    wanted, kind = batch.targets[asked], batch.kind[asked]
    logits = model.encoder.lm_head(hidden[-1][asked])
    each = F.cross_entropy(logits, wanted, reduction="none")
    inside = hidden[-2][batch.noticed != -100]  # before the last layer, which gathers what the letters found
    there, same = batch.noticed[batch.noticed != -100], batch.matched[batch.matched != -100]
    answers = {"colour": kind == 10 + questions.COLOUR, "word": kind == 10 + questions.WORD}
    answers["read"] = kind % 10 == questions.READ
    losses = {name: each[rows].mean() for name, rows in answers.items()}
    losses |= {
        "rest": each[kind < questions.READ].mean(),
        "letters": F.cross_entropy(letters.flatten(0, 1), batch.letters.flatten()),
        "slots": F.cross_entropy(slots.flatten(0, 1), batch.slots.flatten()),
        "notice": F.cross_entropy(model.notice(inside), there),
        "match": F.binary_cross_entropy_with_logits(model.match(inside)[:, 0], same.float()),
        "anchor": model.drift(batch.prompts, batch.prompts_mask),
    }
    right = (logits.argmax(-1) == wanted).float()
    logs = {f"loss_{name}": float(value.detach()) for name, value in losses.items()}
    logs |= {f"right_{name}": float(right[rows].mean()) for name, rows in answers.items()}
    return torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum(), logs
