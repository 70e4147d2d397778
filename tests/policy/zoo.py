"""Tiny pipelines of real diffusers classes, random weights from configs, and what each may be called with.

`ZOO` is the literal table that the conformance tests run on; `own_steps` records what a pipeline's own,
untouched loop hands to its scheduler. Sizes follow those of diffusers' own tests; nothing is downloaded.
`python -m tests.policy.zoo` prints the table of pipelines for the README.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from tests.policy import tiny_image as image
from tests.policy import tiny_more as more
from tests.policy import tiny_video as video
from tests.policy.tiny_parts import picture
from tests.policy.zoo_entry import BAD, CFG, EMBEDDED, PICTURES, PROMPTS, Entry
from tests.policy.zoo_extra import EXTRA


@dataclass(frozen=True)
class Step:
    """What the pipeline's own loop handed to `scheduler.step`, and what the denoiser was fed.

    Attributes:
        index: position in the loop.
        timestep: 0-dimensional, the loop variable.
        sample: (B, ...) latents before the step.
        scaled_sample: (B, ...) what `scale_model_input` made of them; equal to `sample` for most schedulers.
        model_output: (B, ...) after guidance.
        next_sample: (B, ...) what the scheduler returned.
    """

    index: int
    timestep: torch.Tensor
    sample: torch.Tensor
    scaled_sample: torch.Tensor
    model_output: torch.Tensor
    next_sample: torch.Tensor


WAN = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
LTX = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
COG = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
SANA = {"height": 32, "width": 32, "max_sequence_length": 8, "complex_human_instruction": None} | {
    "use_resolution_binning": False,
    "clean_caption": False,
}

REQUIRED: dict[str, Entry] = {
    "sd15": Entry(image.sd15, "Stable Diffusion 1.5", {"height": 32, "width": 32}, CFG),
    "sd15_pndm": Entry(image.sd15_pndm, "Stable Diffusion 1.5 (PNDM)", {"height": 32, "width": 32}, CFG),
    "sd15_controlnet": Entry(
        image.sd15_controlnet,
        "Stable Diffusion 1.5 + ControlNet",
        {"height": 32, "width": 32, "image": PICTURES[0]},
        CFG | {"window": {"guidance_scale": 4.0, "control_guidance_start": 0.25, "control_guidance_end": 0.65}},
        image=True,
    ),
    "sdxl": Entry(image.sdxl, "Stable Diffusion XL (Euler)", {"height": 32, "width": 32}, CFG),
    "sd3": Entry(
        image.sd3,
        "Stable Diffusion 3",
        {"height": 32, "width": 32, "max_sequence_length": 8},
        CFG
        | {
            "skip_layers": {
                "guidance_scale": 4.0,
                "skip_guidance_layers": [0],
                "skip_layer_guidance_scale": 2.8,
                "skip_layer_guidance_start": 0.15,
                "skip_layer_guidance_stop": 0.55,
            }
        },
    ),
    "flux": Entry(
        image.flux,
        "FLUX.1",
        {"height": 16, "width": 16, "max_sequence_length": 8},
        {
            "embedded": {"guidance_scale": 3.5},
            "true_cfg": {"guidance_scale": 3.5, "true_cfg_scale": 3.0, **BAD},
        },
    ),
    "qwen_image": Entry(
        image.qwen_image,
        "Qwen-Image",
        {"height": 32, "width": 32, "max_sequence_length": 16},
        {"guided": {"true_cfg_scale": 4.0, **BAD}, "unguided": {"true_cfg_scale": 1.0}},
    ),
    "flux2": Entry(
        more.flux2,
        "FLUX.2",
        {"height": 16, "width": 16, "max_sequence_length": 16, "text_encoder_out_layers": (1, 2, 3)},
        {
            "embedded": {"guidance_scale": 4.0},
            "reference_image": {"guidance_scale": 4.0, "image": picture(size=64)},
        },
    ),
    "z_image": Entry(
        more.z_image,
        "Z-Image",
        {"height": 32, "width": 32, "max_sequence_length": 16},
        {
            "guided": {"guidance_scale": 3.0},
            "unguided": {"guidance_scale": 0.0},
            "truncated": {"guidance_scale": 3.0, "cfg_truncation": 0.5, "cfg_normalization": 1.0},
        },
    ),
    "sana": Entry(more.sana, "Sana", SANA, CFG),
    "sana_euler": Entry(more.sana_euler, "Sana (flow Euler)", SANA, CFG),
    "pixart": Entry(
        more.pixart,
        "PixArt-Sigma",
        {"height": 32, "width": 32, "max_sequence_length": 8, "use_resolution_binning": False}
        | {"clean_caption": False},
        CFG,
    ),
    "auraflow": Entry(more.auraflow, "AuraFlow", {"height": 32, "width": 32, "max_sequence_length": 8}, CFG),
    "cogview4": Entry(more.cogview4, "CogView 4", {"height": 32, "width": 32, "max_sequence_length": 16}, CFG),
    "lumina2": Entry(
        more.lumina2,
        "Lumina 2",
        {"height": 32, "width": 32, "max_sequence_length": 16, "system_prompt": "You are an assistant"},
        CFG | {"truncated": {"guidance_scale": 4.0, "cfg_trunc_ratio": 0.5}},
    ),
    "hunyuan_image": Entry(
        more.hunyuan_image,
        "HunyuanImage 2.1 (guidance without momentum)",
        {"height": 32, "width": 32},
        {"guided": {}, "negative": BAD},
    ),
    "hunyuan_image_distilled": Entry(
        more.hunyuan_image_distilled,
        "HunyuanImage 2.1 distilled",
        {"height": 32, "width": 32},
        {"embedded": {"distilled_guidance_scale": 3.25}},
    ),
    "flux_kontext": Entry(
        image.flux_kontext,
        "FLUX.1 Kontext",
        {"height": 16, "width": 16, "max_area": 16 * 16, "_auto_resize": False, "max_sequence_length": 8}
        | {"image": PICTURES[0]},
        EMBEDDED,
        image=True,
    ),
    "wan_t2v": Entry(video.wan_t2v, "Wan 2.1 text-to-video", WAN, CFG, video=True),
    "wan_t2v_unipc": Entry(video.wan_t2v_unipc, "Wan 2.1 text-to-video (UniPC)", WAN, CFG, video=True),
    "wan_two_experts": Entry(
        video.wan_two_experts,
        "Wan 2.2 text-to-video (two experts)",
        WAN,
        {"guided": {"guidance_scale": 4.0, "guidance_scale_2": 3.0}, "unguided": {"guidance_scale": 1.0}},
        video=True,
    ),
    "wan_i2v": Entry(
        video.wan_i2v, "Wan 2.1 image-to-video", WAN | {"image": PICTURES[0]}, CFG, video=True, image=True
    ),
    "ltx_t2v": Entry(video.ltx_t2v, "LTX-Video text-to-video", LTX, CFG, video=True),
    "ltx_i2v": Entry(
        video.ltx_i2v, "LTX-Video image-to-video", LTX | {"image": list(PICTURES)}, CFG, video=True, image=True
    ),
    "hunyuan_video": Entry(
        video.hunyuan_video,
        "HunyuanVideo",
        {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
        | {"prompt_template": {"template": "{}", "crop_start": 0}},
        EMBEDDED,
        video=True,
    ),
    "cogvideox_t2v": Entry(
        video.cogvideox_t2v,
        "CogVideoX text-to-video",
        COG,
        CFG | {"dynamic": {"guidance_scale": 4.0, "use_dynamic_cfg": True}},
        video=True,
    ),
    "cogvideox_i2v": Entry(
        video.cogvideox_i2v,
        "CogVideoX image-to-video",
        COG | {"image": list(PICTURES)},
        CFG | {"dynamic": {"guidance_scale": 4.0, "use_dynamic_cfg": True}},
        video=True,
        image=True,
    ),
}

ZOO: dict[str, Entry] = {**REQUIRED, **EXTRA}


@functools.cache
def shared(name: str) -> DiffusionPipeline:
    """The zoo's pipeline `name`, built once a process, for tests that do not change it."""
    return ZOO[name].build()


