"""Plain sampling with a diffusers pipeline as a user would write it: own scheduler, LoRA files, pictures on disk."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw

from alignkit.data.video import contact_sheet as frames_in_rows
from alignkit.errors import RecipeError
from alignkit.evaluation import clips
from alignkit.rewards.pixels import to_uint8

BATCH = 8
MARGIN, LINE = 6, 14  # pixels of the contact sheet
SHOWN_FRAMES = 9
LOWEST, HIGHEST = 64, 192  # pixels of the shorter side of a video's frames on a sheet


@dataclass(frozen=True)
class Sample:
    """One drawn sample.

    Attributes:
        prompt, seed: what it was drawn from.
        media: float in [0, 1], (3, H, W) or (T, 3, H, W).
    """

    prompt: str
    seed: int
    media: torch.Tensor


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` as a keyword of the pipeline; the value is JSON where it reads as JSON, else text.

    Raises:
        RecipeError: no `=`, or nothing before it.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text!r}; expected key=value, for example guidance_scale=3.5")
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return key.strip(), words[value]
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def parse_lora(text: str) -> tuple[str, float]:
    """`PATH` or `PATH:scale`; the scale is 1 where it is not given."""
    path, colon, scale = text.rpartition(":")
    if colon and re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?|-?\.\d+", scale):
        return path, float(scale)
    return text, 1.0


def open_pipeline(model: str, dtype: torch.dtype = torch.float32, device: str | None = None) -> Any:
    """`DiffusionPipeline.from_pretrained(model)` on an accelerator where there is one, without its progress bar."""
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_loras(pipe: Any, loras: Sequence[tuple[str, float]]) -> dict[str, int]:
    """Load LoRA files with the pipeline's own `load_lora_weights` and set their scales.

    Returns:
        how many layers each file adapts.

    Raises:
        RecipeError: the pipeline loads no LoRA, there is no such file, or not one tensor of it matched a layer.
    """
    if not loras:
        return {}
    if "load_lora_weights" not in dir(type(pipe)):
        raise RecipeError(f"{type(pipe).__name__} has no load_lora_weights, so it takes no LoRA file")
    layers: dict[str, int] = {}
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        place = Path(path)
        if not place.exists() and path.count("/") != 1:
            raise RecipeError(f"there is no LoRA file or folder {path} (looked from {Path.cwd()})")
        if place.is_file():
            pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name=name)
        else:
            pipe.load_lora_weights(path, adapter_name=name)
        layers[path] = adapted_layers(pipe, name)
        if layers[path] == 0:
            raise RecipeError(
                f"0 tensors of the LoRA {path} matched a layer of {type(pipe).__name__}: its keys have another format "
                "or belong to another model. alignkit's own are in RUN/lora; recipes start from other formats with "
                "init_lora"
            )
    pipe.set_adapters(names, [scale for _, scale in loras])
    return layers


def adapted_layers(pipe: Any, adapter: str) -> int:
    """Layers of all components that carry an adapter of this name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for part in modules for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
    return sum(adapter in layer.lora_A for layer in layers)  # type: ignore[operator]


def sample(
    pipe: Any, prompts: Sequence[str], *, num: int, steps: int, seed: int, call: Mapping[str, Any], batch: int = BATCH
) -> list[Sample]:
    """Draw `num` samples of each prompt; sample i of a prompt has seed `seed + i`, whatever the batch.

    Args:
        call: further keywords of the pipeline.

    Raises:
        RecipeError: a keyword that the pipeline does not have.
    """
    known = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    unknown = sorted(set(call) - set(known))
    if unknown:
        takes = ", ".join(name for name in known if name != "self")
        raise RecipeError(f"{type(pipe).__name__} has no keyword {unknown[0]!r}; it takes {takes}")
    wanted = [(prompt, seed + i) for prompt in prompts for i in range(num)]
    drawn: list[Sample] = []
    for start in range(0, len(wanted), batch):
        piece = wanted[start : start + batch]
        repeated = {k: [v] * len(piece) for k, v in call.items() if k == "negative_prompt" and isinstance(v, str)}
        keywords = {**call, **repeated, "num_inference_steps": steps, "output_type": "pt", "return_dict": False}
        generators = [torch.Generator("cpu").manual_seed(s) for _, s in piece]
        with torch.no_grad():
            media = pipe(prompt=[p for p, _ in piece], generator=generators, **keywords)[0]
        for (prompt, own), one in zip(piece, media, strict=True):
            drawn.append(Sample(prompt, own, one.float().clamp(0, 1).cpu()))
    return drawn


