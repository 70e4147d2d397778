from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from alignkit.errors import RecipeError
from alignkit.rewards.fit import fit
from alignkit.rewards.openclip import preprocess


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture: resampling an 8-bit one by PIL and a float one by torch then differ only by rounding."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / 5) * np.cos(y / 7), np.cos(x / 9 + y / 11), np.sin(y / 4)]
    return ((np.stack(planes, axis=-1) * 0.4 + 0.5) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (24, 64)])
@pytest.mark.parametrize("shape", [(24, 64), (71, 50), (100, 100), (16, 20)])
def test_preprocessing_on_tensors_is_what_open_clip_does_with_pictures(
    mode: str, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    config = PreprocessCfg(size=size, resize_mode=mode, fill_color=128)
    image = picture(*shape)
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(image))
    ours = preprocess(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, config)
    assert ours.shape == (1, 3, *size)
    torch.testing.assert_close(ours[0], theirs, atol=0.035, rtol=0)  # 2 of 255 steps over the smallest std


@pytest.mark.parametrize("shape", [(73, 50), (50, 73), (31, 33)])
def test_squares_are_cut_out_as_torchvision_does(shape: tuple[int, int]) -> None:
    media = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    resized = TF.resize(media, [32], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(fit(media, (32, 32)), TF.center_crop(resized, [32, 32]))


def test_the_whole_picture_is_kept_in_longest_and_the_rest_is_filled() -> None:
    media = torch.ones(1, 3, 10, 40)
    fitted = fit(media, (20, 20), "longest", fill=0.25)
    assert (fitted[..., 8:12, :] - 1).abs().max() < 1e-6
    assert (fitted[..., :7, :] - 0.25).abs().max() < 1e-6


def test_pictures_of_the_right_size_are_left_alone() -> None:
    media = torch.rand(2, 3, 24, 64, generator=torch.Generator().manual_seed(0))
    for mode in ("shortest", "longest", "squash"):
        assert torch.equal(fit(media, (24, 64), mode), media)


def test_a_strip_keeps_at_least_one_row() -> None:
    fitted = fit(torch.ones(1, 3, 2, 400), (16, 16), "longest")
    torch.testing.assert_close(fitted.sum(dim=-1).amax(dim=-1), torch.full((1, 3), 16.0))


def test_gradients_reach_every_pixel_that_is_shown() -> None:
    media = torch.rand(1, 3, 12, 40, requires_grad=True)
    fit(media, (16, 16), "longest").square().sum().backward()
    assert media.grad is not None and (media.grad != 0).all()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(RecipeError, match="resize_mode='tile'; choose shortest, longest or squash"):
        fit(torch.rand(1, 3, 8, 8), (4, 4), "tile")
