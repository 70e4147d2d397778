from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from alignkit.data.video import read_video
from alignkit.evaluation.clips import enlargement, playback_rate, write_clip, write_sheet
from alignkit.rewards.pixels import to_uint8
from tests.evaluation.synthetic_video_run import disc


def test_a_clip_is_an_endless_animation_with_every_frame_and_pixel(tmp_path: Path) -> None:
    clip = disc((1.0, 0.0))
    file = write_clip(tmp_path / "a", clip, fps=5.0, scale=3)
    assert file == tmp_path / "a.webp"
    with Image.open(file) as image:
        assert image.info["loop"] == 0
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.info["duration"] == 200
    pixels = np.stack(frames)
    assert pixels.shape == (9, 96, 96, 3)
    np.testing.assert_array_equal(pixels[:, 1::3, 2::3], to_uint8(clip))


def test_a_clip_that_repeats_a_frame_is_written_so_that_none_is_lost(tmp_path: Path) -> None:
    still = disc((0.0, 0.0), texture=0.0)
    file = write_clip(tmp_path / "a", still, fps=8.0, scale=2)
    assert file.suffix == ".mp4"
    frames = read_video(file)
    assert frames.shape == (9, 3, 64, 64)
    torch.testing.assert_close(frames[:, :, ::2, ::2].mean(), still.mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_WEBP_PIXELS"])
def test_what_is_too_large_for_an_animation_is_h264_and_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    clip = disc((1.0, 0.0))
    write_clip(tmp_path / "a", clip, fps=8.0)
    monkeypatch.setattr(f"alignkit.evaluation.clips.{limit}", 1000)
    assert write_clip(tmp_path / "a", clip, fps=8.0) == tmp_path / "a.mp4"
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    monkeypatch.undo()
    assert write_clip(tmp_path / "a", clip, fps=8.0) == tmp_path / "a.webp"
    assert [file.name for file in tmp_path.iterdir()] == ["a.webp"]


def test_a_page_shows_clips_large_enough_and_within_seconds() -> None:
    assert [enlargement(torch.zeros(1, 3, *size)) for size in ((32, 48), (30, 90), (128, 128), (480, 832))] == [
        4,
        5,
        1,
        1,
    ]
    assert [playback_rate(frames) for frames in (9, 40, 80)] == [8, 8, 16]


def test_a_sheet_that_is_too_large_for_a_page_loses_digits_and_not_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sheet = Image.fromarray(noise.numpy())
    assert write_sheet(tmp_path / "sheet", sheet) == tmp_path / "sheet.png"
    monkeypatch.setattr("alignkit.evaluation.clips.MAX_BYTES", 8000)
    file = write_sheet(tmp_path / "sheet", sheet)
    assert file == tmp_path / "sheet.jpg" and file.stat().st_size < 8000
    assert [one.name for one in tmp_path.iterdir()] == ["sheet.jpg"]
