"""What this machine has: versions, devices, attention kernels that run, rewards that load, and what to change."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

PACKAGES = (
    "alignkit",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "xformers",
    "open_clip_torch",
    "rapidocr",
    "onnxruntime",
    "safetensors",
    "decord",
    "av",
)


def versions() -> dict[str, str | None]:
    """Installed versions by package, without importing any; None where it is not installed."""
    return {name: installed(name) for name in PACKAGES}


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torchvision_fault(torch_version: str | None, torchvision_version: str | None, needs: list[str]) -> str | None:
    """What is wrong between torch and torchvision, in a sentence; None where they fit.

    A torchvision built for another torch makes diffusers and transformers fail with messages about something else,
    so this is told from package metadata, before anything is imported.

    Args:
        needs: torchvision's requirements, such as "torch==2.15.0".
    """
    if torch_version is None or torchvision_version is None:
        return None
    own, _, build = torch_version.partition("+")
    pinned = [m.group(1) for need in needs if (m := re.match(r"torch\s*\(?==\s*([\d.]+)", need))]
    if pinned and pinned[0] != own:
        return (
            f"torch {torch_version} and torchvision {torchvision_version} were built for different torch versions "
            f"(this torchvision needs torch {pinned[0]}); install the torchvision of torch {own}: "
            "pip install --upgrade torchvision, from the same index as torch"
        )
    other = torchvision_version.partition("+")[2]
    if build and other and build != other:
        return (
            f"torch {torch_version} and torchvision {torchvision_version} are builds for different devices "
            f"({build} and {other}); install both from the same index"
        )
    return None


def torch_and_torchvision() -> str | None:
    """The fault between the installed torch and torchvision, or None."""
    found = installed("torchvision")
    needs = requires("torchvision") or [] if found else []
    return torchvision_fault(installed("torch"), found, needs)


def devices() -> list[dict[str, Any]]:
    """Accelerators and the CPU as torch sees them."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU (float32 only)", "memory_bytes": None})
    found.append({"device": "cpu", "name": platform.processor() or platform.machine(), "memory_bytes": None})
    return found


def attention() -> list[dict[str, Any]]:
    """Attention backends that were tried with a tiny forward and backward, and the kernels that ran."""
    import torch

    from alignkit.policy.attention import kernel_report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        {
            "backend": p.backend,
            "device": device,
            "forward": p.forward,
            "backward": p.backward,
            "kernels": list(p.kernels),
            "note": p.note,
        }
        for p in kernel_report(device)
    ]


def threads() -> dict[str, Any]:
    """Threads torch uses and what the environment says about waiting ones."""
    import torch

    names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    load = None if os.name == "nt" else os.getloadavg()[0]
    return {
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load": load,
        "environment": {name: os.environ.get(name) for name in names},
    }


def thread_advice(found: dict[str, Any]) -> str | None:
    """Two threads that spin while they wait run many times slower than one on a machine that others use too."""
    cpus, used, load = found["cpus"] or 1, found["torch_threads"], found["load"]
    quiet = found["environment"]["OMP_WAIT_POLICY"] == "passive"
    if used <= 1 or quiet:
        return None
    busy = load is not None and load > 0.75 * cpus
    if not busy and used <= cpus:
        return None
    why = f"{used} threads on {cpus} CPUs" + (f" with a load of {load:.1f}" if load is not None else "")
    return f"{why}: waiting threads spin and slow each other down; set GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive"


def rewards() -> list[dict[str, Any]]:
    """Every reward with a short name: its card, and whether it can be used here. No weights are read."""
    from alignkit.rewards import TABLE, status
    from alignkit.rewards.catalogue import record_of

    found = status()
    return [{"name": name, "spec": spec, **record_of(name), "status": found[name]} for name, spec in TABLE.items()]


def examine() -> dict[str, Any]:
    """Everything as a JSON record; `problems` are sentences that say what to do.

    Where torch and torchvision do not fit together nothing that imports them is tried, and the other parts are None.
    """
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": None,
        "attention": None,
        "rewards": None,
        "threads": None,
        "tesseract": shutil.which("tesseract"),
        "problems": [],
    }
    fault = torch_and_torchvision()
    if fault is not None:
        record["problems"].append(fault)
        return record
    found = threads()
    record |= {"devices": devices(), "attention": attention(), "rewards": rewards(), "threads": found}
    record["problems"] = [advice for advice in (thread_advice(found), _xformers(record), _tesseract(record)) if advice]
    return record


def _xformers(record: dict[str, Any]) -> str | None:
    if record["versions"]["xformers"] is None or record["devices"][0]["device"] == "cpu":
        return None
    (tried,) = [one for one in record["attention"] if one["backend"] == "xformers"]
    if tried["forward"]:
        return None
    return f"xformers is installed and does not run here ({tried['note']}); attention stays with PyTorch's own kernels"


def _tesseract(record: dict[str, Any]) -> str | None:
    if record["tesseract"] is not None:
        return None
    return "tesseract is not installed, so the judge that training never sees is skipped; apt install tesseract-ocr"
