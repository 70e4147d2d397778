"""Video files: every codec, turned, cut short or damaged, gives its frames or a sentence; written clips come back."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from alignkit.data import video_decoding
from alignkit.data.frames import at_rate, every_nth, middles, uniform
from alignkit.data.video import contact_sheet, read_pixels, read_video, write_mp4, write_webp
from alignkit.data.video_decoding import decoded, inspect_video
from alignkit.errors import DataError

CODECS = {
    "H.264": ("libx264", "a.mp4", {}),
    "HEVC": ("libx265", "a.mp4", {"x265-params": "log-level=none"}),
    "VP9": ("libvpx-vp9", "a.webm", {}),
    "AV1": ("libsvtav1", "a.mp4", {"svtav1-params": "lp=1"}),
}
HIGH, WIDE = 48, 64
EIGHT = Fraction(8)
DECORD = importlib.util.find_spec("decord") is not None
needs_decord = pytest.mark.skipif(not DECORD, reason="decord has no wheel for this platform")


def clip(frames: int = 9, high: int = HIGH, wide: int = WIDE) -> np.ndarray:
    """(T, H, W, 3) uint8: red grows with time, the corner at the top left is green, the lower half blue."""
    pixels = np.zeros((frames, high, wide, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 250, frames).round().astype(np.uint8)[:, None, None]
    pixels[:, : high // 2, : wide // 2, 1] = 200
    pixels[:, high // 2 :, :, 2] = 150
    return pixels


def encoded(
    path: Path,
    codec: str = "libx264",
    pixels: np.ndarray | None = None,
    *,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
    sound: bool = False,
    rate: Fraction = EIGHT,
) -> Path:
    """A video file of `pixels` at a constant rate, or with a time of its own for every frame."""
    pixels = clip() if pixels is None else pixels
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        audio = file.add_stream("aac", rate=16000) if sound else None
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, one in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(one, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if audio is not None:
            add_sound(file, audio)
    return path


def add_sound(file: av.container.OutputContainer, stream: av.AudioStream) -> None:
    for k in range(8):
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 1024 * k
        file.mux(stream.encode(silence))
    file.mux(stream.encode())


def away_from(pixels: torch.Tensor, frames: np.ndarray) -> float:
    """Mean distance of (T, 3, H, W) in [0, 1] from (T, H, W, 3) uint8, in grey levels."""
    wanted = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> t c h w").float()
    assert pixels.shape == wanted.shape
    return float((pixels * 255 - wanted).abs().mean())


def quietly(read: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test was told, another is told again."""
    monkeypatch.setattr(video_decoding, "_beyond_decord", set())
    monkeypatch.setattr(video_decoding, "_said", set())


# codecs and libraries


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_is_read_with_all_its_frames_in_order(name: str, tmp_path: Path) -> None:
    codec, file, options = CODECS[name]
    path = encoded(tmp_path / file, codec, options=options)
    pixels = quietly(lambda: read_video(path))
    assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1
    assert away_from(pixels, clip()) < 4


@needs_decord
@pytest.mark.parametrize("name", ["H.264", "HEVC", "VP9"])
def test_decord_decodes_it_and_pyav_gives_the_same_colours(name: str, tmp_path: Path) -> None:
    codec, file, options = CODECS[name]
    path = encoded(tmp_path / file, codec, options=options)
    facts = inspect_video(path)
    own, library = decoded(path, facts, range(9))
    assert library == "decord"
    other = video_decoding._by_av(path, facts, range(9))
    assert np.abs(own.astype(int) - other).max() <= 2


