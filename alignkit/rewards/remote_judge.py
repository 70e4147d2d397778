"""A vision-language model behind any OpenAI-compatible server (vLLM, SGLang, ...), asked like one in process."""

from __future__ import annotations

import base64
import inspect
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from PIL import Image

from alignkit.errors import RecipeError
from alignkit.rewards.http_json import Bounds, JSONServer, ServerFailure
from alignkit.rewards.pixels import to_uint8
from alignkit.rewards.vision_language import Chat

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOP_LOGPROBS = 20  # the most that OpenAI's interface and vLLM's default allow


@dataclass(frozen=True, eq=False)
class RemoteModel:
    """Questions over HTTP: chat completions with base64 PNG images, at temperature 0, no gradient.

    A question without an answer costs its own sample (NaN, or None) and not its batch; where every question of a call
    fails the server is down, and that is an error.

    Attributes:
        server: whom to ask.
        model: the model's name there.
        concurrency: questions under way at a time.
        max_frames: a video is sent as at most so many of its frames, evenly spaced.
        top_logprobs: how many of the first token's alternatives are asked for. An answer that is not among them has
            probability 0: it is off by less than the lowest listed one, times its spellings.
        from_text: where the server sends no logprobs, take the first word of its reply as certain.
    """

    server: JSONServer
    model: str
    concurrency: int = 8
    max_frames: int = 16
    top_logprobs: int = TOP_LOGPROBS
    from_text: bool = False
    differentiable: bool = field(default=False, init=False)

    @classmethod
    def make(cls, address: str, model: str, options: Mapping[str, Any]) -> RemoteModel:
        """From literals: attributes of this class, of `Bounds`, and `key_variable`.

        Raises:
            RecipeError: an option that none of them has, or no address.
        """
        own = {name for name in inspect.signature(cls).parameters if name not in ("server", "model")}
        bounds = {one.name for one in fields(Bounds)}
        if unknown := set(options) - own - bounds - {"key_variable"}:
            known = ", ".join(sorted({*own, *bounds, "key_variable"}))
            raise RecipeError(f"a judge on a server has no option {', '.join(sorted(unknown))}; it takes {known}")
        chosen = {name: value for name, value in options.items() if name in bounds}
        server = JSONServer(address, options.get("key_variable", ""), Bounds(**chosen))
        return cls(server, model, **{name: value for name, value in options.items() if name in own})

    def prepare(self) -> None:
        """Ask the server which models it serves.

        Raises:
            ServerFailure: it cannot be reached.
            RecipeError: it does not serve this one.
        """
        answer = self.server.ask("models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        served = [entry.get("id") for entry in entries or () if isinstance(entry, dict)]
        if served and self.model not in served:
            raise RecipeError(
                f"the server {self.server.address} serves {', '.join(map(str, served))}, not {self.model}"
            )

    def log_probabilities(self, chats: Sequence[Chat], answers: Sequence[str]) -> torch.Tensor:
        """(B, A) log-probability of each answer as the first token of the reply; -inf where it is not among the
        `top_logprobs`, a row of NaN where the server gave no answer or none of these."""

        def read(reply: Any) -> list[float]:
            return first_token(reply, answers, self.from_text)

        asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top_logprobs}
        if self.from_text:
            asked = {"max_tokens": 4}
        rows = self._all(chats, asked, read)
        nothing = [math.nan] * len(answers)
        device = chats[0].device if chats else None
        table = [nothing if row is None else row for row in rows]
        return torch.tensor(table, device=device).reshape(len(chats), len(answers))

    def texts(self, chats: Sequence[Chat], max_tokens: int = 512) -> list[str | None]:
        """The reply to each question; None where the server gave none, or cut it at `max_tokens`."""
        return self._all(chats, {"max_tokens": max_tokens}, whole_text)

    def _all(self, chats: Sequence[Chat], asked: Mapping[str, Any], read: Callable[[Any], T]) -> list[T | None]:
        deadline = self.server.deadline()

        def ask(chat: Chat) -> T | ServerFailure:
            body = {"model": self.model, "messages": messages(chat, self.max_frames), "temperature": 0, "n": 1, **asked}
            try:
                return read(self.server.ask("chat/completions", body, deadline))
            except ServerFailure as failure:
                return failure

        if not chats:
            return []
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = list(pool.map(ask, chats))
        failures = [reply for reply in replies if isinstance(reply, ServerFailure)]
        if len(failures) == len(replies):
            raise ServerFailure(f"none of {len(replies)} questions was answered; the first: {failures[0]}")
        for failure in failures:
            logger.warning("one of %d questions was not answered: %s", len(replies), failure)
        return [None if isinstance(reply, ServerFailure) else reply for reply in replies]


def messages(chat: Chat, max_frames: int) -> list[dict[str, Any]]:
    """The turns in OpenAI's form; the frames of a video are images."""
    content: list[dict[str, Any]] = []
    for part in chat.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            frames = part.unsqueeze(0) if part.ndim == 3 else part[_evenly(len(part), max_frames)]
            content += [{"type": "image_url", "image_url": {"url": data_url(frame)}} for frame in frames]
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    return [*system, {"role": "user", "content": content}]


def _evenly(length: int, most: int) -> list[int]:
    """`most` places, or all, of `length`: the middles of equal parts."""
    number = min(length, most)
    return [int((i + 0.5) * length / number) for i in range(number)]


def data_url(image: torch.Tensor) -> str:
    """(3, H, W) float in [0, 1] as an 8-bit PNG in a data address."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image.unsqueeze(0))[0]).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def first_token(reply: Any, answers: Sequence[str], from_text: bool = False) -> list[float]:
    """A log-probabilities of the answers as the first token, all spellings of each summed.

    Raises:
        ServerFailure: the reply has no logprobs, or none of the answers among them.
    """
    choice = _choice(reply)
    if from_text:
        word = _text(choice).split()[:1]
        listed = [(word[0].strip(".,:;!*\"'"), 0.0)] if word else []
    else:
        listed = _top(choice)
    masses = [sum(math.exp(logp) for token, logp in listed if _is(token, answer)) for answer in answers]
    if not any(masses):
        shown = ", ".join(repr(token) for token, _ in listed[:5])
        raise ServerFailure(f"the reply begins with none of {', '.join(answers)}, but with {shown or 'nothing'}")
    return [math.log(mass) if mass else -math.inf for mass in masses]


def _is(token: str, answer: str) -> bool:
    return token.strip("Ġ▁ \n").casefold() == answer.strip().casefold()


def _top(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        listed = [(entry["token"], float(entry["logprob"])) for entry in top]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerFailure(
            "the server sent no logprobs of the first token; serve the model with them, or take the reply's first word "
            "as certain with options={'from_text': True}"
        ) from error
    if not all(isinstance(token, str) and math.isfinite(logp) and logp < 1e-3 for token, logp in listed):
        raise ServerFailure(f"the server sent logprobs that are none: {listed[:3]}")
    return listed


def _choice(reply: Any) -> Mapping[str, Any]:
    """The one choice of a chat completion. Raises ServerFailure where there is not exactly one."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else 0
        raise ServerFailure(f"the server answered with {count} choices; expected 1")
    return choices[0]


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise ServerFailure("the server answered without a text")
    return text.strip()


def whole_text(reply: Any) -> str:
    """The text of a reply. Raises ServerFailure where there is none or it was cut off."""
    choice = _choice(reply)
    if choice.get("finish_reason") == "length":
        raise ServerFailure("the reply was cut off before its end; allow more with max_tokens")
    return _text(choice)
