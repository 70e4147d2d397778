"""Questions about signs, with their answers: what the sign generator's text encoder learns to judge by.

A picture comes with four exchanges side by side (a colour, its word, a word it does not say, a transcription), each of
which sees the picture and itself. No held-out word is ever shown or asked about, except in `measure`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from alignkit.rewards.loading import load_file
from alignkit.rewards.vision_language import Chat, VisionLanguage
from alignkit.shipped import path

signs = load_file(path("recipes", "signs", "shown.py"))
world = signs.world

COLOUR_QUESTION = "is the sign {colour}?"
WORD_QUESTION = 'does the sign say "{word}"?'
READ_QUESTION = "what does the sign say?"
PREFIX = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOKEN = 8  # pixels, the side of an image token
TOKENS_HIGH, TOKENS_WIDE = world.HEIGHT // TOKEN, world.WIDTH // TOKEN
BLANK = len(world.LETTERS)  # the class of "no letter"
COLOUR, WORD, READ = range(3)


@dataclass
class Exchange:
    """One question with its answer, token by token.

    Attributes:
        kind: COLOUR, WORD or READ.
        asked: how many tokens the question has.
        targets: the token that comes next where an answer is due, else -100.
        noticed, matched: see `Batch`.
    """

    kind: int
    asked: int
    tokens: list[int]
    targets: list[int]
    noticed: list[int]
    matched: list[int]


@dataclass(frozen=True)
class Batch:
    """B pictures with questions packed into rows of L tokens, and A prompts of the generator.

    Attributes:
        pixels: (B, 3, H, W) in [0, 1].
        ids: (B, L) the picture's prefix, then its exchanges side by side.
        columns: (B, L) rotary position; every exchange starts again behind the prefix.
        mask: (B, 1, L, L) True where a token (row) may look: the prefix and its own exchange, backwards.
        targets: (B, L) next token of an answer, else -100.
        kind: (B, L) of the exchange; + 10 at the first token of the answer.
        letters, slots: (B, image tokens) letter under an image token and its place in the word, -100 unknown.
        noticed: (B, L) at a letter of a question the sign's letter in that place (at the closing quote: the one after),
            at a colour the sign's colour, else -100.
        matched: (B, L) whether that is what the question says; -100 as in `noticed`.
        prompts, prompts_mask: (A, T) tokens of prompts for the generator, in its template.
    """

    pixels: Tensor
    ids: Tensor
    columns: Tensor
    mask: Tensor
    targets: Tensor
    kind: Tensor
    letters: Tensor
    slots: Tensor
    noticed: Tensor
    matched: Tensor
    prompts: Tensor
    prompts_mask: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch elsewhere."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)})


def letters_under(shown: signs.Shown) -> tuple[list[int], list[int]]:
    """(letter, slot) under the centre of each image token, row by row."""
    if not shown.legible:
        unknown = [-100] * (TOKENS_HIGH * TOKENS_WIDE)
        return unknown, unknown
    word = shown.sign.word
    start = (world.WIDTH - world.CELL * len(word)) // 2 + shown.sign.offset[0]
    places = [(TOKEN * column + TOKEN // 2 - start) // world.CELL for column in range(TOKENS_WIDE)]
    inside = [0 <= place < len(word) for place in places]
    letters = [world.LETTERS.index(word[p]) if i else BLANK for p, i in zip(places, inside)]
    return letters * TOKENS_HIGH, [p if i else signs.SLOTS for p, i in zip(places, inside)] * TOKENS_HIGH


class Questions:
    """Pictures with questions, and prompts of the generator; an `Examples` of alignkit.training.reward_model."""

    def __init__(self, generator: str = "assets/signs/generator", prompts_per_picture: float = 0.5) -> None:
        pipe = DiffusionPipeline.from_pretrained(path(*generator.split("/")), transformer=None, text_encoder=None)
        self.vae, self.tokenizer, self.template = pipe.vae.eval(), pipe.tokenizer, pipe.prompt_template_encode
        self.prompts_per_picture = prompts_per_picture
        self.tokenizer.chat_template = CHAT_TEMPLATE
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        prefix = self._ids(PREFIX)
        at = prefix.index(pad)
        tokens = TOKENS_HIGH * TOKENS_WIDE
        self.suffix, self.end = self._ids(SUFFIX), self._ids(END)
        self.head = [*prefix[:at], *[pad] * tokens, *prefix[at + 1 :]]
        behind = at + max(TOKENS_HIGH, TOKENS_WIDE)
        columns = [at + i % TOKENS_WIDE for i in range(tokens)]
        self.head_columns = [*range(at), *columns, *range(behind, behind + len(prefix) - at - 1)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def exchange(self, kind: int, question: str, answer: str) -> Exchange:
        asked, answered = self._ids(question), self._ids(answer)
        tokens = [*asked, *self.suffix, *answered]
        targets = [-100] * (len(tokens) - len(answered) - 1) + [*answered, *self.end]
        return Exchange(kind, len(asked), tokens, targets, [-100] * len(tokens), [-100] * len(tokens))

    def about_colour(self, asked: str, shown: signs.Shown) -> Exchange:
        same = asked == shown.sign.colour
        exchange = self.exchange(COLOUR, COLOUR_QUESTION.format(colour=asked), "yes" if same else "no")
        at = exchange.asked - 2  # before the question mark
        exchange.noticed[at] = BLANK + 1 + list(world.COLOURS).index(shown.sign.colour)
        exchange.matched[at] = int(same)
        return exchange

    def about_word(self, asked: str, shown: signs.Shown) -> Exchange:
        same = shown.legible and asked == shown.sign.word
        exchange = self.exchange(WORD, WORD_QUESTION.format(word=asked), "yes" if same else "no")
        if shown.legible:
            there = [*map(world.LETTERS.index, shown.sign.word), *[BLANK] * (signs.SLOTS + 1)]
            for slot, letter in enumerate([*map(world.LETTERS.index, asked), BLANK]):
                at = exchange.asked - 2 - len(asked) + slot  # the closing quote and the question mark come last
                exchange.noticed[at], exchange.matched[at] = there[slot], int(there[slot] == letter)
        return exchange

    def ask(self, shown: signs.Shown, wrong: str, rng: np.random.Generator) -> list[Exchange]:
        """A colour, the word, a wrong word, and the transcription; only what the picture can answer."""
        others = [name for name in world.COLOURS if name != shown.sign.colour]
        colour = shown.sign.colour if rng.random() < 0.5 else others[rng.integers(len(others))]
        items = [self.about_word(shown.sign.word, shown), self.about_word(wrong, shown)]
        if shown.coloured:
            items.append(self.about_colour(colour, shown))
        if shown.legible:
            items.append(self.exchange(READ, READ_QUESTION, shown.sign.word))
        return items

    def prompt(self, rng: np.random.Generator) -> str:
        """What the generator may be asked for: mostly signs, some negative prompts, some gibberish."""
        kind = rng.random()
        if kind < 0.1:
            return (" ", "")[rng.integers(2)]
        if kind < 0.85:
            return world.prompt_for(world.pretraining_word(rng), list(world.COLOURS)[rng.integers(len(world.COLOURS))])
        pieces = [*"abcdefghijklmnopqrstuvwxyz", *world.LETTERS, " ", ",", ".", '"', " sign", " the", " that says"]
        return "".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(1, 30)))

    def batch(self, size: int, rng: torch.Generator) -> Batch:
        """`size` pictures with their questions."""
        numbers = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        drawn = [signs.draw_training(numbers) for _ in range(size)]
        pixels = signs.as_media([picture for picture, _, _ in drawn])
        decoded = torch.rand(size, generator=rng) < signs.DECODED
        jitter = torch.rand(int(decoded.sum()), generator=rng) * signs.LATENT_JITTER
        pixels[decoded] = signs.redrawn(self.vae, pixels[decoded], jitter, rng)
        rows = [self.ask(shown, wrong, numbers) for _, shown, wrong in drawn]
        under = [letters_under(shown) for _, shown, _ in drawn]
        count = max(2, round(self.prompts_per_picture * size))
        text = [self.template.format(self.prompt(numbers)) for _ in range(count)]
        tokens = self.tokenizer(text, padding=True, padding_side="right", return_tensors="pt")
        return Batch(
            pixels=pixels,
            **self.packed(rows),
            letters=torch.tensor([letters for letters, _ in under]),
            slots=torch.tensor([slots for _, slots in under]),
            prompts=tokens.input_ids,
            prompts_mask=tokens.attention_mask,
        )

    def packed(self, rows: list[list[Exchange]]) -> dict[str, Tensor]:
        """`ids`, `columns`, `mask`, `targets`, `kind`, `noticed` and `matched` of a batch."""
        head, start = len(self.head), self.head_columns[-1] + 1
        shape = len(rows), head + max(sum(len(one.tokens) for one in row) for row in rows)
        ids, columns = np.full(shape, self.tokenizer.pad_token_id), np.zeros(shape, int)
        targets, noticed, matched, kind = (np.full(shape, -100) for _ in range(4))
        owner = np.full(shape, len(rows[0]) + 9)  # padding belongs to nobody
        ids[:, :head], columns[:, :head], owner[:, :head] = self.head, self.head_columns, -1
        for b, row in enumerate(rows):
            at = head
            for number, one in enumerate(row):
                span = slice(at, at + len(one.tokens))
                ids[b, span], targets[b, span], kind[b, span] = one.tokens, one.targets, one.kind
                noticed[b, span], matched[b, span], owner[b, span] = one.noticed, one.matched, number
                columns[b, span] = range(start, start + len(one.tokens))
                kind[b, at + one.asked + len(self.suffix) - 1] += 10
                at += len(one.tokens)
        group = torch.from_numpy(owner)
        seen = (group[:, None, :] == -1) | (group[:, None, :] == group[:, :, None])
        mask = (seen & torch.ones(shape[1], shape[1], dtype=torch.bool).tril())[:, None]
        named = {"ids": ids, "columns": columns, "targets": targets, "kind": kind}
        named |= {"noticed": noticed, "matched": matched}
        return {"mask": mask, **{name: torch.from_numpy(value) for name, value in named.items()}}

    @torch.no_grad()
    def measure(self, scorer: Any) -> dict[str, float]:
        """Accuracies on held-out words, half of them decoded; see `examine`. Asked as a self-reward asks."""
        rng, words = np.random.default_rng(77), world.split_words()[1]
        drawn = [signs.draw(word, rng) for word in words]
        media = signs.as_media([pixels for pixels, _ in drawn])
        noise = torch.Generator().manual_seed(77)
        media[::2] = signs.redrawn(self.vae, media[::2], 0.2 * torch.ones(len(media[::2])), noise)
        judge = VisionLanguage(scorer.encoder, scorer.processor(self.tokenizer), batch_size=60)
        found = examine(judge, media, [shown for _, shown in drawn], rng)
        drift = scorer.drift(*(self.tokenizer(self.held_out_prompts(), padding=True, return_tensors="pt").values()))
        return {**found, "conditioning_kept": 1 - float(drift)}

    def held_out_prompts(self) -> list[str]:
        """Prompts for held-out words in the generator's template."""
        words, colours = world.split_words()[1], list(world.COLOURS)
        return [self.template.format(world.prompt_for(w, colours[i % len(colours)])) for i, w in enumerate(words)]


