"""Self-reward: a generator asked about its own pictures, through the vision-language model that encodes its prompts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import nn

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.loading import made
from alignkit.rewards.parts import check, files_of, prepare
from alignkit.rewards.region_map import Regions, check_boxes, grid_boxes, regions_of, spans
from alignkit.rewards.vision_language import PATTERNS, VisionLanguage, processor_from
from alignkit.rewards.weights import Files, locate
from alignkit.types import Prompt

Detector = Callable[[torch.Tensor, Sequence[Prompt]], Sequence[torch.Tensor]]

IMAGE_TOKENS = (4, 16384)
"""Fewest and most image tokens of a picture, as Qwen2-VL and Qwen2.5-VL are published."""


@runtime_checkable
class HasPipe(Protocol):
    """What a self-reward needs of a policy: the user's pipeline."""

    pipe: Any


@dataclass(frozen=True, eq=False)
class Understanding:
    """The part of a pipeline that can answer questions about pictures.

    Attributes:
        component: its name in the pipeline.
        model: the very module that encodes the pipeline's prompts.
        processor: of transformers, the pipeline's own or put together from its tokenizer.
    """

    component: str
    model: nn.Module
    processor: Any


def understanding_of(pipe: Any, component: str | None = None, processor: str | None = None) -> Understanding:
    """The vision-language model in a pipeline, found by what its classes can do and not by the pipeline's name.

    Args:
        component: which one, where there are several; None: the first.
        processor: hub id or folder of its processor, where the pipeline has none and none can be made.

    Raises:
        RecipeError: the pipeline has no such model; names its encoders and what each lacks.
    """
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module) and _of_transformers(m)}
    if component is not None and component not in modules:
        raise RecipeError(f"{type(pipe).__name__} has no encoder {component!r}; it has {', '.join(modules) or 'none'}")
    asked = {component: modules[component]} if component is not None else modules
    lacks = {name: lacking(module) for name, module in asked.items()}
    able = [name for name, reason in lacks.items() if reason is None]
    if not able:
        reasons = "; ".join(f"{name} {reason}" for name, reason in lacks.items()) or "it has no encoder of transformers"
        raise RecipeError(
            f"{type(pipe).__name__} cannot judge its own pictures: {reasons}. A self-reward needs a vision-language "
            "model that answers, as in Qwen-Image (Qwen2.5-VL) or FLUX.2 (Mistral 3); otherwise use another judge"
        )
    model = asked[able[0]]
    return Understanding(able[0], model, _processor(pipe, able[0], model, processor))


