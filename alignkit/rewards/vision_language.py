"""Asking a vision-language model of transformers about pictures, with the gradient down to the pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.answers import log_mass, spellings
from alignkit.rewards.weights import Files, frozen, locate, on

PATTERNS = (
    "config.json",
    "model*.safetensors",
    "tokenizer.json|vocab.json|merges.txt|tekken.json|tokenizer.model",
    "preprocessor_config.json|processor_config.json|video_preprocessor_config.json",
    "tokenizer_config.json|chat_template.json|chat_template.jinja|special_tokens_map.json|added_tokens.json",
    "*.json",
)
"""What is read of a repository of a vision-language model."""

AMONG = ("answers", "vocabulary")


@dataclass(frozen=True, eq=False)
class Chat:
    """One question: a single turn of the user's, in reading order.

    Attributes:
        parts: texts, images (3, H, W) and videos (T, 3, H, W); media float in [0, 1].
        system: the system turn; "" leaves what the chat template does without one.
    """

    parts: tuple[str | torch.Tensor, ...]
    system: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if isinstance(part, str))

    def media(self, ndim: int) -> list[torch.Tensor]:
        """The images (`ndim=3`) or the videos (`ndim=4`), float32."""
        return [part.float() for part in self.parts if isinstance(part, torch.Tensor) and part.ndim == ndim]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parts if isinstance(p, torch.Tensor)), torch.device("cpu"))

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates read them."""
        kinds = {3: "image", 4: "video"}
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": kinds[part.ndim]}
            for part in self.parts
        ]
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        return [*system, {"role": "user", "content": content}]


