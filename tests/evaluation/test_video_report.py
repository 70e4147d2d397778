"""The report of a run on clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignkit.data.video import write_mp4
from alignkit.evaluation.monitors import findings
from alignkit.evaluation.motion import Band
from alignkit.evaluation.pictures import measure
from alignkit.evaluation.plots import band_plot
from alignkit.evaluation.record import Picture, read_run
from alignkit.evaluation.report import motion_panels, sheets
from tests.evaluation.synthetic_run import write_run
from tests.evaluation.synthetic_video_run import PROMPTS, disc, discs, write_samples
from tests.evaluation.test_report import Page, page

BANDS = ("flow", "brightness")


def said(folder: Path) -> str:
    """The findings about the samples of a run."""
    record = read_run(folder)
    measured = {grid.title: measure(grid.pictures, folder / "samples").statistics for grid in record.grids}
    return " ".join(finding.text for finding in findings(record, measured))


def sources(found: Page, tag: str, kind: str) -> int:
    return sum(name == tag and (attrs["src"] or "").startswith(f"data:{kind};base64,") for name, attrs in found.tags)


def test_the_page_plays_every_clip_and_shows_sheets_and_curves(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.0), discs(1.5))
    found = page(tmp_path)
    assert sources(found, "img", "image/webp") == 2 * len(PROMPTS)
    assert sources(found, "img", "image/png") == 2
    for heading in ("The same prompts and seeds", "Frame by frame", "Motion", "Statistics of the clips"):
        assert heading in found.text
    assert "optical flow, pixels per frame" in found.text and "brightness around the clip's mean" in found.text
    assert [tag for tag, _ in found.tags].count("svg") == 2
    assert all(name in found.text for name in ("frame difference", "flicker", "flow", "saturated fraction"))
    assert "Motion fell" not in found.text and "script" not in {tag for tag, _ in found.tags}


def test_clips_in_h264_play_by_themselves_without_a_sound(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.0), discs(0.0, texture=0.0))
    found = page(tmp_path)
    assert sources(found, "video", "video/mp4") == len(PROMPTS) == sources(found, "img", "image/webp")
    assert all({"autoplay", "loop", "muted"} <= set(attrs) for tag, attrs in found.tags if tag == "video")
    (policy,) = [content for content in found.attributes("content") if "default-src" in content]
    assert "media-src data:" in policy


@pytest.mark.parametrize("texture", [0.02, 0.0])
def test_an_aligned_model_that_stands_still_raises_the_alarm(tmp_path: Path, texture: float) -> None:
    write_samples(tmp_path / "samples", discs(2.0), discs(0.0, texture=texture))
    assert "Motion fell to" in page(tmp_path).text and "pays for still clips" in said(tmp_path)


def test_flicker_that_vanished_is_no_motion_that_vanished(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.5, flicker=0.6), discs(1.5))
    assert "Motion fell" not in said(tmp_path)


def test_flicker_that_came_is_said(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.5), discs(1.5, flicker=0.6))
    assert "flicker 0.0" in said(tmp_path)


def test_clips_are_measured_as_they_were_before_they_were_enlarged(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.5), discs(1.5))
    index = json.loads((tmp_path / "samples" / "index.json").read_text())
    for image in index[1]["images"]:
        del image["scale"]
    (tmp_path / "samples" / "index.json").write_text(json.dumps(index))
    own, enlarged = (measure(grid.pictures, tmp_path / "samples") for grid in read_run(tmp_path).grids)
    assert enlarged.statistics["flow"].mean > 1.5 * own.statistics["flow"].mean
    assert own.bands["flow"].mean != enlarged.bands["flow"].mean


def test_only_sheets_inside_the_samples_folder_are_embedded(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.0), discs(1.0))
    (tmp_path / "samples" / "base" / "sheet.png").rename(tmp_path / "outside.png")
    index = json.loads((tmp_path / "samples" / "index.json").read_text())
    index[0]["sheet"] = "../outside.png"
    index[1]["sheet"] = 3
    (tmp_path / "samples" / "index.json").write_text(json.dumps(index))
    ((title, shown),) = sheets(read_run(tmp_path).grids, tmp_path / "samples")
    assert title == "base" and not shown.uri and "outside samples/" in shown.problem
    assert "outside samples/" in page(tmp_path).text


def test_a_damaged_clip_is_left_out_and_the_others_are_measured(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", discs(1.0), [disc((0.0, 0.0), texture=0.0), *discs(1.0)[1:]])
    for name in ("base/00.webp", "aligned/00.mp4"):
        file = tmp_path / "samples" / name
        file.write_bytes(file.read_bytes()[:200])
    for grid in read_run(tmp_path).grids:
        whole, rest = (measure(pictures, tmp_path / "samples") for pictures in (grid.pictures, grid.pictures[1:]))
        assert whole.statistics == rest.statistics
    assert "Motion" in page(tmp_path).text


def test_a_run_on_images_has_no_curves_of_motion(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "quickstart", steps=2)
    (run / "metrics.jsonl").unlink()
    text = page(run).text
    assert "Frame by frame" not in text and "Image statistics" in text and "flicker" not in text


def test_a_file_that_is_small_and_decodes_to_more_than_memory_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mp4(tmp_path / "a.mp4", torch.zeros(20, 3, 64, 64), 8.0)
    picture = Picture(tmp_path / "a.mp4", "a disc", {}, None)
    assert measure([picture], tmp_path).statistics
    monkeypatch.setattr("alignkit.evaluation.pictures.MAX_PIXELS", 19 * 64 * 64)
    assert not measure([picture], tmp_path).statistics


@pytest.mark.parametrize("damage", ["cut", "codec", "scale"])
def test_no_damaged_sample_keeps_the_page_from_being_made(damage: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (0, 0, 20 * i)) for i in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    files = [tmp_path / "a.gif"]
    if damage == "cut":
        files = [tmp_path / f"{length}.gif" for length in range(13, len(content))]
        for length, file in enumerate(files, start=13):
            file.write_bytes(content[:length])
    if damage == "codec":
        files = [tmp_path / "a.mp4"]
        write_mp4(files[0], torch.zeros(5, 3, 32, 32), 8.0)
        files[0].write_bytes(files[0].read_bytes().replace(b"avc1", b"none"))
    scale = 99 if damage == "scale" else 1
    for file in files:
        measure([Picture(file, "a disc", {}, None, scale)], tmp_path)
    assert not measure([Picture(files[0], "a disc", {}, None, scale)], tmp_path).statistics


def test_any_number_of_grids_has_its_curves() -> None:
    for count in (1, 2, 6, 9):
        bands = {f"grid {i}": {n: Band((1.0, 2.0), (0.1, 0.2), (0.0, 0.1)) for n in BANDS} for i in range(count)}
        assert all(f"grid {count - 1}" in panel.svg or count == 1 for panel in motion_panels(bands))


def test_two_frames_make_a_point_that_is_seen() -> None:
    line = band_plot({"base": Band((1.0, 2.0), (0.1, 0.2), (0.0, 0.0))}, ["#123456"])
    point = band_plot({"base": Band((1.0,), (0.1,), (0.0,))}, ["#123456"])
    assert "<use" in point and point.count("#123456") > line.count("#123456")
