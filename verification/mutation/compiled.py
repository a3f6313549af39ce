"""Whether a mutant leaves the compiled kernels as they were: the same PTX for every launch that dispatch can make.

    python -m mxref.verification.mutation.compiled FOLDER...        one line a folder of kernel sources: its digest

Only a process without TRITON_INTERPRET can compile, so this runs as one; the digests of all its folders can be
compared. It says nothing about host code beyond the launches' own specialisation: judge mutants of jit functions by it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mxref.verification.mutation.mutant import Mutant, Source
from mxref.verification.mutation.runner import import_kernels, write_sources

__all__ = ["same_code"]

_ARCHITECTURE = "sm_90"
_BROKEN = "-"


def same_code(mutants: Sequence[Mutant], sources: Mapping[str, Source]) -> tuple[set[str], set[str]]:
    """Compile mutants of jit functions. No GPU is needed.

    Returns:
        Names of those whose kernels compile to the unmutated ones' PTX, and of those that do not compile at all.

    Raises:
        RuntimeError: the unmutated kernels do not compile, so nothing can be said.
    """
    jitted = {(s.file, f.name) for s in sources.values() for f in s.functions if f.jit}
    candidates = [mutant for mutant in mutants if (mutant.file, mutant.function) in jitted]
    if not candidates:
        return set(), set()
    with tempfile.TemporaryDirectory(prefix="mxref-compiled-") as root:
        folders = []
        for index, mutant in enumerate([None, *candidates]):
            folder = Path(root) / str(index)
            folder.mkdir()
            write_sources(mutant, sources, folder)
            folders.append(str(folder))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": f"{root}/cache"}
        command = [sys.executable, "-m", __name__, *folders]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    unmutated, *digests = printed.split()
    if unmutated == _BROKEN:
        raise RuntimeError(f"the unmutated kernels do not compile for {_ARCHITECTURE}; see python -m mxref.kernels.aot")
    named = {m.name: digest for m, digest in zip(candidates, digests, strict=True)}
    same = {name for name, digest in named.items() if digest == unmutated}
    return same, {name for name, digest in named.items() if digest == _BROKEN}


def _digest(folder: Path) -> str:
    """One digest of all launches' code, in a fresh import of the kernels in `folder`; _BROKEN if they don't compile."""
    import_kernels(folder)
    from mxref.kernels.aot import build, units

    digest = hashlib.sha256()
    try:
        for unit in units(_ARCHITECTURE):
            digest.update(f"{unit.kernel}\0{unit.signature}\0{unit.constants}\0".encode())
            digest.update(build(unit).asm["ptx"].encode())
    except Exception:  # a mutant that does not compile is no equivalent
        return _BROKEN
    return digest.hexdigest()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(_digest(Path(argument)), flush=True)