@dataclass(frozen=True, eq=False)
class VisionLanguage:
    """An image-text-to-text model with its processor.

    Images and videos stay tensors: the model's own torchvision processor resizes and normalises them, and the
    answer is read off the logits of its first token, so gradients reach the pixels (which are not rounded to 256
    steps after resizing, as those of a file are; otherwise the model sees the same). Checked with Qwen2-VL,
    Qwen2.5-VL, Qwen3-VL, LLaVA, Mistral 3 and Idefics 3; a processor that leaves torch is refused when a gradient
    is wanted.

    Attributes:
        model: in evaluation mode, without gradients of its own; moved to where the media are.
        processor: the model's, of transformers (tokenizer and image processor in one).
        batch_size: questions in one forward, padded on the left; 1 where bit-equal answers in any batch matter
            more than time (in float32 they agree to 1e-6 anyway).
        size: what the image processor resizes to, in its own words, such as `{"shortest_edge": 3136,
            "longest_edge": 254016}` pixels for Qwen; None: the model's own.
        video_size: the same for the video processor.
        fps: frames per second of the videos that are asked about.
        checkpointing: recompute each batch in the backward instead of keeping its activations.
        chat_template: Jinja text instead of the processor's own. A model without any is asked in plain text: the
            media tokens where the media stand, then a line "Answer:".
    """

    model: Any
    processor: Any
    batch_size: int = 8
    size: Mapping[str, int] | None = None
    video_size: Mapping[str, int] | None = None
    fps: float = 8.0
    checkpointing: bool = False
    chat_template: str | None = None

    differentiable = True

    @classmethod
    def load(cls, weights: str | Path, dtype: str = "float32", **options: Any) -> VisionLanguage:
        """From a hub id or a local folder.

        Args:
            options: attributes of this class.

        Raises:
            MissingWeights: not on disk and not reachable.
            RecipeError: no such dtype or option.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        known = [name for name in inspect.signature(cls).parameters if name not in ("model", "processor")]
        if unknown := set(options) - set(known):
            raise RecipeError(
                f"a vision-language model has no option {', '.join(unknown)}; it takes {', '.join(known)}"
            )
        folder = locate(Files(str(weights), PATTERNS))
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        return cls(frozen(model, dtype), processor, **options)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def prepare(self) -> None:
        """Nothing is left to be read."""

    def inputs(self, chats: Sequence[Chat], special: Sequence[str] = (), reply: bool = True) -> dict[str, torch.Tensor]:
        """What the model's forward takes for these questions, on the device of their media, in the graph.

        Args:
            chats: all with media of the same kinds.
            special: control tokens that the texts may contain; any other is refused, since a prompt could
                otherwise end its own turn or answer the question.
            reply: end where the model's answer begins.

        Raises:
            RewardError: a text holds a control token, or the processor cuts the gradient.
        """
        self._refuse_control_tokens(chats, special)
        texts = [self._rendered(chat, reply) for chat in chats]
        images, videos = ([chat.media(ndim) for chat in chats] for ndim in (3, 4))
        bos = self.tokenizer.bos_token
        batch = self.processor(
            text=texts,
            images=images if any(images) else None,
            **self._video_arguments(videos),
            images_kwargs={"do_rescale": False, **({"size": dict(self.size)} if self.size else {})},
            text_kwargs={
                "padding": True,
                "padding_side": "left",
                # A template writes the first token itself.
                "add_special_tokens": not (bos and texts[0].startswith(bos)),
            },
            return_tensors="pt",
        )
        self._check_gradient(batch, [tensor for group in (*images, *videos) for tensor in group])
        device = chats[0].device
        return {
            name: value.to(device, self.model.dtype if value.is_floating_point() and "pixel" in name else None)
            for name, value in batch.items()
        }

    def next_logits(self, chats: Sequence[Chat]) -> torch.Tensor:
        """(B, V) float32 logits of the answer's first token."""
        groups = [chats[i : i + self.batch_size] for i in range(0, len(chats), self.batch_size)]
        recompute = self.checkpointing and torch.is_grad_enabled()
        parts = [checkpoint(self._forward, g, use_reentrant=False) if recompute else self._forward(g) for g in groups]
        return torch.cat(parts) if parts else torch.empty(0, len(self.tokenizer))  # type: ignore[arg-type]

    def _forward(self, chats: Sequence[Chat]) -> torch.Tensor:
        inputs = self.inputs(chats)
        model = on(self.model, chats[0].device)
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    def log_probabilities(self, chats: Sequence[Chat], answers: Sequence[str]) -> torch.Tensor:
        """(B, A) log-probability, over the whole vocabulary, that the reply begins with each of the answers.

        All spellings of an answer count, see `answers.spellings`.
        """
        return log_mass(self.next_logits(chats), spellings(self.tokenizer, answers))

    def yes_probability(self, media: torch.Tensor, questions: Sequence[str], among: str = "answers") -> torch.Tensor:
        """(B,) probability in [0, 1] that the model answers yes to `questions[i]` about `media[i]`.

        Args:
            media: (B, 3, H, W) or (B, T, 3, H, W), float in [0, 1].
            among: "answers", sigmoid(logsumexp over spellings of yes - the same of no); "vocabulary", the mass of
                yes in the softmax over all tokens (RewardDance, arXiv 2509.08826).
        """
        chats = [Chat((one, question)) for one, question in zip(media, questions, strict=True)]
        return probability(self.log_probabilities(chats, ("yes", "no")), among)[:, 0]

    @torch.no_grad()
    def texts(self, chats: Sequence[Chat], max_tokens: int = 512) -> list[str]:
        """The most probable reply to each question (temperature 0), without gradients."""
        replies: list[str] = []
        for start in range(0, len(chats), self.batch_size):
            group = chats[start : start + self.batch_size]
            inputs = self.inputs(group)
            model = on(self.model, group[0].device)
            tokens: Any = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)  # type: ignore[operator]
            new = tokens[:, inputs["input_ids"].shape[1] :]
            replies += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [reply.strip() for reply in replies]

    def _rendered(self, chat: Chat, reply: bool) -> str:
        template = self.chat_template or self.processor.chat_template or self.tokenizer.chat_template
        if template:
            return self.processor.apply_chat_template(
                chat.messages(), chat_template=template, add_generation_prompt=reply, tokenize=False
            )
        tokens = {3: lambda: self.processor.image_token, 4: lambda: self.processor.video_token}
        lines = [part if isinstance(part, str) else tokens[part.ndim]() for part in chat.parts]
        return "\n".join([*([chat.system] if chat.system else []), *lines, *(["Answer:"] if reply else [])])

    def _refuse_control_tokens(self, chats: Sequence[Chat], special: Sequence[str]) -> None:
        control = {*self.tokenizer.all_special_tokens, *self.processor.all_special_multimodal_tokens} - set(special)
        for chat in chats:
            for text in (*chat.texts, chat.system):
                if found := [token for token in control if token and token in text]:
                    raise RewardError(
                        f"the text {text[:80]!r} holds {found[0]!r}, a control token of {type(self.model).__name__}, "
                        "which would be read as a command; take it out of the prompt or of the question"
                    )

    def _video_arguments(self, videos: list[list[torch.Tensor]]) -> dict[str, Any]:
        if not any(videos):
            return {}
        from transformers.video_utils import VideoMetadata

        clips = [clip for group in videos for clip in group]
        metadata = [VideoMetadata(len(c), fps=self.fps, frames_indices=list(range(len(c)))) for c in clips]
        options: dict[str, Any] = {"do_rescale": False, "do_sample_frames": False, "video_metadata": metadata}
        if "cap_pixels_per_frame" in inspect.get_annotations(self.processor.video_processor.valid_kwargs):
            options["cap_pixels_per_frame"] = True
        if self.video_size:
            options["size"] = dict(self.video_size)
        return {"videos": videos, "videos_kwargs": options}

    def _check_gradient(self, batch: Mapping[str, torch.Tensor], media: Sequence[torch.Tensor]) -> None:
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in media)
        if wanted and not any(value.requires_grad for name, value in batch.items() if "pixel" in name):
            raise RewardError(
                f"{type(self.processor).__name__} takes the pixels out of torch, so no gradient reaches them; "
                "load it with the torchvision backend of transformers"
            )


