"""Files of tensors, safetensors or `torch.save`, read without running anything that is in them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from zipfile import is_zipfile

import torch

from alignkit.errors import RewardError


def read_tensors(place: Path, pattern: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; `{"state_dict": ...}` is opened.

    Args:
        place: the file, or the folder that holds it.
        pattern: which file of the folder, as a glob; `a|b` is the first that is there.

    Raises:
        RewardError: it is no file of named tensors, or holds code.
    """
    file = named(place, pattern) if place.is_dir() else place
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    refuse_code(file)
    read = torch.load(file, map_location="cpu", weights_only=True)
    state = read.get("state_dict", read) if isinstance(read, dict) else read
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RewardError(f"{file} holds {type(read).__name__}, expected tensors by name (`model.state_dict()`)")
    return dict(state)


def refuse_code(file: Path) -> None:
    """Raises RewardError naming what a file of `torch.save` would have to import, where that is more than tensors.

    Nothing of the file is run, here or by `weights_only=True`; this says why and what to do. Files in the format of
    before torch 1.6 are left to `weights_only=True`.
    """
    if file.suffix == ".safetensors" or not is_zipfile(file):
        return
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except ValueError:  # its way to say that this is a program for torch.jit
        needed = ["TorchScript"]
    if needed:
        raise RewardError(
            f"{file} holds more than tensors ({', '.join(needed[:3])}), and a file that runs code is not read; save "
            "`model.state_dict()` as safetensors and give that file"
        )


def named(folder: Path, pattern: str) -> Path:
    """The first file of the folder that fits; `weights.locate` has seen that there is one."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    for one in pattern.split("|"):
        for path, name in names.items():
            if fnmatch(name, one):
                return path
    raise RewardError(f"{folder} holds no {pattern}")
