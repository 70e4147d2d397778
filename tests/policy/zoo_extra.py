"""Pipelines beyond the required list: editing, inpainting, control, and further families."""

from __future__ import annotations

from tests.policy import tiny_extra as extra
from tests.policy.zoo_entry import BAD, CFG, PICTURES, Entry

SMALL = {"height": 32, "width": 32}
# One picture per prompt: from a single one these pipelines draw a single posterior for the whole batch.
MASKED = {"image": list(PICTURES), "mask_image": extra.masks(len(PICTURES))}
WINDOW = {"guidance_scale": 4.0, "control_guidance_start": 0.25, "control_guidance_end": 0.65}

EXTRA: dict[str, Entry] = {
    "flux_fill": Entry(
        extra.flux_fill,
        "FLUX.1 Fill",
        SMALL | MASKED | {"max_sequence_length": 8},
        {"embedded": {"guidance_scale": 30.0}, "weaker": {"guidance_scale": 3.5}},
        image=True,
    ),
    "chroma": Entry(
        extra.chroma,
        "Chroma",
        {"height": 16, "width": 16, "max_sequence_length": 8},
        {"guided": {"guidance_scale": 4.0, **BAD}, "unguided": {"guidance_scale": 1.0}},
    ),
    "omnigen": Entry(
        extra.omnigen, "OmniGen", SMALL, {"guided": {"guidance_scale": 2.5}, "scale_one": {"guidance_scale": 1.0}}
    ),
    "sd3_controlnet": Entry(
        extra.sd3_controlnet,
        "Stable Diffusion 3 + ControlNet",
        SMALL | {"max_sequence_length": 8, "control_image": PICTURES[0]},
        CFG | {"window": WINDOW},
        image=True,
        draws_per_batch=True,
    ),
    "sd15_inpaint": Entry(extra.sd15_inpaint, "Stable Diffusion 1.5 inpainting", SMALL | MASKED, CFG, image=True),
    "sd15_inpaint_blend": Entry(
        extra.sd15_inpaint_blend, "Stable Diffusion 1.5 inpainting (blending)", SMALL | MASKED, CFG, image=True
    ),
    "animatediff": Entry(extra.animatediff, "AnimateDiff", SMALL | {"num_frames": 2}, CFG, video=True),
    "latte": Entry(extra.latte, "Latte", SMALL | {"video_length": 2, "clean_caption": False}, CFG, video=True),
    "sana_video": Entry(
        extra.sana_video,
        "Sana-Video",
        SMALL
        | {"frames": 5, "max_sequence_length": 8, "complex_human_instruction": None}
        | {"use_resolution_binning": False, "clean_caption": False},
        CFG,
        video=True,
    ),
}
