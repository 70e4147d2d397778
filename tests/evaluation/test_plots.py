from __future__ import annotations

from xml.etree import ElementTree

import pytest

from alignkit.evaluation.motion import Band
from alignkit.evaluation.plots import band_plot, line_plot, running_mean
from alignkit.evaluation.record import Series

SVG = "{http://www.w3.org/2000/svg}"
LINE = Series((0.0, 1.0, 2.0), (0.1, 0.5, 0.4))


@pytest.mark.parametrize("label", ["ocr", "</svg><script>alert(1)</script>", "costs $5 or $6", "€ & <"])
def test_a_label_is_text_whatever_it_contains(label: str) -> None:
    root = ElementTree.fromstring(line_plot({label: LINE, "other": LINE}, ["#000", "#111"]))
    assert root.tag == f"{SVG}svg" and "width" not in root.attrib and "viewBox" in root.attrib
    assert not list(root.iter(f"{SVG}script"))
    assert label in [text.text for text in root.iter(f"{SVG}text")]


def test_the_same_lines_give_the_same_bytes() -> None:
    assert line_plot({"ocr": LINE}, ["#000"]) == line_plot({"ocr": LINE}, ["#000"])


def test_a_level_is_drawn_and_named() -> None:
    assert "base with guidance" in line_plot({"ocr": LINE}, ["#000"], {"base with guidance": 0.3})


def test_the_running_mean_keeps_constants_and_length_and_smooths() -> None:
    assert running_mean([2.0] * 50) == [2.0] * 50
    noisy = [float(i % 2) for i in range(100)]
    assert max(running_mean(noisy)) - min(running_mean(noisy)) < 0.4


def test_a_band_is_drawn_around_each_mean_and_labels_are_text() -> None:
    band = Band((1.0, 2.0, 3.0), (0.1, 0.5, 0.4), (0.1, 0.2, 0.0))
    hostile = "</svg><script>alert(1)</script>"
    root = ElementTree.fromstring(band_plot({"base": band, hostile: band}, ["#010203", "#0a0b0c"]))
    filled = [path for path in root.iter(f"{SVG}path") if "fill-opacity: 0.16" in path.get("style", "")]
    filled += [use for use in root.iter(f"{SVG}use") if "fill-opacity: 0.16" in use.get("style", "")]
    assert len(filled) == 2
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert hostile in texts and "frame" in texts and not list(root.iter(f"{SVG}script"))
