"""How well the text that a prompt asks for can be read, on images and videos, by RapidOCR or Tesseract."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.frames import every_nth
from alignkit.rewards.pixels import to_uint8
from alignkit.rewards.text import Match
from alignkit.types import Prompt


@runtime_checkable
class TextReader(Protocol):
    """Whatever reads text from images."""

    def read(self, media: torch.Tensor) -> list[str]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class OCR:
    """1 - normalised edit distance between the text that is read and the text that the prompt asks for.

    Case and white space do not count, extra text costs as much as missing text (`alignkit.rewards.text`).
    The same picture gets different scores from different engines and versions: both are in the record.

    Attributes:
        engine: "rapidocr", "tesseract", or a `TextReader`. RapidOCR's model has the language tag `ch` and also reads
            Latin letters with accents; Tesseract reads `eng` here, its own reward has an option for that.
        detect: find the lines of text first, for pictures with text somewhere; False reads the whole image
            as one line, for signs and crops, and is several times faster.
        threads: CPU threads of the engine, at least 1; None: as many as torch uses.
        formula: "edit", or "flow_grpo" for the published formula, which a picture full of words satisfies.
        extra_text: what a letter too many costs, 0.01 to 1, where a missing one costs 1; of "edit".
        ordered: several targets must be read in the prompt's order; False takes the order that fits best.
    """

    engine: str | TextReader = "rapidocr"
    detect: bool = False
    threads: int | None = None
    formula: str = "edit"
    extra_text: float = 1.0
    ordered: bool = True
    name: str = "ocr"

    kind = "image"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="text",
        summary="the text that the prompt quotes can be read, and no other",
        range="[0, 1]",
        licence="Apache-2.0 (PP-OCR models in RapidOCR's wheel)",
        cost="31 MB of ONNX models on the CPU; about 50 ms a sign, 1 s a picture with detect=True (one core)",
        columns=("target?",),
        source="Flow-GRPO, 2505.05470, with extra text charged",
    )

    def __post_init__(self) -> None:
        _ = self.reader, self.match  # wrong options are refused here and not at the first image

    @cached_property
    def reader(self) -> TextReader:
        """What reads."""
        return reader_of(self.engine, self.detect, self.threads)

    @cached_property
    def match(self) -> Match:
        """How what is read is scored."""
        return Match(self.formula, self.extra_text, self.ordered)

    def read(self, media: torch.Tensor) -> list[str]:
        """The text on each image of (B, 3, H, W), float in [0, 1]; "" where none is found."""
        return self.reader.read(media)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a text to draw."""
        self.match.check(prompts)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]."""
        self.check_prompts(prompts)
        return self.match.scores(self.read(media), prompts)

    def describe(self) -> dict[str, Any]:
        """Engine, version and options: two engines' scores do not compare."""
        return self.reader.describe()


@dataclass(frozen=True, eq=False)
class OCRVideo:
    """`OCR` of every fourth frame, averaged over the frames on which anything of the text was read; 0 if none.

    That average is the published one: text that shows on a single frame is enough. `average="all"` asks for it on
    every sampled frame. Flow-GRPO's video reward is `formula="flow_grpo"`, without the substring shortcut.

    Attributes:
        every: which frames are read: 0, every, 2 every, ...
        average: "positive", over frames with a score above 0, or "all".
        engine, detect, threads, formula, extra_text, ordered: as of `OCR`.
    """

    every: int = 4
    average: str = "positive"
    engine: str | TextReader = "rapidocr"
    detect: bool = False
    threads: int | None = None
    formula: str = "edit"
    extra_text: float = 1.0
    ordered: bool = True
    name: str = "ocr_video"

    kind = "video"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="video",
        summary="the text that the prompt quotes can be read on the sampled frames",
        range="[0, 1]",
        licence="Apache-2.0 (PP-OCR models in RapidOCR's wheel)",
        cost="that of ocr for every fourth frame",
        columns=("target?",),
        source="Flow-GRPO, 2505.05470, with extra text charged",
    )

    def __post_init__(self) -> None:
        if self.average not in ("positive", "all"):
            raise RecipeError(f"average={self.average!r}; choose 'positive' (frames with a score above 0) or 'all'")
        if self.every < 1:
            raise RecipeError(f"every={self.every}; expected at least 1: every frame")
        _ = self.reader, self.match

    @cached_property
    def reader(self) -> TextReader:
        """What reads."""
        return reader_of(self.engine, self.detect, self.threads)

    @cached_property
    def match(self) -> Match:
        """How what is read is scored."""
        return Match(self.formula, self.extra_text, self.ordered, substring=False)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a text to draw."""
        self.match.check(prompts)

    def per_frame(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, F) in [0, 1], the scores of the frames that are read, of (B, T, 3, H, W)."""
        self.check_prompts(prompts)
        frames = media[:, every_nth(media.shape[1], self.every)]
        reads = self.reader.read(rearrange(frames, "b f c h w -> (b f) c h w"))
        scores = self.match.scores(reads, [prompt for prompt in prompts for _ in range(frames.shape[1])])
        return rearrange(scores, "(b f) -> b f", f=frames.shape[1])

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]."""
        scores = self.per_frame(media, prompts)
        return mean_of_positive(scores) if self.average == "positive" else scores.mean(dim=1)

    def describe(self) -> dict[str, Any]:
        """Engine, version and options: two engines' scores do not compare."""
        return self.reader.describe()


