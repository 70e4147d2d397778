"""Vision-language judges: a question about each sample, answered by a model in process or on a server.

A question is a text with `{prompt}`, `{kind}` ("image" or "video"), columns of the prompt file by name, and the places
of the media (`{image}`; `{reference}`; `{first}` and `{second}`); media whose place is not named come first.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from einops import reduce
from torch.nn import functional as F

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.references import COLUMN, fit, image_tensor, references_of
from alignkit.rewards.remote_judge import RemoteModel
from alignkit.rewards.tiny_models import write_qwen_vl
from alignkit.rewards.vision_language import PATTERNS, Chat, VisionLanguage, probability
from alignkit.rewards.weights import Files
from alignkit.types import Prompt

WEIGHTS = "Qwen/Qwen2.5-VL-7B-Instruct"
LICENCE = "Apache-2.0"
COST = "8.3 B parameters; 33 GB, or 17 GB with dtype='bfloat16'"

_PLACE = re.compile(r"\{(\w+)\}")


class Engine(Protocol):
    """Whatever answers questions about pictures: `VisionLanguage` in process, `RemoteModel` over HTTP."""

    @property
    def differentiable(self) -> bool: ...

    def prepare(self) -> None:
        """Raises what the first question would raise."""
        ...

    def log_probabilities(self, chats: Sequence[Chat], answers: Sequence[str]) -> torch.Tensor:
        """(B, A) log-probability that the reply begins with each answer; a row of NaN where there was no reply."""
        ...

    def texts(self, chats: Sequence[Chat], max_tokens: int) -> Sequence[str | None]:
        """The reply to each question at temperature 0; None where there was none."""
        ...


def fill(question: str, prompt: Prompt, media: Mapping[str, torch.Tensor], words: Mapping[str, str]) -> Chat:
    """The question about these media.

    Args:
        media: by the name of its place; in this order in front of the text where the question does not name it.
        words: what stands for other names; then come the prompt's columns.

    Raises:
        RewardError: the question names something that the prompt has no column for.
    """
    known = {**prompt.columns, **words, "prompt": str(prompt)}
    pieces = _PLACE.split(question)  # texts at even places, names at odd ones
    parts: list[str | torch.Tensor] = [tensor for name, tensor in media.items() if name not in pieces[1::2]]
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            parts += [piece] if piece else []
        elif piece in media:
            parts.append(media[piece])
        elif piece in known:
            parts.append(str(known[piece]))
        else:
            raise RewardError(
                f"the question asks for {{{piece}}}, and prompt {prompt.id} (its line or row in the prompt file) "
                f"{str(prompt)!r} has no such column; columns found: {', '.join(sorted(prompt.columns)) or 'none'}"
            )
    return Chat(_joined(parts))


def at_most(media: torch.Tensor, max_pixels: int) -> torch.Tensor:
    """(..., 3, H, W) made smaller, with its shape kept, to `max_pixels` per frame (bicubic, antialias) if larger."""
    height, width = media.shape[-2:]
    scale = math.sqrt(max_pixels / (height * width))
    if scale >= 1:
        return media
    size = (max(int(height * scale), 1), max(int(width * scale), 1))
    frames = media.reshape(-1, *media.shape[-3:])
    smaller = F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return smaller.reshape(*media.shape[:-2], *size)


def _joined(parts: Sequence[str | torch.Tensor]) -> tuple[str | torch.Tensor, ...]:
    joined: list[str | torch.Tensor] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        else:
            joined.append(part)
    return tuple(joined)


@dataclass(frozen=True, eq=False)
class Judge:
    """What all judges share: who answers, and the question. (A base class, because five judges have these fields.)

    Attributes:
        weights: hub id or folder of an image-text-to-text model; with `server` the name of the model there.
        server: address of an OpenAI-compatible server, such as "http://127.0.0.1:8000/v1"; "": in process.
        dtype: of the model in process, "float32", "bfloat16" or "float16".
        options: more of `VisionLanguage` (batch_size, size, checkpointing, ...) or of `RemoteModel` (key_variable,
            timeout, concurrency, ...).
        max_pixels: larger pictures are made smaller before the judge sees them, in the graph; None: as they are.
        kind: "image" or "video".
        question: the text, see this module; "": the judge's own.
        template: a file of yours with the text, such as the one that a judge was trained with.
        differentiable: True where the answer is read off the logits of a model in process.
    """

    name: str = "judge"
    weights: str = WEIGHTS
    server: str = ""
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_pixels: int | None = None
    kind: str = "image"
    question: str = ""
    template: str = ""
    differentiable: bool = field(default=True, init=False)

    default_question: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.kind not in ("image", "video"):
            raise RecipeError(f"judge {self.name!r} has kind={self.kind!r}; choose image or video")
        if self.question and self.template:
            raise RecipeError(f"judge {self.name!r} was given both a question and a template; give one of them")
        object.__setattr__(self, "differentiable", not self.server and self.reads_logits)

    @property
    def reads_logits(self) -> bool:
        """Whether the answer is a probability; otherwise it is a text that is parsed."""
        return True

    @functools.cached_property
    def engine(self) -> Engine:
        if self.server:
            return RemoteModel.make(self.server, self.weights, self.options)
        return VisionLanguage.load(self.weights, self.dtype, **self.options)

    @functools.cached_property
    def asked(self) -> str:
        """The text of the question, places unfilled.

        Raises:
            RecipeError: the template file is not there.
        """
        if not self.template:
            return self.question or self.own_question
        path = Path(self.template).expanduser()
        if not path.is_file():
            raise RecipeError(f"judge {self.name!r}: there is no template file {self.template}")
        return path.read_text(encoding="utf-8").strip()

    @property
    def own_question(self) -> str:
        """The text where the user gives none."""
        return self.default_question

    @property
    def words(self) -> dict[str, str]:
        """What stands in the question for names that are no column."""
        return {"kind": self.kind}

    def chat(self, prompt: Prompt, media: Mapping[str, torch.Tensor]) -> Chat:
        """The question about these media, each (3, H, W) or (T, 3, H, W)."""
        if self.max_pixels is not None:
            media = {name: at_most(tensor, self.max_pixels) for name, tensor in media.items()}
        return fill(self.asked, prompt, media, self.words)

    def files(self) -> tuple[Files, ...]:
        return () if self.server else (Files(self.weights, PATTERNS),)

    def prepare(self) -> None:
        """Read the weights, or reach the server."""
        self.engine.prepare()

    def describe(self) -> dict[str, Any]:
        """The question as it is asked and the engine's options; never a key."""
        return {"question": self.asked, "engine_options": {key: str(value) for key, value in self.options.items()}}

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random Qwen2.5-VL of 70 thousand parameters."""
        write_qwen_vl(folder)
        return {"weights": str(folder)}


@dataclass(frozen=True, eq=False)
class YesProbability(Judge):
    """A judge's probability that the picture shows what the prompt says.

    The probability of "yes" against "no" as the first token of the reply, all spellings counted:
    sigmoid(logsumexp yes - logsumexp no). No text is generated, so gradients reach the pixels.

    Attributes:
        among: "answers" compares yes with no; "vocabulary" takes the mass of yes among all tokens.
    """

    name: str = "yes_probability"
    among: str = "answers"
    card: ClassVar[Card] = Card(
        family="judge",
        summary="the judge says that the picture shows what the prompt says",
        range="[0, 1]",
        licence=LICENCE,
        cost=COST,
        source="VQAScore, 2404.01291; RewardDance, 2509.08826",
    )
    default_question: ClassVar[str] = (
        "Caption: {prompt}\nDoes this {kind} show what the caption says, with nothing left out and nothing wrong? "
        "Reply with one word, yes or no."
    )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a column that the question names."""
        for prompt in prompts:
            self.chat(prompt, {"image": torch.empty(3, 1, 1)})

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]; NaN where a server gave no answer."""
        chats = [self.chat(prompt, {"image": one}) for one, prompt in zip(media, prompts, strict=True)]
        return probability(self.engine.log_probabilities(chats, ("yes", "no")), self.among)[:, 0]


@dataclass(frozen=True, eq=False)
class YesAgainstReference(Judge):
    """A judge's probability that the picture beats the prompt's reference image.

    RewardDance (arXiv 2509.08826): the reference stands first and the candidate second, the decision is the first
    token of the reply, before any reason, and the reward is the mass of "yes" in the softmax over the vocabulary.
    With several references the mean over them. References must be good: against weak ones the probability is 1
    everywhere and its gradient 0.

    Attributes:
        criteria: what the judge is to look at, a sentence.
        among: as of YesProbability.
        calibrated: take off the judge's liking for "yes", asked about two grey pictures in the same words
            (`among="answers"` only); one more question per sample and reference.
        column: of the prompt file, one reference image or several, see `references`.
    """

    name: str = "yes_against_reference"
    criteria: str = "Look first at how well each follows the caption, then at how well it is made."
    among: str = "vocabulary"
    calibrated: bool = False
    column: str = COLUMN
    card: ClassVar[Card] = Card(
        family="judge",
        summary="the judge finds the picture better than the prompt's reference image",
        range="[0, 1]",
        licence=LICENCE,
        cost=COST,
        columns=(COLUMN,),
        source="RewardDance, 2509.08826",
    )
    default_question: ClassVar[str] = (
        "Reference: {reference}\nCandidate: {image}\nBoth were made for this caption: {prompt}\n{criteria}\n"
        "Is the candidate better than the reference? Reply yes or no first; a reason may follow."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "image":
            raise RecipeError(f"judge {self.name!r} compares with reference images; kind={self.kind!r} has none")
        if self.calibrated and self.among != "answers":
            raise RecipeError(f'judge {self.name!r}: calibrated=True compares yes with no and needs among="answers"')

    @property
    def words(self) -> dict[str, str]:
        return {**super().words, "criteria": self.criteria}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a reference image or another column."""
        blank = torch.empty(3, 1, 1)
        for prompt in prompts:
            references_of(prompt, self.column)
            self.chat(prompt, {"reference": blank, "image": blank})

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]; NaN where a server gave no answer."""
        pairs = with_references(media, prompts, self.column)
        answers = self._log_probabilities([(p, r, c) for p, c, rs in pairs for r in rs])
        if self.calibrated:
            grey = [(p, torch.full_like(r, 0.5), torch.full_like(c, 0.5)) for p, c, rs in pairs for r in rs]
            with torch.no_grad():
                bias = self._log_probabilities(grey)
            answers = answers - bias
        return mean_of_runs(probability(answers, self.among)[:, 0], [len(rs) for _, _, rs in pairs])

    def _log_probabilities(self, triples: Sequence[tuple[Prompt, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        chats = [self.chat(prompt, {"reference": r, "image": c}) for prompt, r, c in triples]
        return self.engine.log_probabilities(chats, ("yes", "no"))


def with_references(
    media: torch.Tensor, prompts: Sequence[Prompt], column: str
) -> list[tuple[Prompt, torch.Tensor, list[torch.Tensor]]]:
    """Every prompt with its sample (3, H, W) and its references, cut and resized to the same size.

    Raises:
        RewardError: the media are no images, or a prompt has no reference.
    """
    if media.ndim != 4:
        raise RewardError(f"references are images (3, H, W) and are compared with images; given {tuple(media.shape)}")
    size = media.shape[-2:]
    return [
        (prompt, one, [fit(image_tensor(r).to(one.device), *size) for r in references_of(prompt, column).values()])
        for one, prompt in zip(media, prompts, strict=True)
    ]


def mean_of_runs(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(B,) means of consecutive runs of `values` (sum of lengths,)."""
    runs = values.split(list(lengths)) if lengths else ()
    return torch.stack([reduce(run, "r -> ", "mean") for run in runs]) if runs else values
