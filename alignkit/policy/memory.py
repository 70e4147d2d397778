"""Memory: what is freed, recomputed or held in another format, and how each comes back as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignkit.errors import RecipeError
from alignkit.policy.adapters import denoisers
from alignkit.policy.standin import class_attribute

FLAGS = ("training", "gradient_checkpointing", "use_slicing", "use_tiling", "use_framewise_encoding")
FLAGS += ("use_framewise_decoding", "_gradient_checkpointing_func")
"""Attributes of modules that training and decoding may change. `tile_...` sizes are kept as well."""

ABSENT = object()


def components(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by component name."""
    return {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}


def encoders(pipe: Any) -> dict[str, nn.Module]:
    """Text and image encoders by component name: the modules of transformers' classes."""
    return {n: m for n, m in components(pipe).items() if type(m).__module__.startswith("transformers.")}


def size(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; tensors that are shared count once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# settings


def remember(pipe: Any) -> Callable[[], None]:
    """Note the settings of all modules of a pipeline; the function returned puts them back.

    Settings are train/eval mode, `requires_grad`, gradient checkpointing, and the decoder's tiling and slicing.
    """
    modules = {id(m): m for part in components(pipe).values() for m in part.modules()}
    flags = {key: _settings(module) for key, module in modules.items()}
    parameters = {id(p): (p, p.requires_grad) for part in components(pipe).values() for p in part.parameters()}

    def put_back() -> None:
        for key, module in modules.items():
            for name in _settings(module).keys() | flags[key].keys():
                value = flags[key].get(name, ABSENT)
                if value is ABSENT:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value
        for parameter, flag in parameters.values():
            parameter.requires_grad_(flag)

    return put_back


def _settings(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    return {name: value for name, value in own.items() if name in FLAGS or name.startswith("tile_")}


@contextmanager
def checkpointing(modules: Mapping[str, nn.Module], on: bool = True) -> Iterator[None]:
    """Context: gradient checkpointing of diffusers models switched on or off; afterwards as it was.

    A checkpointed segment is computed again at backward under whatever adapter and attention are active then, so
    the backward belongs inside the same contexts as the forward.

    Raises:
        RecipeError: a module cannot checkpoint.
    """
    before = [(layer, _settings(layer)) for module in modules.values() for layer in module.modules()]
    try:
        for name, module in modules.items():
            if on:
                if not class_attribute(type(module), "_supports_gradient_checkpointing"):
                    raise RecipeError(
                        f"{name} ({type(module).__name__}) cannot checkpoint gradients; set "
                        "gradient_checkpointing=False and lower the micro-batch instead"
                    )
                module.enable_gradient_checkpointing()  # type: ignore[operator]
            elif class_attribute(type(module), "_supports_gradient_checkpointing"):
                module.disable_gradient_checkpointing()  # type: ignore[operator]
        yield
    finally:
        for layer, settings in before:
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if name in settings:
                    vars(layer)[name] = settings[name]
                else:
                    vars(layer).pop(name, None)


@contextmanager
def decoding(vae: nn.Module, *, dtype: torch.dtype | None = None, tiling: bool | None = None) -> Iterator[None]:
    """Context: a decoder in another dtype, tiled or not; afterwards the very same tensors are back.

    Gradients through an fp16 decoder overflow (black images, NaN): use float32 or bfloat16 for rewards that
    differentiate, and run the backward inside the context too. The original tensors stay in memory beside the
    converted ones: to bfloat16 and back would lose digits.

    Args:
        tiling: None leaves it.

    Raises:
        RecipeError: tiling was asked of a decoder that has none.
    """
    settings = {id(layer): (layer, _settings(layer)) for layer in vae.modules()}
    tensors = [(t, t.data) for t in (*vae.parameters(), *vae.buffers())]
    try:
        if dtype is not None:
            for tensor, data in tensors:
                if data.is_floating_point():
                    tensor.data = data.to(dtype)
        if tiling is not None:
            switch = "enable_tiling" if tiling else "disable_tiling"
            if class_attribute(type(vae), switch) is None:
                raise RecipeError(f"{type(vae).__name__} cannot decode in tiles; leave tiling=None")
            getattr(vae, switch)()
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data
        for layer, before in settings.values():
            for name in _settings(layer).keys() - before.keys():
                vars(layer).pop(name)
            vars(layer).update(before)


@dataclass(frozen=True)
class Decode:
    """How decoders trade time for memory. None leaves a setting as the pipeline has it.

    Attributes:
        slicing: sample after sample: the same pixels. Not for decoders that are told a timestep, to which diffusers
            then hands those of all samples; `batch` is for every decoder.
        tiling: large pictures in tiles that overlap and are blended: pixels differ by what a tile does not see.
        framewise: long videos in chunks of frames that overlap and are blended: pixels differ likewise.
        batch: samples that are decoded at once, with any pipeline; None: all. The same pixels.
    """

    slicing: bool | None = None
    tiling: bool | None = None
    framewise: bool | None = None
    batch: int | None = None


def decoders(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's autoencoders by component name."""
    both = ("encode", "decode")
    return {n: m for n, m in components(pipe).items() if all(class_attribute(type(m), name) for name in both)}


def set_decoding(pipe: Any, how: Decode) -> None:
    """Switch the settings of a pipeline's decoders; `remember` puts them back.

    Raises:
        RecipeError: a decoder that has not the setting, or breaks with it; nothing was switched then.
    """
    from diffusers.configuration_utils import ConfigMixin

    if how.batch is not None and how.batch < 1:
        raise RecipeError(f"decode.batch={how.batch}; expected at least 1, or None for all samples at once")
    asked = {name: value for name in ("slicing", "tiling", "framewise") if (value := getattr(how, name)) is not None}
    flags = {"slicing": "use_slicing", "tiling": "use_tiling", "framewise": "use_framewise_decoding"}
    for name, vae in decoders(pipe).items():
        for setting in asked:
            if flags[setting] not in vars(vae):
                able = [other for other, flag in flags.items() if flag in vars(vae)]
                raise RecipeError(
                    f"decode.{setting}={asked[setting]}: {name} ({type(vae).__name__}) has no such setting; it has "
                    f"{', '.join(able) or 'none'}, and decode.batch works with every pipeline"
                )
        if how.slicing and isinstance(vae, ConfigMixin) and vae.config.get("timestep_conditioning"):
            raise RecipeError(
                f"decode.slicing=True: {name} ({type(vae).__name__}) is told a timestep per sample, and diffusers "
                "slices the samples without these; use decode.batch=1, which does the same with every pipeline"
            )
    for vae in decoders(pipe).values():
        for setting, on in asked.items():
            if setting == "framewise":
                vars(vae)[flags[setting]] = on
            else:  # the decoder's own switch may set more than the flag
                getattr(vae, f"{'enable' if on else 'disable'}_{setting}")()


# encoders


@dataclass(frozen=True)
class Offloaded:
    """Encoders moved off the accelerator.

    Attributes:
        modules: by component name; empty where there was nothing to free.
        homes: the device each came from.
        bytes: freed there.
        sentence: what was done, or why nothing was.
    """

    modules: Mapping[str, nn.Module]
    homes: Mapping[str, torch.device]
    bytes: int
    sentence: str

    def restore(self) -> None:
        """Move the encoders back."""
        for name, module in self.modules.items():
            module.to(self.homes[name])

    @contextmanager
    def onloaded(self) -> Iterator[None]:
        """Context: the encoders are back for the time of encoding new prompts."""
        self.restore()
        try:
            yield
        finally:
            for module in self.modules.values():
                module.to("cpu")
            _release()


def offload_encoders(pipe: Any, keep: Collection[str] = ()) -> Offloaded:
    """Move the encoders of a pipeline to the CPU, except the components named in `keep`.

    The pipeline still computes where its denoiser is: diffusers prefers a component on an accelerator when it asks
    for its device.

    Raises:
        RecipeError: `keep` names no encoder of this pipeline.
    """
    found = encoders(pipe)
    unknown = sorted(set(keep) - found.keys())
    if unknown:
        raise RecipeError(f"keep={unknown} are not encoders of {type(pipe).__name__}; it has {sorted(found)}")
    if vars(pipe).get("_all_hooks"):
        return Offloaded({}, {}, 0, "nothing to free: the pipeline offloads its components by itself")
    homes = {n: p.device for n, m in found.items() if n not in keep and (p := next(m.parameters(), None)) is not None}
    homes = {name: device for name, device in homes.items() if device.type not in ("cpu", "meta")}
    if not homes:
        where = {p.device.type for m in denoisers(pipe).values() for p in m.parameters()}
        return Offloaded({}, {}, 0, f"nothing to free: the encoders are on the CPU (denoiser: {', '.join(where)})")
    modules = {name: found[name] for name in homes}
    freed = sum(size(module) for module in modules.values())
    for module in modules.values():
        module.to("cpu")
    _release()
    return Offloaded(modules, homes, freed, f"freed {freed / 2**20:.0f} MiB: {', '.join(modules)} moved to the CPU")


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
