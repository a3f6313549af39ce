"""Versions of what takes part in a result: packages, Python, CUDA, the driver, the assembler."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from mxref.verification.candidates.known import version_of


def versions() -> dict[str, str]:
    """Version by name; "unknown" where it cannot be found out, "none" where there is no such part on this machine."""
    found = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "driver": _driver(),
        "ptxas": _ptxas(),
    }
    return found | {package: _package(package) for package in ("mxref", "torch", "triton", "numpy")}


def _package(name: str) -> str:
    return version_of(name) or str(getattr(import_module(name), "__version__", "unknown"))


def _driver() -> str:
    """The NVIDIA driver's version, from its management library, which every driver brings along."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "none"
    text = ctypes.create_string_buffer(80)
    answered = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    return text.value.decode() if answered else "unknown"


@cache
def _ptxas() -> str:
    """The version of the assembler that Triton brings along."""
    try:
        binary = Path(import_module("triton.backends.nvidia").__path__[0]) / "bin" / "ptxas"
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, OSError, subprocess.CalledProcessError):
        return "unknown"
    release = re.search(r"V(\d[\d.]*)", said)
    return release.group(1) if release else "unknown"
