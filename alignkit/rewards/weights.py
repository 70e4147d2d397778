"""Where the weights of a reward are: a folder of the user's, what ships with alignkit, or the hub's cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

from alignkit import shipped
from alignkit.errors import RecipeError, RewardError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MissingWeights(RewardError):
    """Weights are neither on disk nor reachable. Never masked: no sample could be scored."""


@dataclass(frozen=True)
class Files:
    """Files of one repository of the hub, or of a local folder in its layout.

    Attributes:
        source: hub id `owner/name`, a local folder or file, or `shipped:assets/...`.
        patterns: what is read of it, as globs; `a|b` is satisfied by either.
    """

    source: str
    patterns: tuple[str, ...]

    @property
    def local(self) -> Path | None:
        """The folder or file on disk that `source` names; None where it is a hub id."""
        path = Path(shipped.resolved(self.source)).expanduser()
        if path.exists():
            return path
        if path.is_absolute() or self.source.startswith((".", "~")) or self.source.count("/") != 1:
            raise MissingWeights(
                f"weights {self.source!r}: there is no such file or folder, and no hub id looks like it"
            )
        return None


def locate(files: Files, download: bool = True) -> Path:
    """The folder that holds the files (or the file itself, where `source` names one).

    Args:
        download: False looks only on disk.

    Raises:
        MissingWeights: they are not on disk and cannot be downloaded; names the hub id and the command that
            fetches it, or the files that a local folder lacks.
    """
    found = files.local
    if found is None:
        found = _snapshot(files, download)
    if found.is_dir():
        lacking = [pattern for pattern in files.patterns if not _matches(found, pattern)] + _missing_shards(
            found, files
        )
        if lacking:
            raise MissingWeights(f"weights {files.source!r} ({found}) lack {', '.join(lacking)}")
    return found


def _snapshot(files: Files, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [one for pattern in files.patterns for one in pattern.split("|")]
    try:
        return Path(snapshot_download(files.source, allow_patterns=patterns, local_files_only=not download))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if download else "not in the hub's cache"
        raise MissingWeights(
            f"the weights {files.source} ({', '.join(files.patterns)}) are not on this machine ({reason}). Where the "
            f"hub can be reached: `alignkit fetch RECIPE` gets all that a recipe needs, `alignkit fetch NAME` what the "
            f"reward NAME needs, `hf download {files.source}` this one; or give a local folder as `weights`"
        ) from error


def _matches(folder: Path, pattern: str) -> bool:
    names = [str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()]
    return any(fnmatch(name, one) for name in names for one in pattern.split("|"))


def _missing_shards(folder: Path, files: Files) -> list[str]:
    """Parts of weights in several files that are asked for and that a download that was cut off did not bring."""
    indices = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.safetensors.index.json"))]
    named = sorted({name for index in indices for name in index["weight_map"].values()})
    asked = [one for pattern in files.patterns for one in pattern.split("|")]
    wanted = [name for name in named if any(fnmatch(name, one) for one in asked)]
    return [name for name in wanted if not (folder / name).is_file()]


def present(files: Files) -> bool:
    """Whether the files are on disk; nothing is downloaded."""
    try:
        locate(files, download=False)
    except MissingWeights:
        return False
    return True


def on(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, moved to where the media are if it is not there yet."""
    if next(module.parameters()).device != device:
        module.to(device)
    return module


def frozen(module: nn.Module, dtype: str = "float32") -> nn.Module:
    """The module for scoring: evaluation mode, no gradients of its own, in `dtype`.

    Two kinds of numbers stay in float32, whatever the dtype. Buffers that no file holds, such as the frequencies of
    rotary positions: with the 8 bits of bfloat16 the angles of later tokens are off by radians, which is why
    `from_pretrained` leaves them alone too. And scalars: exp(logit_scale) would be off by a percent.

    Raises:
        RecipeError: no such dtype.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype={dtype!r}; choose one of {', '.join(DTYPES)}")
    saved = module.state_dict().keys()
    exact = {name: buffer.detach() for name, buffer in module.named_buffers() if name not in saved}
    scalars = {name: value.detach() for name, value in module.named_parameters() if value.ndim == 0}
    module.eval().requires_grad_(False).to(DTYPES[dtype])
    for name, value in {**exact, **scalars}.items():
        owner, _, own = name.rpartition(".")
        kept = value.float() if value.is_floating_point() else value
        held = nn.Parameter(kept, requires_grad=False) if name in scalars else kept
        setattr(module.get_submodule(owner), own, held)
    return module