@contextmanager
def _recording(scheduler: Any, steps: list[Step]) -> Iterator[None]:
    """Shadow `step` and `scale_model_input` of one scheduler instance with recorders that call on."""
    scaled: list[torch.Tensor] = []
    step = scheduler.step
    names = ["step"]

    @functools.wraps(step)  # pipelines read the signature of `step` to decide whether to pass eta
    def record(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # batched guidance repeats the rows before they are scaled; the first copy is what belongs to `sample`
        fed = scaled.pop()[: len(sample)] if scaled else sample
        before = [x.detach().clone() for x in (torch.as_tensor(timestep), sample, fed, model_output)]
        result = step(model_output, timestep, sample, *args, **kwargs)
        steps.append(Step(len(steps), *before, result[0].detach().clone()))
        return result

    scheduler.step = record
    if "scale_model_input" in dir(type(scheduler)):
        scale = scheduler.scale_model_input
        names.append("scale_model_input")

        @functools.wraps(scale)
        def keep(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            scaled[:] = [scale(sample, *args, **kwargs)]
            return scaled[0]

        scheduler.scale_model_input = keep
    try:
        yield
    finally:
        for name in names:
            delattr(scheduler, name)


def own_steps(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] = PROMPTS,
    num_steps: int = 10,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    **call: Any,
) -> list[Step]:
    """Run the pipeline's own loop with its own scheduler; return what it handed to `step`, in order.

    `seeds` are per-sample generator seeds; without them sample i is seeded with `seed + i`. A pipeline that
    encodes an image draws from these generators before the loop; one that draws from the global generator instead
    (SD3 + ControlNet) finds it seeded with the first of them.
    """
    seeds = list(seeds) if seeds is not None else [seed + i for i in range(len(prompts))]
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    steps: list[Step] = []
    with _recording(pipe.scheduler, steps), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        pipe(
            prompt=list(prompts),
            num_inference_steps=num_steps,
            generator=generators,
            output_type="latent",
            **call,
        )
    return steps


def cases(names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(entry, variant) for every variant in the zoo, or of `names` alone."""
    return [(name, variant) for name in (names or ZOO) for variant in ZOO[name].variants]


if __name__ == "__main__":
    import sys

    from tests.policy.zoo_table import markdown

    print(markdown(sys.argv[1:]))
