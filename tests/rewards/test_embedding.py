"""Features by which samples of a group are told apart."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.rewards import load
from alignkit.rewards.embedding import embedding, pixels


@dataclass
class Token:
    cls: torch.Tensor


class Extractor:
    """Mean and standard deviation of every channel as class token."""

    def features(self, media: torch.Tensor) -> Token:
        return Token(torch.cat([media.mean(dim=(2, 3)), media.std(dim=(2, 3))], dim=1))


class Dual:
    """A reward with image features."""

    name, kind, differentiable = "dual", "image", False

    def __call__(self, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return media.mean(dim=(1, 2, 3))

    def image_features(self, media: torch.Tensor) -> torch.Tensor:
        return media.mean(dim=(2, 3))


@pytest.fixture
def media(rng: torch.Generator) -> torch.Tensor:
    return torch.rand(3, 3, 24, 64, generator=rng)


def test_thumbnails_tell_pictures_apart_and_not_their_brightness(media: torch.Tensor) -> None:
    rows = pixels(torch.cat([media, media[:1] * 0.5]))
    cosine = torch.nn.functional.normalize(rows, dim=1)
    assert_close(cosine[0] @ cosine[3], torch.tensor(1.0))
    assert float(cosine[0] @ cosine[1]) < 0.5


def test_a_loaded_reward_is_used_as_it_is_and_other_specs_are_made(media: torch.Tensor) -> None:
    dual = Dual()
    assert_close(embedding("dual", {"dual": dual})(media), media.mean(dim=(2, 3)))
    own = embedding(f"{__file__}:Extractor", {})
    assert own(media).shape == (3, 6)
    assert_close(embedding(lambda m: m.flatten(1), {})(media), media.flatten(1))


def test_the_features_of_a_video_are_the_mean_over_its_frames(media: torch.Tensor) -> None:
    video = torch.stack([media, media.flip(0)], dim=1)
    assert_close(embedding("dual", {"dual": Dual()})(video), video.mean(dim=(1, 3, 4)))
    assert pixels(video).shape == (3, 2 * 3 * 16 * 16)


def test_a_reward_without_features_is_refused_with_what_has_some() -> None:
    with pytest.raises(RecipeError, match="'brightness' has no features .* 'pixels'"):
        embedding("brightness", {})
    with pytest.raises(RecipeError, match="has no features"):
        embedding("loaded", {"loaded": load("brightness")})
