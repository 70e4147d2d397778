from __future__ import annotations

import io
import logging

import pytest
import torch
from PIL import Image

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import as_reward, load, probe
from alignkit.rewards.pixels import to_uint8
from alignkit.rewards.statistics import (
    STATISTICS,
    brightness,
    colour_entropy,
    contrast,
    dark_fraction,
    edge_density,
    image_statistics,
    saturated_fraction,
)


def flat(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16).clone()


def halves(left: float, right: float) -> torch.Tensor:
    media = torch.full((1, 3, 16, 16), left)
    media[..., 8:] = right
    return media


def test_brightness_and_contrast_of_a_half_black_half_white_image() -> None:
    torch.testing.assert_close(brightness(halves(0, 1)), torch.tensor([0.5]))
    torch.testing.assert_close(contrast(halves(0, 1)), torch.tensor([0.5]))
    torch.testing.assert_close(contrast(flat(0.3, 0.3, 0.3)), torch.tensor([0.0]), atol=1e-6, rtol=0)


def test_dark_pixels_are_counted() -> None:
    assert dark_fraction(halves(0.05, 0.5)).item() == 0.5
    assert dark_fraction(flat(0.0, 0.5, 0.0)).item() == 0.0


def test_pure_colours_are_saturated_and_greys_and_dark_pixels_are_not() -> None:
    assert saturated_fraction(flat(1.0, 0.0, 0.0)).item() == 1.0
    assert saturated_fraction(flat(0.6, 0.6, 0.6)).item() == 0.0
    assert saturated_fraction(flat(0.1, 0.0, 0.0)).item() == 0.0


def test_an_edge_is_two_pixels_wide_and_a_flat_image_has_none() -> None:
    assert edge_density(halves(0, 1)).item() == pytest.approx(2 / 16)
    assert edge_density(flat(0.2, 0.4, 0.6)).item() == 0.0
    assert edge_density(halves(0.5, 0.55)).item() == 0.0


def test_the_entropy_of_two_equally_frequent_colours_is_one_bit() -> None:
    assert colour_entropy(halves(0, 1)).item() == pytest.approx(1.0)
    assert colour_entropy(flat(0.2, 0.4, 0.6)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_a_video_has_the_mean_of_its_frames(name: str, rng: torch.Generator) -> None:
    video = torch.rand(2, 3, 3, 8, 8, generator=rng)
    frames = torch.stack([STATISTICS[name](video[:, frame]) for frame in range(3)], dim=1)
    torch.testing.assert_close(STATISTICS[name](video), frames.mean(dim=1))


def test_all_statistics_are_finite_numbers_per_image(rng: torch.Generator) -> None:
    found = image_statistics(torch.rand(4, 3, 8, 8, generator=rng))
    assert set(found) == set(STATISTICS)
    assert all(value.shape == (4,) and value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_rewards_are_the_size_of_the_file_in_kilobytes(quality: int, rng: torch.Generator) -> None:
    media = torch.stack([torch.rand(3, 32, 32, generator=rng), torch.full((3, 32, 32), 0.5)])
    sizes = []
    for pixels in to_uint8(media):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        sizes.append(len(file.getvalue()) / 1000)
    small = load("jpeg_compressibility", quality=quality)(media, ["noise", "flat"])
    large = load("jpeg_incompressibility", quality=quality)(media, ["noise", "flat"])
    torch.testing.assert_close(small, -torch.tensor(sizes))
    torch.testing.assert_close(large, torch.tensor(sizes))


@pytest.mark.parametrize("quality", [0, 100])
def test_a_jpeg_quality_that_pil_does_not_keep_is_refused(quality: int) -> None:
    with pytest.raises(RecipeError, match=f"quality={quality}"):
        load("jpeg_compressibility", quality=quality)


def test_a_reward_that_is_not_deterministic_is_reported_with_the_difference(caplog) -> None:
    calls = iter([0.0, 0.25])

    def drifts(media, prompts):
        return [next(calls)] * len(prompts)

    with caplog.at_level(logging.WARNING):
        assert probe(as_reward(drifts), torch.zeros(2, 3, 4, 4), ["a", "b"]).difference == 0.25
    assert "'drifts' differs by up to 0.25" in caplog.text


def test_a_gradient_that_is_zero_everywhere_is_found() -> None:
    def rounds(media, prompts):
        return media.round().mean(dim=(1, 2, 3))

    rounds.differentiable = True
    with pytest.raises(RewardError, match="largest gradient at the media is 0"):
        probe(as_reward(rounds), torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), ["a", "b"])
