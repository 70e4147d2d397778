"""The command line on a text-to-video pipeline: clips drawn, guided, scored, trained on and reported."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence

from alignkit.cli import main
from alignkit.data.video import read_video, write_mp4
from alignkit.errors import DataError
from alignkit.evaluation.pictures import KINDS
from alignkit.inference.scoring import read_media
from tests.evaluation.synthetic_video_run import disc
from tests.evaluation.test_report import Page
from tests.policy.zoo import ZOO

SMALL = [
    "--steps",
    "2",
    "--set",
    "height=32",
    "width=32",
    "num_frames=5",
    "max_sequence_length=8",
    "guidance_scale=1.0",
]

RECIPE = """
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO

def recipe():
    return GRPO(
        model={model!r}, prompts={prompts!r}, rewards={{"frame_difference": 1.0}}, judges=("flow_magnitude",),
        call={{"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 8}},
        num_steps=2, steps=1, prompts_per_step=1, group_size=2, train=LoRA(rank=2, alpha=4.0),
        eval_every=0, eval_prompts={held_out!r}, diversity_prompts=1, diversity_samples=2,
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LTX-Video (`model`), prompts, and a recipe."""
    folder = tmp_path_factory.mktemp("video")
    ZOO["ltx_t2v"].build().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"a red disc moves {i}\n" for i in range(6)), encoding="utf-8")
    held_out = folder / "held_out.txt"
    held_out.write_text("a blue disc falls\na blue disc rises\n", encoding="utf-8")
    files = {"model": folder / "model", "prompts": folder / "prompts.txt", "held_out": held_out}
    text = RECIPE.format(**{name: str(file) for name, file in files.items()})
    (folder / "small.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def frames_of(file: Path) -> list[int]:
    """How long each frame of an animation is shown, in milliseconds."""
    with Image.open(file) as image:
        assert image.size == (32, 32)
        return [frame.info["duration"] for frame in ImageSequence.Iterator(image) if frame.load() is not None]


def test_sample_writes_an_animation_of_each_clip_and_a_sheet_of_frames(place: Path, here: Path) -> None:
    command = ["sample", str(place / "model"), "a red disc", "--num", "2", "--seed", "5", *SMALL]
    assert main([*command, "--out", "a"]) == 0
    assert sorted(file.name for file in (here / "a").iterdir()) == [
        "000-seed5.webp",
        "001-seed6.webp",
        "sheet.png",
    ]
    assert frames_of(here / "a" / "000-seed5.webp") == [125] * 5
    with Image.open(here / "a" / "sheet.png") as sheet:
        assert sheet.width > 5 * 64 and sheet.height > 2 * 64
    assert main([*command, "--out", "b", "--fps", "20"]) == 0
    assert frames_of(here / "b" / "001-seed6.webp") == [50] * 5


@pytest.mark.parametrize("fps", ["0", "-1", "nan", "inf", "1e-5"])
def test_a_rate_that_is_none_is_refused(here: Path, capsys: pytest.CaptureFixture[str], fps: str) -> None:
    assert main(["sample", "nowhere", "x", f"--fps={fps}"]) == 2
    assert "must be from 0.001 to 1000000 frames per second" in capsys.readouterr().err


def test_guided_clips_are_shown_side_by_side_with_unguided_ones(place: Path, here: Path) -> None:
    guided = ["--guide", "best_of_n", "--budget", "3", "--reward", "frame_difference", "--judge", "flow_magnitude"]
    command = ["sample", str(place / "model"), "a red disc", "a dog", "--num", "1", *SMALL, *guided, "--fps", "4"]
    assert main([*command, "--out", "g"]) == 0
    plain, best = json.loads((here / "g" / "sheet.json").read_text(encoding="utf-8"))["methods"]
    assert best["total"] > plain["total"] and len(best["samples"]) == 2
    assert frames_of(here / "g" / "001-seed0.webp") == [250] * 5
    drawn = read_media(here / "g" / "000-seed0.webp")
    difference = float((drawn[1:] - drawn[:-1]).abs().mean())
    assert difference == pytest.approx(best["samples"][0]["rewards"]["frame_difference"], abs=0.004)
    with Image.open(here / "g" / "sheet.png") as sheet:
        assert sheet.width > 2 * 3 * 64


def test_score_reads_videos_and_animations(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still, moving = disc((0.0, 0.0), texture=0.0), disc((2.0, 0.0))
    write_mp4(here / "still.mp4", still, 8.0)
    write_mp4(here / "moving.mp4", moving, 8.0)
    frames = [Image.fromarray((one * 255).byte().permute(1, 2, 0).numpy()) for one in moving]
    frames[0].save(here / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    files = ["still.mp4", "moving.mp4", "moving.webp"]

    def scores(*options: str) -> list[float]:
        assert main(["score", "frame_difference", *files, "--prompt", "x", "--json", *options]) == 0
        return [row["scores"]["frame_difference"] for row in json.loads(capsys.readouterr().out)]

    all_frames = scores()
    assert all_frames[0] < 0.002 and all_frames[1] == pytest.approx(all_frames[2], rel=0.3)
    assert all_frames[2] == pytest.approx(float((moving[1:] - moving[:-1]).abs().mean()), abs=0.003)
    ends = scores("--frames", "2")
    assert ends[2] == pytest.approx(float((moving[8] - moving[0]).abs().mean()), abs=0.003)
    expected = read_video(here / "moving.mp4", lambda count: [0, count - 1])
    assert ends[1] == pytest.approx(float((expected[1] - expected[0]).abs().mean()), abs=1e-5)
    torch.testing.assert_close(read_media(here / "moving.webp", 3), read_media(here / "moving.webp")[[0, 4, 8]])


def test_of_an_animation_only_the_frames_asked_for_are_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (512, 512), (i, 0, 0)) for i in range(0, 240, 4)]
    frames[0].save(here / "long.gif", save_all=True, append_images=frames[1:])
    tracemalloc.start()
    media = read_media(here / "long.gif", 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(media) == 2 and peak < 10 * 512 * 512 * 3
    torch.testing.assert_close(media[1, 0], torch.full((512, 512), 236 / 255), rtol=0, atol=0.02)
    assert read_media(here / "long.gif", 1).shape == (1, 3, 512, 512)
    monkeypatch.setattr("alignkit.data.video.MOST", 2**20)
    with pytest.raises(DataError, match="60 frames of 262144 pixels are more than"):
        read_media(here / "long.gif")


def test_an_animation_cut_anywhere_is_read_or_refused_in_words(here: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (0, 0, 20 * i)) for i in range(5)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(here / name, save_all=True, append_images=frames[1:])
        content, refused = (here / name).read_bytes(), 0
        for length in range(13, len(content), 3):
            (here / name).write_bytes(content[:length])
            try:
                read_media(here / name)
            except DataError as error:
                assert name in str(error)
                refused += 1
        assert refused


def test_a_photograph_is_one_picture_turned_as_it_says(here: Path) -> None:
    tall, preview = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    tall.save(here / "a.jpg", exif=exif)
    assert read_media(here / "a.jpg", 4).shape == (3, 16, 8)
    tall.save(here / "b.jpg", "MPO", save_all=True, append_images=[preview])
    assert read_media(here / "b.jpg").shape == (3, 8, 16)


@pytest.mark.parametrize(
    ("options", "words"), [(["--frames", "99"], "99 frames"), (["--frames", "0"], "expected more")]
)
def test_more_frames_than_there_are_and_none_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    write_mp4(here / "a.mp4", disc((1.0, 0.0)), 8.0)
    assert main(["score", "frame_difference", "a.mp4", "--prompt", "x", *options]) == 2
    assert words in capsys.readouterr().err


def test_what_is_neither_image_nor_video_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "notes.mp4").write_text("not a video", encoding="utf-8")
    assert main(["score", "frame_difference", "notes.mp4", "--prompt", "x"]) == 2
    assert "notes.mp4" in capsys.readouterr().err


def test_a_run_reports_its_clips_before_and_after(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["run", str(place / "small.py"), "--out", str(out)]) == 0
    grids = json.loads((out / "samples" / "index.json").read_text(encoding="utf-8"))
    assert [grid["title"] for grid in grids] == ["base", "aligned"]
    for grid in grids:
        assert [image["scale"] for image in grid["images"]] == [4, 4]
        with Image.open(out / "samples" / grid["images"][0]["file"]) as clip:
            assert clip.size == (128, 128)
        assert (out / "samples" / grid["sheet"]).is_file()
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    sources = [str(attrs["src"]).partition(";")[0] for tag, attrs in page.tags if tag in ("img", "video")]
    assert set(sources) <= {f"data:{kind}" for kind in KINDS.values()}
    assert sources.count("data:image/webp") == 4 and sources.count("data:image/png") == 2
    assert "optical flow, pixels per frame" in page.text and "Frame by frame" in page.text
