"""What a GPU saw, and of which sources: records that go stale when the kernels change.

CI has no GPU. So the commands that run on one write what they found into `evidence/<gpu>/`, one file a command, with
a digest of everything that decides a result there. A CPU test compares that digest with the sources beside it: a
kernel change without a fresh GPU run does not pass. Records are written by the commands and by nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mxref
from mxref.verification.cli.options import EVIDENCE
from mxref.verification.records.sources import digest, digests, imported
from mxref.verification.records.ulp_baseline import architecture_name

if TYPE_CHECKING:
    from mxref.verification.gate.result import GateResult

__all__ = ["COMMANDS", "check", "gate_summary", "load", "record", "sources", "versions"]

SCHEMA = "mxref.evidence/1"

COMMANDS = {
    "gate": "mxref gate --require-gpu --record",
    "scoreboard": "mxref scoreboard --device cuda --record",
    "pytest": "pytest -m gpu --require-gpu --record-evidence",
    "bench": "mxref bench --record",
    "finetune": "python notebooks/04_finetune_gpt_oss.py --record",
}
"""The command that writes each kind of record."""

REQUIRED = ("gate", "bench")
"""What one GPU must have both of: the kernels' verdict and their speed. The others must be current where they are."""

_ROOTS = ("kernels.layer.autograd", "kernels.device.dequant", "kernels.layer.scatter2scatter", "routing")
"""What the judged operations are defined in, and the caller's way to their index tensors."""


def sources() -> dict[str, str]:
    """Everything that decides a result, text by file name: the operations' modules and all of this package they import.

    Jitted functions, configurations, launchers, autograd, containers; not the layers around them, not reports.
    """
    package, texts, waiting = Path(mxref.__file__).parent, dict[str, str](), list(_ROOTS)
    while waiting:
        path = package / f"{waiting.pop().replace('.', '/')}.py"
        name = path.relative_to(package).as_posix()
        if name not in texts and path.is_file():
            texts[name] = path.read_text(encoding="utf-8")
            waiting += imported(texts[name], "mxref")
    return dict(sorted(texts.items()))


def record(root: Path, kind: str, payload: Mapping[str, Any]) -> Path:
    """Write one record for the GPU of this machine; its path.

    Args:
        root: folder with one folder a GPU.
        kind: one of COMMANDS.
        payload: what the command found, as plain data. It cannot say what a record says of itself.

    Raises:
        RuntimeError: there is no GPU.
        OSError: the folder cannot be made or written to.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("evidence is what a GPU saw; torch sees no CUDA GPU on this machine")
    texts = sources()
    entry: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "command": COMMANDS[kind],
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "digest": digest(texts),
        "sources": digests(texts),
    }
    entry |= {name: found for name, found in payload.items() if name not in entry}
    path = root / architecture_name(torch.device("cuda")) / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry | {"seal": _seal(entry)}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> dict[str, Any]:
    """One record.

    Raises:
        ValueError: the file is no record, or it was changed after a command wrote it.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of schema {SCHEMA}")
    if entry.pop("seal", None) != _seal(entry):
        raise ValueError(f"{path} was changed by hand; refresh it: {COMMANDS.get(entry.get('kind', ''), 'mxref gate')}")
    return entry


def check(root: Path = EVIDENCE, texts: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with the records: one line each, naming the command that puts it right; empty when all is well.

    At least one GPU must have every required kind of record, every record that is there must belong to these sources,
    and the gate and the tests must have passed.

    Args:
        root: folder with one folder a GPU.
        texts: the sources to compare with; None for the installed ones.
    """
    current = digests(sources() if texts is None else texts)
    folders = [folder for folder in sorted(root.glob("*")) if folder.is_dir()]
    problems = []
    if not any(all((folder / f"{kind}.json").is_file() for kind in REQUIRED) for folder in folders):
        commands = "; ".join(COMMANDS[kind] for kind in REQUIRED)
        problems.append(f"no GPU has every record below {root}; run on one: {commands}")
    for path in (folder / f"{kind}.json" for folder in folders for kind in COMMANDS):
        if path.is_file():
            problems += _wrong_with(path, current)
    return problems


def _wrong_with(path: Path, current: Mapping[str, str]) -> Iterator[str]:
    where = f"{path.parent.name}/{path.name}"
    try:
        entry = load(path)
    except ValueError as error:
        yield str(error)
        return
    seen, command = entry["sources"], entry["command"]
    changed = sorted(name for name in seen.keys() | current.keys() if seen.get(name) != current.get(name))
    if changed:
        yield f"{where} is older than {', '.join(changed)}; run on a GPU: {command}"
    if entry.get("passed") is False:
        yield f"{where} records a failure on {entry['gpu']}; mend it, then run on a GPU: {command}"


def gate_summary(result: GateResult) -> dict[str, Any]:
    """What is worth keeping of a gate's result: the verdict, the largest errors case by case, any failures."""
    ulps: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for finding in result.findings:
        if finding.max_ulp is not None and math.isfinite(finding.max_ulp):
            tensors = ulps.setdefault(finding.case, {})
            tensors[finding.tensor] = max(tensors.get(finding.tensor, 0.0), finding.max_ulp)
        if finding.bound_share is not None and math.isfinite(finding.bound_share):
            tensors = shares.setdefault(finding.check, {})
            tensors[finding.tensor] = max(tensors.get(finding.tensor, 0.0), finding.bound_share)
    return {
        "passed": result.exit_code == 0,
        "verdict": str(result.verdict),
        "counts": {str(status): count for status, count in result.counts().items()},
        "candidate": result.candidate.name,
        "suite": result.suite,
        "seed": result.seed,
        "device": result.device,
        "started": result.started,
        "seconds": round(result.seconds, 1),
        "failures": [str(finding) for finding in result.findings if not finding.ok],
        "bound_share": shares,
        "max_ulp": ulps,
    }


def versions() -> dict[str, str]:
    """What took part: packages, Python, CUDA, the driver and the assembler."""
    found = {
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
        "ptxas": _ptxas(),
    }
    for package in ("mxref", "torch", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = str(getattr(import_module(package), "__version__", "unknown"))
    return found


def _driver() -> str:
    """The NVIDIA driver's version, from its management library, which every driver brings along."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(80)
    answered = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    return text.value.decode() if answered else "unknown"


def _ptxas() -> str:
    """The version of the assembler that Triton brings along."""
    try:
        binary = Path(import_module("triton.backends.nvidia").__path__[0]) / "bin" / "ptxas"
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, OSError, subprocess.CalledProcessError):
        return "unknown"
    release = re.search(r"V(\d[\d.]*)", said)
    return release.group(1) if release else "unknown"


def _seal(entry: Mapping[str, Any]) -> str:
    """Shows an edit that nobody meant; it is no signature."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
