"""How well the text that a prompt asks for can be read: normalised edit distance of what RapidOCR reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.pixels import to_uint8
from alignkit.rewards.text import similarity, targets
from alignkit.types import Prompt


@runtime_checkable
class TextReader(Protocol):
    """Whatever reads text from images."""

    def read(self, media: torch.Tensor) -> list[str]: ...

    def describe(self) -> dict[str, Any]: ...


class OCR:
    """1 - normalised edit distance between the text that is read and the text that the prompt asks for.

    Case and white space do not count, extra text costs as much as missing text (`alignkit.rewards.text`).

    Args:
        engine: "rapidocr", "tesseract", or a `TextReader`.
        detect: find the lines of text first, for pictures with text somewhere; False reads the whole image
            as one line, for signs and crops, and is several times faster.
        threads: CPU threads of the engine, at least 1; None: as many as torch uses.
    """

    name = "ocr"
    kind = "image"
    differentiable = False

    def __init__(self, engine: str | TextReader = "rapidocr", detect: bool = False, threads: int | None = None) -> None:
        threads = min(torch.get_num_threads(), os.cpu_count() or 1) if threads is None else threads
        self.reader = _reader(engine, detect, threads)

    def read(self, media: torch.Tensor) -> list[str]:
        """The text on each image of (B, 3, H, W), float in [0, 1]; "" where none is found."""
        return self.reader.read(media)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a text to draw."""
        targets(prompts)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]."""
        wanted = targets(prompts)
        return similarity(self.read(media), wanted)

    def describe(self) -> dict[str, Any]:
        """Engine, version and options: two engines' scores do not compare."""
        return self.reader.describe()


def _reader(engine: str | TextReader, detect: bool, threads: int) -> TextReader:
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
        recogniser = self._engine.cfg.Rec
        return {
            "engine": "rapidocr",
            "version": version("rapidocr"),
            "onnxruntime": version("onnxruntime"),
            "model": f"{recogniser.ocr_version.value} {recogniser.model_type.value} {recogniser.lang_type}",
            "detect": self.detect,
        }
