"""What a video file says of itself, and its frames: decoded by decord where it can and by PyAV where it cannot.

PyAV first reads what a file says of itself, without decoding it. decord then decodes, unless the frames have to be
turned (it takes a mirrored video for one turned by half), or are in a codec that its FFmpeg 4 does not know (AV1): PyAV
does that. Both give the same pixels. Sound is ignored.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from alignkit.data.media import MAX_PIXELS
from alignkit.errors import DataError

NAMES = {"av1": "AV1", "h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "gif": "GIF"}
DECODERS = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}  # decoders that have another name than the codec
UNTURNED = (1, 0, 0, 1)
FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,h264,hevc,obu"
"""Containers that are read, by FFmpeg's names; the others include lists that name further files, of any folder."""


@dataclass(frozen=True)
class VideoFacts:
    """What a video file says of itself.

    Attributes:
        codec: FFmpeg's name of it, such as "h264".
        times: seconds after the first at which each frame appears, ascending; not evenly where the rate varies.
        turn: (a, b, c, d), the file's own rotation or mirroring as its display matrix has it: a stored pixel at (x, y)
            is shown at (a x + c y, b x + d y), y down.
        fps: frames per second on average.
        pixels: of one frame.
    """

    codec: str
    times: tuple[float, ...]
    turn: tuple[int, int, int, int]
    fps: float
    pixels: int


