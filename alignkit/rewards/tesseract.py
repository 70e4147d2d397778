"""Tesseract as a second reader: a judge that shares neither model nor code with the reader is trained on."""

from __future__ import annotations

import os
import re
import shutil
import string
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.pixels import to_uint8
from alignkit.rewards.text import Match, targets
from alignkit.types import Prompt


def available() -> bool:
    """Whether the program `tesseract` is installed."""
    return shutil.which("tesseract") is not None


@dataclass(frozen=True, eq=False)
class Tesseract:
    """1 - normalised edit distance between what Tesseract reads and what the prompt asks for.

    Attributes:
        whitelist: the characters it may read; None for all, which reads capitals as well as a whitelist of
            them does. A target with other characters is refused rather than scored low.
        page_mode: Tesseract's `--psm`: 7 one line, 8 one word, 6 a block, 11 text anywhere. On 72 clean signs of
            3 to 5 letters, 32x64, 7 read all and 8 read 82 % (5.3.0).
        scale: how much images are enlarged; it wants letters of about 30 pixels.
        threads: OpenMP threads of the program.
        timeout: seconds for one batch.
        language: Tesseract's tags, "eng", "deu", several as "eng+deu"; each is a package of its own
            (`tesseract-ocr-deu`).
        formula, extra_text, ordered: as of `alignkit.rewards.ocr.OCR`.

    Raises:
        RewardError: the program is not installed, or has not this language.
    """

    whitelist: str | None = None
    page_mode: int = 7
    scale: int = 4
    threads: int = 1
    timeout: float = 120.0
    language: str = "eng"
    formula: str = "edit"
    extra_text: float = 1.0
    ordered: bool = True
    name: str = "tesseract"

    kind = "image"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="text",
        summary="as ocr, read by another engine: a judge that training need not see",
        range="[0, 1]",
        licence="Apache-2.0",
        cost="a program on the CPU, about 30 ms a sign",
        columns=("target?",),
        source="Flow-GRPO, 2505.05470, with extra text charged",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.page_mode <= 13 or self.scale < 1 or self.threads < 1:
            raise RecipeError(
                f"page_mode={self.page_mode}, scale={self.scale}, threads={self.threads}; expected page_mode in 0..13, "
                "the others >= 1"
            )
        _ = self._program, self.match
        if self.language != "eng":  # which every package of the program brings
            lacking = sorted(set(self.language.split("+")) - self._languages())
            if lacking:
                raise RewardError(
                    f"language={self.language!r}: tesseract has not {', '.join(lacking)}, only "
                    f"{', '.join(sorted(self._languages()))}; Debian and Ubuntu: apt-get install "
                    f"tesseract-ocr-{lacking[0]}"
                )

    @cached_property
    def _program(self) -> str:
        program = shutil.which("tesseract")
        if program is None:
            raise RewardError(
                "the program tesseract is not installed; Debian and Ubuntu: apt-get install tesseract-ocr, "
                "macOS: brew install tesseract, Windows: winget install UB-Mannheim.TesseractOCR"
            )
        return program

    def _languages(self) -> set[str]:
        shown = subprocess.run([self._program, "--list-langs"], capture_output=True, text=True, check=True)
        return set((shown.stdout or shown.stderr).split("\n")[1:]) - {""}

    @cached_property
    def match(self) -> Match:
        """How what is read is scored."""
        return Match(self.formula, self.extra_text, self.ordered)

    def read(self, media: torch.Tensor) -> list[str]:
        """The text on each image of (B, 3, H, W), float in [0, 1]; one call for the whole batch."""
        images = [enlarged(grey, self.scale) for grey in map(dark_on_light, to_uint8(media))]
        if not images:
            return []
        with tempfile.TemporaryDirectory(prefix="alignkit-tesseract-") as folder:
            paths = [Path(folder, f"{index:06d}.png") for index in range(len(images))]
            for image, path in zip(images, paths):
                image.save(path, compress_level=1)
            listing = Path(folder, "images.txt")
            listing.write_text("\n".join(map(str, paths)), encoding="utf-8")
            output = self._run([str(listing), "stdout"])
        pages = output.split("\f")
        if len(pages) == len(images) + 1 and not pages[-1].strip():
            pages.pop()  # version 4 writes the separator after each page, version 5 between pages
        if len(pages) != len(images):
            raise RewardError(f"tesseract answered for {len(pages)} of {len(images)} images:\n{output[-500:]}")
        return [" ".join(page.split()) for page in pages]

    def _run(self, arguments: list[str]) -> str:
        command = [self._program, *arguments, "-l", self.language, "--dpi", "300", "--psm", str(self.page_mode)]
        if self.whitelist is not None:
            command += ["-c", f"tessedit_char_whitelist={self.whitelist}"]
        environment = {**os.environ, "OMP_THREAD_LIMIT": str(self.threads)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=self.timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise RewardError(f"tesseract took longer than {self.timeout:g} s; raise `timeout`") from error
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip()[-500:]
            raise RewardError(f"tesseract stopped with code {done.returncode}: {reason}")
        return done.stdout.decode("utf-8")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError for a prompt without a target, or with one that the whitelist cannot read."""
        self.match.check(prompts)
        if self.whitelist is None:
            return
        readable = {character.casefold() for character in self.whitelist}
        for prompt, target in zip(prompts, targets(prompts)):
            unreadable = sorted(set(target.casefold()) - readable - set(string.whitespace))
            if unreadable:
                raise RewardError(
                    f"prompt {prompt.id}: the target {target!r} has {''.join(unreadable)!r}, which whitelist="
                    f"{self.whitelist!r} does not let Tesseract read; pass whitelist=None or a longer one"
                )

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]."""
        self.check_prompts(prompts)
        return self.match.scores(self.read(media), prompts)

    def describe(self) -> dict[str, Any]:
        """Engine, version and options."""
        shown = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"tesseract v?(\S+)", shown.stdout + shown.stderr)
        return {
            "engine": "tesseract",
            "version": found.group(1) if found else "unknown",
            "language": self.language,
            "page_mode": self.page_mode,
            "scale": self.scale,
            "whitelist": self.whitelist,
        }


def dark_on_light(pixels: np.ndarray) -> np.ndarray:
    """(H, W) uint8 grey with dark text from (H, W, 3) RGB, as Tesseract was trained.

    The border's median is taken for the background and the tenth of the pixels farthest from it for the text.
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    distance = np.abs(grey.astype(np.float32) - background)
    text = grey[distance >= np.quantile(distance, 0.9)].mean()
    return 255 - grey if text > background else grey


def enlarged(grey: np.ndarray, scale: int) -> Image.Image:
    """The image `scale` times as large, contrast stretched, sharpened, with a margin of its background.

    Without the sharpening Tesseract gives up on blur that people and RapidOCR hardly notice: 64 strings of 3 to
    5 letters on 32x64, blurred with sigma 1, were read exactly in 64 % and with it in 89 % (not blurred: 89 %
    and 94 %).
    """
    image = ImageOps.autocontrast(Image.fromarray(grey))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    margin = 4 * scale
    fill = int(np.median(np.asarray(image)[[0, -1]]))
    image = ImageOps.expand(image, border=margin, fill=fill)
    return image.filter(ImageFilter.UnsharpMask(radius=2 * scale, percent=200, threshold=0))