def mean_of_positive(scores: torch.Tensor) -> torch.Tensor:
    """(B,) mean over the entries of (B, F) that are above 0; 0 where none is."""
    positive = scores > 0
    return (scores * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)


def reader_of(engine: str | TextReader, detect: bool, threads: int | None) -> TextReader:
    """The reader that the options of a reward ask for.

    Raises:
        RecipeError: no such engine, or a number of threads that it does not take.
        RewardError: the engine is not installed.
    """
    threads = min(torch.get_num_threads(), os.cpu_count() or 1) if threads is None else threads
    if engine == "rapidocr":
        return RapidReader(detect=detect, threads=threads)
    if engine == "tesseract":
        from alignkit.rewards.tesseract import Tesseract

        return Tesseract(page_mode=11 if detect else 7, threads=threads)
    if isinstance(engine, TextReader):
        return engine
    raise RecipeError(f"engine={engine!r}; choose 'rapidocr', 'tesseract' or an object with read() and describe()")


class RapidReader:
    """RapidOCR's PP-OCR models, which ship inside its wheel, on onnxruntime.

    Args:
        detect: find lines first, one image at a time; False recognises whole images as single lines, in
            batches.
        batch: images per call of the recogniser without detection.
    """

    def __init__(self, detect: bool = False, threads: int = 1, batch: int = 16) -> None:
        available = os.cpu_count() or 1
        if not 1 <= threads <= available:
            raise RecipeError(f"threads={threads}; RapidOCR takes 1 to {available} on this machine")
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise RewardError(
                f"the OCR reward needs rapidocr and onnxruntime ({error}): pip install rapidocr onnxruntime"
            ) from error
        self.detect = detect
        self.threads = threads
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_det": detect,
                "Global.use_cls": False,  # it would look for lines that are upside down
                # The recogniser pads to the widest of this shape and its batch: the default, 320 wide, takes
                # four times as long on a small sign. 1 leaves the images' own width, 48 * W / H.
                "Rec.rec_img_shape": [3, 48, 1],
                "Rec.rec_batch_num": batch,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, media: torch.Tensor) -> list[str]:
        """The text on each image of (B, 3, H, W); lines from top to bottom, joined by a space."""
        images = [np.ascontiguousarray(image[..., ::-1]) for image in to_uint8(media)]  # its models were fed BGR
        if not images:
            return []
        if self.detect:
            return [self._read_lines(image) for image in images]
        # `recognize_txt` loads the model at its first call; `text_rec` is None until then (3.10).
        texts = self._engine.recognize_txt(images).txts
        if texts is None:
            raise RewardError(f"RapidOCR returned no result for {len(images)} images")
        return list(texts)

    def _read_lines(self, image: np.ndarray) -> str:
        from rapidocr.utils.output import RapidOCROutput

        found = self._engine(image)
        if not isinstance(found, RapidOCROutput) or found.txts is None:
            return ""
        return " ".join(found.txts)

    def describe(self) -> dict[str, Any]:
        """Engine, versions and options."""
        from rapidocr import LangRec

        recogniser = self._engine.cfg.Rec
        return {
            "engine": "rapidocr",
            "version": version("rapidocr"),
            "onnxruntime": version("onnxruntime"),
            "model": f"{recogniser.ocr_version.value} {recogniser.model_type.value}",
            "language": LangRec(recogniser.lang_type).value,
            "detect": self.detect,
        }
