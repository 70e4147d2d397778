"""Prompts and media files: reading, splitting, sampling."""

from alignkit.data.media import load_image, load_images
from alignkit.data.prompts import batches_of_equal_shape, load_prompts, split
from alignkit.data.sampler import GroupSampler

__all__ = ["load_prompts", "split", "batches_of_equal_shape", "GroupSampler", "load_image", "load_images"]
