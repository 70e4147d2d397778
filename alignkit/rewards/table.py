"""The rewards that have a short name, and where each of them lives."""

from __future__ import annotations

TABLE: dict[str, str] = {
    "ocr": "alignkit.rewards.ocr:OCR",
    "tesseract": "alignkit.rewards.tesseract:Tesseract",
    "sign_color": "alignkit.rewards.color:SignColor",
    "jpeg_compressibility": "alignkit.rewards.jpeg:JPEGCompressibility",
    "jpeg_incompressibility": "alignkit.rewards.jpeg:JPEGIncompressibility",
    "brightness": "alignkit.rewards.statistics:Brightness",
}
