"""Where a result was measured: it stands beside every number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy")


def hardware() -> dict[str, Any]:
    """Return the machine and the versions, in words."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine_name(device: str | torch.device = "cpu") -> str:
    """Return a name for a folder of results: the device's, in lower case, such as ``nvidia-h200`` or ``amd-epyc-2``.

    Args:
        device: what ran the models; a CPU's name ends in the number of its cores.
    """
    if torch.device(device).type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = re.sub(r"\((R|TM|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", f"{_cpu()}") + f" {os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions(found: dict[str, Any]) -> str:
    """Return what :func:`hardware` found as one sentence's words."""
    where = f"{found['cpu']}, {found['threads']} of {found['cores']} cores"
    if "gpu" in found:
        where = f"{found['gpu']}; {where}"
    return f"{where}; Python {found['python']}, " + ", ".join(f"{package} {found[package]}" for package in PACKAGES)


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