def _of_transformers(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def lacking(module: Any) -> str | None:
    """What keeps a model of transformers from answering questions about pictures, as the end of a sentence; None:
    nothing does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    classes = {cls.__name__ for cls in type(module).__mro__}
    if not classes & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()):
        if "vision_config" in module.config.to_dict():
            return f"is a {type(module).__name__}, which sees pictures but has no language head to answer with"
        return f"is a {type(module).__name__}, which reads text only"
    if module.get_output_embeddings() is None:
        return f"is a {type(module).__name__} without a language head to answer with"
    return None


def _processor(pipe: Any, component: str, model: Any, source: str | None) -> Any:
    from transformers import PROCESSOR_MAPPING, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

    if source is not None:
        return AutoProcessor.from_pretrained(locate(Files(source, PATTERNS[2:])), local_files_only=True)
    own = [part for part in pipe.components.values() if isinstance(part, ProcessorMixin)]
    wanted: Any = PROCESSOR_MAPPING.get(type(model.config), ProcessorMixin)
    fitting = [part for part in own if isinstance(part, wanted)] or own
    if fitting:
        return fitting[0]
    tokenizers = {n: part for n, part in pipe.components.items() if isinstance(part, PreTrainedTokenizerBase)}
    tokenizer = tokenizers.get(component.replace("text_encoder", "tokenizer"))
    if tokenizer is None:
        raise RecipeError(
            f"{type(pipe).__name__} has no tokenizer for {component}; give `processor`, a hub id or folder"
        )
    return processor_from(model, tokenizer, image_processor_for(model))


def image_processor_for(model: Any) -> Any:
    """The image processor of a Qwen2-VL or Qwen2.5-VL, from the sizes in its config.

    Raises:
        RecipeError: another family, whose normalisation its config does not tell.
    """
    config = model.config
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        raise RecipeError(
            f"the pipeline has no processor for its {type(model).__name__}, and the config does not say how pictures "
            "are normalised; give `processor`, a hub id or folder that has preprocessor_config.json"
        )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    vision = config.vision_config
    area = (vision.patch_size * vision.spatial_merge_size) ** 2
    return Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": IMAGE_TOKENS[0] * area, "longest_edge": IMAGE_TOKENS[1] * area},
    )


def fill(template: str, prompt: Prompt, pattern: str | None) -> str:
    """A question about one prompt: `{prompt}`, the prompt's columns and the named groups of `pattern` are filled in.

    Raises:
        RewardError: the prompt does not match, or lacks a column that the question names.
    """
    found = re.search(pattern, prompt) if pattern else None
    if pattern and found is None:
        raise RewardError(f"prompt {prompt.id} {str(prompt)!r} does not match pattern={pattern!r}")
    values: dict[str, Any] = {**prompt.columns, "prompt": str(prompt), **(found.groupdict() if found else {})}
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    lacking = [name for name in names if values.get(name) is None]
    if lacking:
        raise RewardError(
            f"prompt {prompt.id} {str(prompt)!r} has no {lacking[0]!r}, which the question {template!r} names; add the "
            f"column, or a `pattern` with that group (known here: {', '.join(values)})"
        )
    return template.format_map(values)


@dataclass(frozen=True, eq=False)
class SelfReward:
    """The probability that the generator's own encoder answers yes to questions about its pictures.

    The judge is the pipeline's module itself, frozen; adapters sit on the denoiser and do not change it. It shares the
    generator's blind spots: measure another judge beside it.

    Attributes:
        questions: templates; `{prompt}`, columns and groups of `pattern` are filled in.
        pattern: regular expression with named groups, searched in the prompt.
        combine: "mean" of the probabilities, or "product": a picture has to satisfy all questions.
        region_question: asked about each region's crop, for maps; None: all of `questions`.
        grid: (rows, columns) of the regions where neither the prompt's column `boxes` nor `detector` gives them.
        detector: `(media, prompts) -> [(N, 4)]`, boxes in fractions of each picture; a callable or a spec of one, such
            as "alignkit.rewards.found_boxes:FoundBoxes(labels=('dog',))".
        component: the pipeline's encoder to ask; None: the first that can answer.
        processor: hub id or folder of its processor; None: the pipeline's own, or made from the encoder's config.
        batch_size: questions in one forward.
    """

    questions: tuple[str, ...] = ("Does the picture show this: {prompt}? Answer yes or no.",)
    pattern: str | None = None
    combine: Literal["mean", "product"] = "mean"
    region_question: str | None = None
    grid: tuple[int, int] = (2, 2)
    detector: Any = None
    component: str | None = None
    processor: str | None = None
    batch_size: int = 32
    name: str = "self_reward"
    understanding: Understanding | None = field(default=None, repr=False)

    kind = "image"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="self",
        summary="the generator's own vision-language encoder says that the picture shows what was asked for",
        range="[0, 1]",
        cost="one forward of the pipeline's encoder per question; no other weights",
        columns=("boxes?",),
        source="SRUM 2510.12784 (understanding scores generation)",
    )

    def __post_init__(self) -> None:
        if isinstance(self.questions, str):
            object.__setattr__(self, "questions", (self.questions,))
        if not self.questions:
            raise RecipeError("questions is empty; give at least one, such as ('does the picture show: {prompt}?',)")
        if self.combine not in ("mean", "product"):
            raise RecipeError(f"combine={self.combine!r}; choose 'mean' or 'product'")
        if isinstance(self.detector, str):
            object.__setattr__(self, "detector", made(self.detector))

    def bind(self, policy: Any) -> SelfReward:
        """The same reward with the policy's own encoder, set to evaluation and frozen, as judge.

        Raises:
            RecipeError: the pipeline has none that can answer questions about pictures.
        """
        pipe = policy.pipe if isinstance(policy, HasPipe) else policy
        found = understanding_of(pipe, self.component, self.processor)
        found.model.eval().requires_grad_(False)
        return dataclasses.replace(self, understanding=found)

    @property
    def module(self) -> nn.Module:
        """The judge: the very module of the pipeline."""
        return self._bound().model

    def _bound(self) -> Understanding:
        if self.understanding is None:
            raise RecipeError(
                f"{self.name} asks the generator's own encoder and has none; a run binds it to its policy, elsewhere "
                "call bind(policy)"
            )
        return self.understanding

    def files(self) -> tuple[Files, ...]:
        """The processor where one is named, and what the detector reads; the encoder comes with the pipeline."""
        named = (Files(self.processor, PATTERNS[2:]),) if self.processor is not None else ()
        return named + files_of([self.detector])

    def prepare(self) -> None:
        """Read the detector's weights. Raises RecipeError where no run has bound it."""
        self._bound()
        prepare(self.detector)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt that a question cannot be made for, or whose boxes are none."""
        check(self.detector, prompts)
        for prompt in prompts:
            for template in self._templates(True) + self._templates(False):
                fill(template, prompt, self.pattern)
            if "boxes" in prompt.columns:
                check_boxes(given_boxes(prompt), f"prompt {prompt.id}")

    def describe(self) -> dict[str, Any]:
        """Which component answers what."""
        found = self.understanding
        who = {} if found is None else {"component": found.component, "class": type(found.model).__name__}
        return {**who, "questions": list(self.questions)}

    def _templates(self, region: bool) -> tuple[str, ...]:
        return (self.region_question,) if region and self.region_question else self.questions

    def _ask(self, pictures: Sequence[torch.Tensor], prompts: Sequence[Prompt], region: bool) -> torch.Tensor:
        """(N,) combined probability of yes for N pictures (3, H, W), each with its prompt."""
        templates = self._templates(region)
        asked = [fill(template, prompt, self.pattern) for prompt in prompts for template in templates]
        shown: Any = [picture for picture in pictures for _ in templates]
        found = self._bound()
        judge = VisionLanguage(found.model, found.processor, batch_size=self.batch_size)
        answers = rearrange(judge.yes_probability(shown, asked), "(n q) -> n q", q=len(templates))
        return answers.mean(dim=1) if self.combine == "mean" else answers.prod(dim=1)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1] of (B, 3, H, W)."""
        self._bound()
        return self._ask(list(media), prompts, region=False) if len(media) else media.new_empty(0)

    def boxes(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """Boxes (N, 4) of each picture: the detector's, else the prompt's column `boxes`, else the grid's.

        Raises:
            RewardError: boxes that are not fractions of the picture.
        """
        if self.detector is not None:
            given = list(self.detector(media, prompts))
        else:
            given = [given_boxes(p) if "boxes" in p.columns else grid_boxes(*self.grid) for p in prompts]
        return [check_boxes(boxes, f"prompt {p.id}") for boxes, p in zip(given, prompts, strict=True)]

    def regions(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> list[Regions]:
        """Every region's crop and the whole of each picture, judged alone."""
        boxes = self.boxes(media, prompts)
        crops = [crop(one, box) for one, around in zip(media, boxes, strict=True) for box in around.tolist()]
        whose = [prompt for prompt, around in zip(prompts, boxes, strict=True) for _ in around]
        answers = self._ask(crops, whose, region=True) if crops else media.new_empty(0)
        parts = answers.detach().cpu().split([len(around) for around in boxes])
        overall = self(media, prompts).tolist()
        return [regions_of(around, part, whole) for around, part, whole in zip(boxes, parts, overall, strict=True)]


def given_boxes(prompt: Prompt) -> torch.Tensor:
    """(N, 4) boxes of the column `boxes`: four numbers each, or `{"label": ..., "box": [...]}`."""
    boxes = [one["box"] if isinstance(one, Mapping) else one for one in prompt.columns["boxes"]]
    return torch.tensor(boxes, dtype=torch.float32)


def crop(picture: torch.Tensor, box: Sequence[float]) -> torch.Tensor:
    """The part (3, h, w) of a picture (3, H, W) inside a box in fractions."""
    rows, columns = spans(box, *picture.shape[-2:])
    return picture[:, rows, columns]