def write(samples: Sequence[Sample], out: Path, sheet: Image.Image | None = None, fps: float = clips.FPS) -> list[Path]:
    """Write a PNG, or for video an animated WebP (MP4 where that is too large), per sample, and a sheet.

    Args:
        out: a folder, or a file name ending in `.png` for the sheet alone.
        sheet: None: a labelled contact sheet of the samples.
        fps: frames per second at which videos play.

    Returns:
        the files, the sheet last.
    """
    alone = out.suffix.lower() == ".png"
    folder = out.parent if alone else out
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number, one in enumerate(() if alone else samples):
        name = f"{number:03d}-seed{one.seed}"
        if one.media.ndim == 4:
            files.append(clips.write_clip(folder / name, one.media, fps))
            continue
        files.append(folder / f"{name}.png")
        Image.fromarray(to_uint8(one.media[None])[0]).save(files[-1])
    files.append(out if alone else folder / "sheet.png")
    (contact_sheet(samples) if sheet is None else sheet).save(files[-1])
    return files


def contact_sheet(samples: Sequence[Sample], columns: int = 4, captions: Sequence[str] | None = None) -> Image.Image:
    """All samples on one picture, a video as a row of up to `SHOWN_FRAMES` of its frames.

    Args:
        captions: second line under each sample, below its prompt; None: its seed.
    """
    tiles = [tile_of(one.media) for one in samples]
    video = samples[0].media.ndim == 4
    columns = 1 if video else min(columns, len(tiles))
    zoom = max(1, 160 // min(tile.width for tile in tiles)) if not video else 1
    tiles = [tile.resize((tile.width * zoom, tile.height * zoom), Image.Resampling.NEAREST) for tile in tiles]
    wide = max(tile.width for tile in tiles) + 2 * MARGIN
    high = max(tile.height for tile in tiles) + 2 * MARGIN + 2 * LINE
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide, rows * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (tile, one) in enumerate(zip(tiles, samples, strict=True)):
        left, top = (i % columns) * wide + MARGIN, (i // columns) * high + MARGIN
        sheet.paste(tile, (left, top))
        label = shortened(pen, one.prompt, wide - 2 * MARGIN)
        pen.text((left, top + tile.height + 2), label, fill="black")
        second = f"seed {one.seed}" if captions is None else captions[i]
        pen.text((left, top + tile.height + 2 + LINE), second, fill="gray")
    return sheet


def tile_of(media: torch.Tensor, frames: int = SHOWN_FRAMES) -> Image.Image:
    """The picture (3, H, W), or up to `frames` frames of the video (T, 3, H, W) side by side, large enough to see."""
    if media.ndim == 3:
        return Image.fromarray(to_uint8(media[None])[0])
    chosen = torch.linspace(0, len(media) - 1, min(frames, len(media))).round().long()
    shown = _visible(media[chosen])
    return frames_in_rows(rearrange(shown, "t c h w -> 1 t c h w"), columns=len(shown))


def _visible(frames: torch.Tensor) -> torch.Tensor:
    """(T, 3, H, W) enlarged by a whole factor, or made smaller, so that the shorter side is from `LOWEST` to
    `HIGHEST`."""
    side = min(frames.shape[-2:])
    if side < LOWEST:
        return repeat(frames, "t c h w -> t c (h a) (w b)", a=-(-LOWEST // side), b=-(-LOWEST // side))
    if side > HIGHEST:
        size = [round(length * HIGHEST / side) for length in frames.shape[-2:]]
        return F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
    return frames


def shortened(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, shortened until it fits into `width` pixels."""
    text = " ".join(text.split())
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