def probability(log_probabilities: torch.Tensor, among: str = "answers") -> torch.Tensor:
    """(B, A) probabilities from (B, A) log-probabilities of the answers.

    Args:
        among: "answers" renormalises over the A answers (with two of them the sigmoid of their difference),
            "vocabulary" leaves what other replies get.
    """
    if among not in AMONG:
        raise RecipeError(f"among={among!r}; choose one of {', '.join(AMONG)}")
    return log_probabilities.softmax(1) if among == "answers" else log_probabilities.exp()


def processor_from(model: Any, tokenizer: Any, image_processor: Any = None, chat_template: str | None = None) -> Any:
    """The processor that goes with `model`, put together from parts, as a pipeline holds them.

    Args:
        image_processor: None builds the model's own from its configuration (patch and merge sizes).
        chat_template: None uses the tokenizer's; where that has none either, questions are asked in plain text.

    Raises:
        RecipeError: transformers knows no processor for this model's configuration.
    """
    from transformers import IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    config = model.config
    if type(config) not in PROCESSOR_MAPPING:
        raise RecipeError(f"transformers has no processor for {type(model).__name__} ({type(config).__name__})")
    cls: Any = PROCESSOR_MAPPING[type(config)]
    parts: dict[str, Callable[[], Any]] = {
        "image_processor": lambda: image_processor or _from_config(IMAGE_PROCESSOR_MAPPING, config),
        "tokenizer": lambda: tokenizer,
        "video_processor": lambda: _from_config(VIDEO_PROCESSOR_MAPPING, config),
        "chat_template": lambda: chat_template or tokenizer.chat_template,
        "patch_size": lambda: config.vision_config.patch_size,
        "spatial_merge_size": lambda: config.spatial_merge_size,
        "vision_feature_select_strategy": lambda: config.vision_feature_select_strategy,
    }
    accepted = inspect.signature(cls.__init__).parameters
    return cls(**{name: part() for name, part in parts.items() if name in accepted})


def _from_config(mapping: Any, config: Any) -> Any:
    cls = mapping[type(config)]["torchvision"]
    vision = config.vision_config.to_dict()
    sizes = {
        "patch_size": "patch_size",
        "merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    accepted = {*inspect.get_annotations(cls.valid_kwargs)}
    return cls(**{name: vision[key] for name, key in sizes.items() if name in accepted and key in vision})
