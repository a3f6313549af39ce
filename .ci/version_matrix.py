#!/usr/bin/env python3
"""Which versions of torchao, transformers and PEFT this project's tests pass with: a Markdown table on stdout.

    .venv/bin/python .ci/version_matrix.py [--keep DIR] [LIBRARY==VERSION ...]

Each version is installed beside the environment, in a folder of its own, and goes first on the path of the tests that
concern its library; transformers brings its own dependencies along. Everything else, torch first, is the environment's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEATURES = {
    "MXTensor in and out": ["tests/kernels/test_interop_torchao.py", "tests/mxref/test_torchao.py"],
    "formats": ["tests/mxref/test_formats_torchao.py"],
    "experts implementation, packing": ["tests/kernels/test_interop_transformers.py"],
    "MoE block layer": ["tests/kernels/test_layers.py"],
    "every family": ["tests/kernels/test_interop_families.py"],
    "checkpoints": [
        "tests/kernels/test_loading.py",
        "tests/kernels/test_loading_conventions.py",
        "tests/mxref/test_checkpoint.py",
    ],
    "PEFT adapters, merging": [
        "tests/kernels/test_interop_peft.py",
        "tests/kernels/test_interop_peft_calls.py",
        "tests/kernels/test_merging.py",
    ],
    "compile, autocast, checkpointing": ["tests/integration/test_torch_features.py"],
    "fine-tuning (notebook 04)": ["tests/test_notebooks.py", "-k", "04"],
}
_MODELS = [name for name in FEATURES if name not in ("MXTensor in and out", "formats")]
VERSIONS = {
    "torchao": (("0.17.0", "0.18.0"), ["MXTensor in and out", "formats", "experts implementation, packing"]),
    "transformers": (("5.17.0", "5.22.0", "5.23.0", "5.24.0"), _MODELS),
    "peft": (("0.21.0", "0.21.1", "0.21.2"), [name for name in _MODELS if "packing" not in name]),
}


def main() -> int:
    """Print the table; 0 if everything passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", metavar="DIR", type=Path, help="for the installed versions; used again if there")
    parser.add_argument("pins", metavar="LIBRARY==VERSION", nargs="*", help="by default all known ones")
    arguments = parser.parse_args()
    pins = arguments.pins or [f"{library}=={v}" for library, (versions, _) in VERSIONS.items() for v in versions]
    if unknown := [pin for pin in pins if pin.partition("==")[0] not in VERSIONS]:
        parser.error(f"{unknown[0]}: expected LIBRARY==VERSION with one of {', '.join(VERSIONS)}")
    print("| version |", " | ".join(FEATURES), "|")
    print("|---" * (len(FEATURES) + 1) + "|", flush=True)
    with tempfile.TemporaryDirectory() as fresh:
        rows = [row(pin, (arguments.keep or Path(fresh)) / pin) for pin in pins]
    return 0 if all(rows) else 1


def row(pin: str, folder: Path) -> bool:
    """Install one version, run its tests, print its line; whether all passed."""
    library, _, version = pin.partition("==")
    if not folder.is_dir():
        alone = [] if library == "transformers" else ["--no-deps"]  # the others' would bring another torch
        command = [sys.executable, "-m", "pip", "install", "--quiet", *alone, "--target", str(folder), pin]
        subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    code = f"import importlib.metadata; print(importlib.metadata.version('{library}'))"
    seen = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    if seen.stdout.strip() != version:
        raise RuntimeError(f"{pin} is hidden by {library} {seen.stdout.strip()}")
    cells = [outcome(tests, environment) if name in VERSIONS[library][1] else "" for name, tests in FEATURES.items()]
    print(f"| {library} {version} |", " | ".join(cells), "|", flush=True)
    return not any("failed" in cell or "error" in cell for cell in cells)


def outcome(tests: list[str], environment: dict[str, str]) -> str:
    """pytest's own closing words."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])
    return ", ".join(" ".join(pair) for pair in counts) or f"error: pytest ended with {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
