from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignkit.data import load_image, load_images, load_prompts
from alignkit.data.media import load_animation
from alignkit.errors import DataError
from alignkit.types import Prompt


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    path = saved(Image.new("RGB", (8, 4), "red"), tmp_path / "a.jpg", exif=exif)
    assert load_image(path).size == (4, 8)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(grey), tmp_path / "a.png")
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = saved(
        Image.new("RGB", (4, 4), "white").convert(mode), tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    )
    image = load_image(path)
    assert image.mode == "RGB" and image.getpixel((1, 1)) == (255, 255, 255)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    path = saved(Image.new("RGBA", (2, 2), (200, 0, 0, 0)), tmp_path / "a.png")
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def damaged(folder: Path, how: str) -> Path:
    path = saved(Image.effect_noise((64, 64), 80).convert("RGB"), folder / "a.png")
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[:900], "text": b"no image"}[how])
    return path


@pytest.mark.parametrize("how", ["empty", "truncated", "text"])
def test_a_damaged_image_is_an_error_that_names_the_file(how: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, how)
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        load_image(path)


def test_a_missing_image_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.png is not there"):
        load_image(tmp_path / "nothing.png")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = saved(Image.new("1", (14_000, 14_000)), tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*decompression bomb"):
        load_image(path)
    smaller = saved(Image.new("1", (100, 100)), tmp_path / "b.png")
    with pytest.raises(DataError, match=r"100x100 pixels, more than 9999"):
        load_image(smaller, max_pixels=9999)
    assert load_image(smaller, max_pixels=10_000).size == (100, 100)


def test_the_images_of_a_prompt_are_read_at_use_and_an_error_names_its_line(tmp_path: Path) -> None:
    saved(Image.new("RGB", (4, 4), "red"), tmp_path / "good.png")
    damaged(tmp_path, "truncated")
    rows = '{"prompt": "x", "images": ["good.png", "good.png"]}\n{"prompt": "y", "image": "a.png"}'
    (tmp_path / "p.jsonl").write_text(rows)
    good, bad = load_prompts(tmp_path / "p.jsonl")
    assert [image.size for image in load_images(good, "images")] == [(4, 4), (4, 4)]
    with pytest.raises(DataError, match=r"prompt 2 \(its line or row.*a\.png cannot be read"):
        load_images(bad)


def test_a_missing_column_is_named_with_the_columns_found() -> None:
    with pytest.raises(DataError, match="no column 'image'; columns found: seed"):
        load_images(Prompt("a", columns={"seed": 1}))


def test_an_animation_whose_frames_differ_in_size_is_refused(tmp_path: Path) -> None:
    for name, wide in (("a.gif", 8), ("b.gif", 20)):
        Image.new("P", (wide, 8)).save(tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.gif", "b.gif"))
    (tmp_path / "a.gif").write_bytes(first[:-1] + second[second.index(b"\x2c\x00\x00\x00\x00\x14") :])
    with pytest.raises(DataError, match=r"a\.gif changes its size"):
        load_animation(tmp_path / "a.gif", lambda count, pixels: range(count))