@needs_decord
def test_av1_goes_to_pyav_and_says_so_once(tmp_path: Path) -> None:
    codec, _, options = CODECS["AV1"]
    path = encoded(tmp_path / "clip.mp4", codec, options=options)
    with pytest.warns(UserWarning) as said:
        _, library = decoded(path, inspect_video(path), [0])
    assert library == "av"
    assert [str(one.message) for one in said] == ["clip.mp4 is AV1, which decord cannot decode; using PyAV"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_video(path, 1).shape == (1, 3, HIGH, WIDE)


@needs_decord
def test_files_that_decord_cannot_read_do_not_shut_it_off_and_are_said_once(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    first, *rest = [Image.fromarray(one) for one in clip(3)]
    first.save(path, save_all=True, append_images=rest, duration=100)
    with pytest.warns(UserWarning, match=r"a\.gif \(GIF\) cannot be read by decord; using PyAV"):
        assert len(read_video(path)) == 3
    narrow = encoded(tmp_path / "b.mp4", pixels=clip(9, 32, 48))  # decord pads rows of 48 pixels and fails
    with pytest.warns(UserWarning, match=r"b\.mp4 \(H\.264\) cannot be read by decord; using PyAV"):
        assert away_from(read_video(narrow), clip(9, 32, 48)) < 4
    video = encoded(tmp_path / "a.mp4")
    assert decoded(video, inspect_video(video), [0])[1] == "decord"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_video(narrow)


def test_without_decord_pyav_reads_everything_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encoded(tmp_path / "a.mp4")
    with_both = read_video(path)
    monkeypatch.setattr(video_decoding, "_decord", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(path, inspect_video(path), [0])[1] == "av"
        torch.testing.assert_close(read_video(path), with_both, rtol=0, atol=2.1 / 255)


def test_sound_is_ignored_and_one_frame_is_a_video(tmp_path: Path) -> None:
    assert away_from(read_video(encoded(tmp_path / "a.mp4", sound=True)), clip()) < 4
    assert away_from(read_video(encoded(tmp_path / "b.mp4", pixels=clip(1))), clip(1)) < 4


# which frames


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (3, [0, 4, 8]),
        (lambda count: every_nth(count, 4), [0, 4, 8]),
        (lambda count: middles(count, 3), [1, 4, 7]),
        (lambda count: [8, 0, 0], [8, 0, 0]),
    ],
)
@pytest.mark.parametrize("library", ["decord", "av"])
def test_frames_are_chosen_by_index(
    choice: int | Callable[[int], list[int]],
    expected: list[int],
    library: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if library == "av":
        monkeypatch.setattr(video_decoding, "_decord", lambda: None)
    assert away_from(read_video(encoded(tmp_path / "a.mp4"), choice), clip()[expected]) < 4


def test_frames_are_chosen_by_time_where_the_rate_varies(tmp_path: Path) -> None:
    times = [0, 100, 200, 300, 1000, 1100, 1200, 2000, 2100]
    path = encoded(tmp_path / "a.mp4", milliseconds=times)
    facts = inspect_video(path)
    assert facts.times == pytest.approx([time / 1000 for time in times])
    # on screen at 0, 0.5, 1, 1.5 and 2 seconds; by index at the mean rate they would be 0, 3, 6
    assert away_from(read_video(path, fps=2), clip()[[0, 3, 4, 6, 7]]) < 4
    assert away_from(read_video(path, 3), clip()[[0, 4, 8]]) < 4


def test_the_frame_on_screen_is_the_last_that_appeared() -> None:
    assert at_rate([0.0, 0.5, 0.75, 2.0], 2.0) == [0, 1, 2, 2, 3]
    assert at_rate([10.0, 10.125, 10.25, 10.375], 8.0) == [0, 1, 2, 3]
    assert at_rate([round(k / 24, 3) for k in range(24)], 24.0) == [*range(24)]  # rounded to the file's clock
    assert at_rate([0.0], 2.0) == [0]


def test_only_the_chosen_frames_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoding, "_decord", lambda: None)
    one = 3 * 240 * 320
    path = encoded(tmp_path / "a.mp4", pixels=clip(60, 240, 320), options={"preset": "ultrafast"})
    tracemalloc.start()
    read_video(path, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 * one <= peak < 12 * one  # two frames as bytes and as float, twice while they are divided; not 60


def test_pyav_stops_at_the_last_chosen_frame(tmp_path: Path) -> None:
    path = encoded(tmp_path / "a.mp4", pixels=clip(60))
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start + (end - start) * 2 // 3 : end] = b"\x7f" * (end - start - (end - start) * 2 // 3)
    path.write_bytes(content)
    facts = inspect_video(path)
    assert len(video_decoding._by_av(path, facts, [1, 0])) == 2
    with pytest.raises(DataError, match=r"a\.mp4 is damaged: frame \d+ of 60 cannot be decoded"):
        video_decoding._by_av(path, facts, [59])


def test_frames_that_are_not_there_are_refused_with_the_file(tmp_path: Path) -> None:
    path = encoded(tmp_path / "a.mp4")
    with pytest.raises(DataError, match=r"a\.mp4 has 9 frames, expected at least 10"):
        read_video(path, 10)
    for indices in ([9], [-1], []):
        with pytest.raises(DataError, match=r"a\.mp4 has 9 frames, and those asked for"):
            read_video(path, lambda count, wanted=indices: wanted)
    with pytest.raises(DataError, match="by index or by time"):
        read_video(path, 2, fps=2)
    with pytest.raises(DataError, match="no frames; expected 000"):
        (tmp_path / "clip").mkdir()
        read_video(tmp_path / "clip")


# turned


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The file with another display matrix, which stands behind the 40 bytes of `tkhd` before it."""
    a, b, c, d = (value * 65536 for value in matrix)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["H.264", "AV1"])
@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1, (1, 2))),  # a quarter to the right, as a phone held upright
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1, (1, 2))),
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2, (1, 2))),
        ((-1, 0, 0, 1), lambda pixels: pixels[:, :, ::-1]),
    ],
)
def test_a_video_is_turned_as_it_says(
    name: str, matrix: tuple[int, int, int, int], shown: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    codec, file, options = CODECS[name]
    path = turned(encoded(tmp_path / file, codec, options=options), matrix)
    assert away_from(quietly(lambda: read_video(path)), shown(clip())) < 4


def test_a_video_that_is_turned_by_no_quarter_is_refused(tmp_path: Path) -> None:
    path = turned(encoded(tmp_path / "a.mp4"), (1, 1, -1, 1))
    with pytest.raises(DataError, match=r"a\.mp4 says to turn it by .*expected quarter turns"):
        read_video(path)


# what is wrong with a file


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        add_sound(file, file.add_stream("aac", rate=16000))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


FAULTS = {
    "missing": (lambda f: f / "a.mp4", "is not there"),
    "empty": (lambda f: written(f / "a.mp4", b""), "is empty"),
    "another type": (
        lambda f: written(f / "a.mp4", b"<html>404"),
        "cannot be read as a video: it begins with b'<html>404'",
    ),
    "cut, index at the end": (
        lambda f: cut(encoded(f / "a.mp4"), 0.5),
        "is truncated or damaged: it begins as a video",
    ),
    "cut, index at the start": (
        lambda f: cut(encoded(f / "a.mp4", pixels=clip(60), container={"movflags": "faststart"}), 0.8),
        r"is truncated: \d+ of 60 frames are there",
    ),
    "cut, no index": (
        lambda f: cut(encoded(f / "a.webm", "libvpx-vp9", clip(60)), 0.7),
        r"is truncated: its last \d.* seconds are not there",
    ),
    "cut in the header": (lambda f: cut(encoded(f / "a.webm", "libvpx-vp9"), 0.5), "is truncated: .* holds no frame"),
    "sound only": (lambda f: sound_only(f / "a.mp4"), "has no video stream, only audio"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_file_has_its_own_sentence(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = FAULTS[fault]
    path = make(tmp_path)
    with pytest.raises(DataError, match=rf"{path.name} {message}") as refused:
        read_video(path)
    assert "/src/video/" not in str(refused.value) and "wanted index" not in str(refused.value)
    assert "moov" not in capfd.readouterr().err


def test_long_frames_are_no_truncation(tmp_path: Path) -> None:
    path = encoded(tmp_path / "a.webm", "libvpx-vp9", clip(3), rate=Fraction(1, 5))  # the last one lasts five seconds
    assert inspect_video(path).times == pytest.approx([0, 5, 10])


# writing


@pytest.mark.parametrize(("high", "wide"), [(32, 32), (33, 47)])
def test_a_written_mp4_comes_back_with_even_sides(high: int, wide: int, tmp_path: Path) -> None:
    pixels = clip(9, high, wide)
    media = rearrange(torch.from_numpy(pixels), "t h w c -> t c h w").float() / 255
    path = tmp_path / "new" / "a.mp4"
    write_mp4(path, media, fps=23.976)
    facts = inspect_video(path)
    assert (facts.codec, facts.fps) == ("h264", pytest.approx(23.976, abs=1e-4))
    padded = np.pad(pixels, ((0, 0), (0, high % 2), (0, wide % 2), (0, 0)), mode="edge")
    assert away_from(read_video(path), padded) < 4
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


@needs_decord
def test_a_written_mp4_has_the_same_colours_in_both_libraries(tmp_path: Path) -> None:
    colours = torch.tensor([[0.86, 0.18, 0.18], [0.18, 0.73, 0.25], [0.22, 0.33, 0.92], [1, 1, 1], [0, 0, 0]])
    write_mp4(tmp_path / "a.mp4", colours[:, :, None, None].expand(5, 3, 32, 32), fps=8)
    facts = inspect_video(tmp_path / "a.mp4")
    for pixels in (
        decoded(tmp_path / "a.mp4", facts, range(5))[0],
        video_decoding._by_av(tmp_path / "a.mp4", facts, range(5)),
    ):
        found = torch.from_numpy(pixels[:, 16, 16]).float() / 255
        torch.testing.assert_close(found, colours, rtol=0, atol=6 / 255)


def test_a_written_webp_is_lossless_and_loops(tmp_path: Path) -> None:
    media = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    write_webp(tmp_path / "a.webp", media, fps=30, scale=3)
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (18, 24), 0)
        lengths = []
        for k in range(5):
            image.seek(k)
            shown = torch.from_numpy(np.array(image.convert("RGB")))[1::3, 1::3]
            torch.testing.assert_close(
                rearrange(shown, "h w c -> c h w").float() / 255, media[k], rtol=0, atol=0.51 / 255
            )
            image.load()
            lengths.append(image.info["duration"])
    assert lengths == [33, 34, 33, 33, 34]  # 166.7 ms in all


def test_a_contact_sheet_has_clips_as_rows_and_spread_frames_as_columns() -> None:
    media = torch.arange(2 * 9).reshape(2, 9, 1, 1, 1).expand(2, 9, 3, 4, 4) / 255
    sheet = np.asarray(contact_sheet(media, columns=3, scale=2))
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert sheet[6::10, 6::10, 0].tolist() == [[0, 4, 8], [9, 13, 17]]
    assert (sheet[:2] == 200).all() and (sheet[:, -2:] == 200).all() and (sheet[10:12] == 200).all()
    assert contact_sheet(media, rows=1).size == (9 * 6 + 2, 6 + 2)


@pytest.mark.parametrize("write", [lambda p, m: write_mp4(p, m, 8), lambda p, m: write_webp(p, m, 8)])
def test_what_cannot_be_written_leaves_the_old_file(
    write: Callable[[Path, torch.Tensor], None], tmp_path: Path
) -> None:
    path = written(tmp_path / "a", b"old")
    broken = torch.zeros(2, 3, 8, 8)
    broken[1, 0, 0, 0] = torch.nan
    for media, message in ((broken, "NaN or infinite"), (torch.zeros(3, 8, 8), r"\(T, 3, H, W\)")):
        with pytest.raises(DataError, match=message):
            write(path, media)
    with pytest.raises(DataError, match="fps=0"):
        write_mp4(path, torch.zeros(2, 3, 8, 8), fps=0)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_choices_of_frames_are_those_of_rewards() -> None:
    from alignkit.rewards import frames

    assert frames.uniform is uniform


# files that were made to harm


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    encoded(tmp_path / "private" / "a.mp4")
    (tmp_path / "b.mp4").write_text("ffconcat version 1.0\nfile private/a.mp4\n")
    with pytest.raises(DataError, match=r"b\.mp4 cannot be read as a video: it begins with b'ffconcat"):
        read_video(tmp_path / "b.mp4")


def test_a_name_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(tmp_path / "a.mp4").rename(tmp_path / "a:1.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_video("a:1.mp4", 2).shape == (2, 3, HIGH, WIDE)


def test_more_pixels_than_memory_may_hold_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = encoded(tmp_path / "a.mp4")
    write_webp(tmp_path / "a.webp", torch.rand(9, 3, HIGH, WIDE), fps=8)
    for name in ("a.mp4", "a.webp"):
        with pytest.raises(DataError, match=rf"{name}: 9 frames of {HIGH * WIDE} pixels are more than the"):
            read_pixels(tmp_path / name, most=9 * HIGH * WIDE - 1)
        assert len(read_pixels(tmp_path / name, 8, most=9 * HIGH * WIDE - 1)) == 8
    with pytest.raises(DataError, match="more than the"):  # as a last frame that appears after years would ask
        read_video(file, fps=1e9)
    monkeypatch.setattr(video_decoding, "MAX_PIXELS", HIGH * WIDE - 1)
    with pytest.raises(DataError, match=f"a.mp4 has frames of {WIDE}x{HIGH} pixels, more than"):
        read_video(file, 1)


def test_an_animated_webp_is_read_as_a_video(tmp_path: Path) -> None:
    media = torch.randint(0, 256, (9, 3, 8, 12), generator=torch.Generator().manual_seed(0)) / 255
    write_webp(tmp_path / "a.webp", media, fps=8)
    torch.testing.assert_close(read_video(tmp_path / "a.webp"), media)
    torch.testing.assert_close(read_video(tmp_path / "a.webp", 3), media[[0, 4, 8]])
    with pytest.raises(DataError, match="has 9 frames, expected at least 10"):
        read_video(tmp_path / "a.webp", 10)


@pytest.mark.parametrize("fps", [1e-5, 1e9, float("nan"), -1.0])
def test_a_rate_that_no_file_can_say_is_refused(fps: float, tmp_path: Path) -> None:
    for write in (write_mp4, write_webp):
        with pytest.raises(DataError, match="expected from 0.001 to 1000000 frames per second"):
            write(tmp_path / "a", torch.zeros(2, 3, 4, 4), fps)


def test_a_title_that_is_no_utf8_is_no_damage(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        file.metadata["title"] = "cafeteria"
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDE, HIGH, "yuv420p"
        for one in clip():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        file.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    assert b"cafeteria" in content
    (tmp_path / "a.mp4").write_bytes(content.replace(b"cafeteria", "caf\xe9teria".encode("latin-1")))
    assert len(read_video(tmp_path / "a.mp4")) == 9


@pytest.mark.parametrize("cut", [False, True])
def test_frames_that_an_avi_leaves_out_are_not_missing(cut: bool, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDE, HIGH, "yuv420p"
        for moment, one in zip((0, 1, 2, 10, 11, 30), clip(6), strict=True):
            frame = av.VideoFrame.from_ndarray(one, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    content = (tmp_path / "a.avi").read_bytes()
    if not cut:
        assert len(read_video(tmp_path / "a.avi")) == 6
        return
    (tmp_path / "a.avi").write_bytes(content[: content.index(b"idx1") - 600])
    with pytest.raises(DataError, match="truncated|damaged"):
        read_video(tmp_path / "a.avi")