def inspect_video(path: str | Path) -> VideoFacts:
    """What a file says of itself; one frame is decoded, for its rotation, and the rest is not.

    Raises:
        DataError: it is missing, empty, truncated, no video, or its frames are too large; names the file.
    """
    from av.error import FFmpegError

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not there; expected a video file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected a video file")
    try:
        with _opened(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise DataError(f"{path} has no video stream, only {_streams(container)}; expected a video file")
            pixels = _frame_pixels(path, stream)
            packets = [(p.pts, p.is_discard) for p in container.demux(stream) if p.size]
            times = _times(stream, [pts for pts, discarded in packets if not discarded])
            _check_whole(path, container, stream, len(packets), times)
            facts = VideoFacts(_codec(stream), times, UNTURNED, float(stream.average_rate or 0), pixels)
        with _opened(path) as container:
            turn = _turn(path, next(container.decode(container.streams.best("video")), None))
    except FFmpegError as error:
        raise DataError(_unreadable(path, error)) from error
    return replace(facts, turn=turn, times=tuple(time - facts.times[0] for time in facts.times))


def _opened(path: Path) -> Any:
    import av

    # from the root: FFmpeg takes what stands before a colon for a protocol
    # only lists of files name protocols; a title in Latin-1 is no damage
    limits = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    return av.open(str(path.absolute()), options=limits, metadata_errors="replace")


def _frame_pixels(path: Path, stream: Any) -> int:
    if stream.codec_context is None:
        raise DataError(f"{path} holds a video in a codec that PyAV does not know; is it damaged?")
    wide, high = stream.codec_context.width, stream.codec_context.height
    if wide * high > MAX_PIXELS:
        raise DataError(f"{path} has frames of {wide}x{high} pixels, more than {MAX_PIXELS}: refused as a bomb")
    return wide * high


def _streams(container: Any) -> str:
    return ", ".join(stream.type for stream in container.streams) or "an empty container"


def _codec(stream: Any) -> str:
    name = stream.codec_context.codec.name
    return str(DECODERS.get(name, name))


def _times(stream: Any, moments: Sequence[int | None]) -> tuple[float, ...]:
    """Seconds of every frame, ascending, by the times of its packets; by the rate where they have none, as in AVI."""
    known = sorted(moment for moment in moments if moment is not None)
    if len(known) < len(moments):
        return tuple(float(i / (stream.average_rate or 1)) for i in range(len(moments)))
    return tuple(float(moment * stream.time_base) for moment in known)


def _check_whole(path: Path, container: Any, stream: Any, found: int, times: Sequence[float]) -> None:
    """A file that was cut still opens where its index, or a header, stands at the beginning."""
    if not times:
        raise DataError(f"{path} is truncated: it announces a video and holds no frame; copy or download it again")
    if container.format.name == "avi":  # counts frames that were left out because nothing changed
        found = max(found, round(times[-1] * float(stream.average_rate or 0)) + 1)
    if found < stream.frames:
        raise DataError(f"{path} is truncated: {found} of {stream.frames} frames are there; copy or download it again")
    alone = len(container.streams) == 1 and "matroska" in container.format.name  # no count of frames, but a length
    missing = (container.duration or 0) / 1e6 - times[-1] if alone else 0.0
    longest = max((later - one for one, later in pairwise(times)), default=missing)
    if missing > 1 + 3 * longest:
        raise DataError(f"{path} is truncated: its last {missing:.3g} seconds are not there; copy or download it again")


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    known = head[4:8] == b"ftyp" or head.startswith((b"\x1aE\xdf\xa3", b"RIFF", b"GIF8"))
    if isinstance(error, OSError):
        return f"{path} cannot be read as a video: {error.strerror or error}"
    if known:
        return f"{path} is truncated or damaged: it begins as a video and cannot be opened; copy or download it again"
    return f"{path} cannot be read as a video: it begins with {head!r}, which is no known type; was it saved whole?"


def _turn(path: Path, frame: Any) -> tuple[int, int, int, int]:
    found = None if frame is None else frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return UNTURNED
    a, b, _, c, d, *_ = (value / 65536 for value in struct.unpack("=9i", bytes(found)))
    turn = (round(a), round(b), round(c), round(d))
    if sorted(map(abs, turn)) != [0, 0, 1, 1] or abs(a - turn[0]) + abs(b - turn[1]) > 0.01:
        raise DataError(f"{path} says to turn it by [{a:.3g} {b:.3g}; {c:.3g} {d:.3g}]; expected quarter turns")
    return turn


def decoded(path: Path, facts: VideoFacts, indices: Sequence[int]) -> tuple[np.ndarray, str]:
    """(T, H, W, 3) uint8 RGB of these frames as they are shown, and which library decoded them, "decord" or "av".

    Raises:
        DataError: a frame cannot be decoded; names the file and the frame.
    """
    why = ""
    if facts.turn == UNTURNED and facts.codec not in _beyond_decord:
        found = _by_decord(path, facts, indices)
        if not isinstance(found, str):
            return found, "decord"
        why = found
    pixels = _turned(_by_av(path, facts, indices), facts.turn)
    if why and facts.codec not in _said:  # not before PyAV has read it: damage is no question of the library
        _said.add(facts.codec)
        warnings.warn(f"{why}; using PyAV", stacklevel=4)
    return pixels, "av"


_beyond_decord: set[str] = set()
"""Codecs that decord was found not to decode, in this process; it is not asked again."""

_said: set[str] = set()
"""Codecs of which somebody was told that PyAV reads them: all of a data set's files are alike."""


@cache
def _decord() -> Any:
    """The library, silent; None where it has no wheel."""
    try:
        import decord
    except ImportError:
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _by_decord(path: Path, facts: VideoFacts, indices: Sequence[int]) -> np.ndarray | str:
    """The frames, or why decord does not give them; "": nothing to say."""
    decord = _decord()
    if decord is None:
        return ""
    from decord._ffi.base import DECORDError  # no subclass of RuntimeError

    codec = NAMES.get(facts.codec, facts.codec)
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        return reader.get_batch(list(indices)).asnumpy() if len(reader) == len(facts.times) else ""
    except (DECORDError, RuntimeError) as error:
        if "cannot find video stream" not in str(error):
            return f"{path.name} ({codec}) cannot be read by decord"
        _beyond_decord.add(facts.codec)
        return f"{path.name} is {codec}, which decord cannot decode"


def _by_av(path: Path, facts: VideoFacts, indices: Sequence[int]) -> np.ndarray:
    from av.error import FFmpegError

    wanted, last = set(indices), max(indices)
    kept: dict[int, np.ndarray] = {}
    index = -1
    try:
        with _opened(path) as container:
            frames: Iterator[Any] = container.decode(container.streams.best("video"))
            for index, frame in enumerate(frames):
                if frame.is_corrupt:
                    raise DataError(_damaged(path, index, facts))
                if index in wanted:
                    kept[index] = frame.to_ndarray(format="rgb24")
                if index == last:
                    break
    except FFmpegError as error:
        raise DataError(_damaged(path, index + 1, facts)) from error
    if wanted - set(kept):
        raise DataError(_damaged(path, index + 1, facts))
    if len({pixels.shape for pixels in kept.values()}) > 1:
        raise DataError(f"{path} changes its size from frame to frame; encode it anew at one size")
    return np.stack([kept[i] for i in indices])


def _damaged(path: Path, index: int, facts: VideoFacts) -> str:
    return f"{path} is damaged: frame {index} of {len(facts.times)} cannot be decoded; copy or download it again"


def _turned(pixels: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """(T, H, W, C) as a display matrix shows it: y and x exchanged if it says so, then mirrored."""
    a, b, c, d = turn
    exchanged = a == 0
    pixels = rearrange(pixels, "t h w c -> t w h c") if exchanged else pixels
    across, down = (c, b) if exchanged else (a, d)
    return np.ascontiguousarray(pixels[:, ::down, ::across])