def examine(
    judge: VisionLanguage, media: Tensor, shown: list[signs.Shown], rng: np.random.Generator
) -> dict[str, float]:
    """Share of right answers, by question; `word_auc` ranks the right word against all wrong ones, `read_exact` is of
    a third of the pictures."""
    colours, words = list(world.COLOURS), [one.sign.word for one in shown]
    true = [one.sign.colour for one in shown]
    false = [colours[(colours.index(colour) + 1 + i % 7) % 8] for i, colour in enumerate(true)]

    def yes(template: str, key: str, values: list[str]) -> Tensor:
        return judge.yes_probability(media, [template.format(**{key: value}) for value in values])

    found = {"colour_yes": yes(COLOUR_QUESTION, "colour", true) > 0.5}
    found["colour_no"] = yes(COLOUR_QUESTION, "colour", false) <= 0.5
    right = yes(WORD_QUESTION, "word", words)
    found["word_yes"], wrong = right > 0.5, []
    for kind in signs.MISTAKES:
        wrong.append(yes(WORD_QUESTION, "word", [signs.mistaken(word, kind, rng) for word in words]))
        found[f"word_no_{kind}"] = wrong[-1] <= 0.5
    result = {name: float(value.float().mean()) for name, value in found.items()}
    result["word_auc"] = float((right[:, None] > torch.cat(wrong)).float().mean())
    chats = [Chat((picture, READ_QUESTION)) for picture in media[::3]]
    read = judge.texts(chats, max_tokens=signs.SLOTS + 1)
    result["read_exact"] = float(np.mean([a == b for a, b in zip(read, words[::3], strict=True)]))
    return result
