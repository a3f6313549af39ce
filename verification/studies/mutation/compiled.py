"""Whether a mutant leaves the compiled kernels as they were: the same PTX for every launch that dispatch can make.

Or whether what it makes of them is nothing to run: no code at all, or code with a hazard (see `kernels.compiled`).

    python -m mxref.verification.studies.mutation.compiled UNMUTATED FOLDER...          one word a folder of kernel sources

Only a process without TRITON_INTERPRET can compile, so this runs as one. It says nothing about host code beyond the
launches' own specialisation: judge mutants of jit functions by it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from mxref.verification.candidates.processes import FROM_OUTSIDE
from mxref.verification.studies.mutation.child import import_kernels, write_sources
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Source

_ARCHITECTURE = "sm_90"
_SAME, _OTHER, _BROKEN, _UNKNOWN = "same", "other", "broken", "unknown"


def same_code(mutants: Sequence[Mutant], sources: Mapping[str, Source], jobs: int = 1) -> tuple[set[str], set[str]]:
    """Compile mutants of jit functions, in `jobs` processes. No GPU is needed.

    Returns:
        Names of those whose kernels compile to the unmutated ones' PTX, and of those whose first launch that compiles
        to something else does not compile at all, or has a hazard.

    Raises:
        RuntimeError: the unmutated kernels do not compile, so nothing can be said.
    """
    jitted = {(s.file, f.name) for s in sources.values() for f in s.functions if f.jit}
    candidates = [mutant for mutant in mutants if (mutant.place.file, mutant.place.function) in jitted]
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

        def compare(part: Sequence[str]) -> tuple[list[str], int]:
            command = [sys.executable, "-m", __name__, folders[0], *part]
            told = subprocess.run(command, env=environment, capture_output=True, text=True)
            return told.stdout.split(), -told.returncode

        def told(part: Sequence[str]) -> list[str]:
            """A word for each folder; a compiler that crashes says nothing, and the next process goes on behind it."""
            words: list[str] = []
            while len(words) < len(part):
                said, died_of = compare(part[len(words) :])
                words += said[1:]
                words += [_UNKNOWN if died_of in FROM_OUTSIDE else _BROKEN] if len(words) < len(part) else []
            return words

        if compare([])[0] != [_SAME]:  # and fills the cache for all others
            raise RuntimeError(
                f"the unmutated kernels do not compile for {_ARCHITECTURE}; "
                "see python -m mxref.verification.studies.compiled.ahead_of_time"
            )
        parts = [folders[1 + job :: jobs] for job in range(jobs)]
        with ThreadPoolExecutor(jobs) as pool:
            words = dict(zip(chain(*parts), chain(*pool.map(told, parts)), strict=True))
        named = [(mutant.name, words[folder]) for mutant, folder in zip(candidates, folders[1:], strict=True)]
    return {name for name, word in named if word == _SAME}, {name for name, word in named if word == _BROKEN}


def _digests(folder: Path) -> Iterator[tuple[str, Any]]:
    """A digest of each launch's code, and the launch, in a fresh import of the kernels in `folder`."""
    import_kernels(folder)
    from mxref.verification.studies.compiled.ahead_of_time import units

    for unit in units(_ARCHITECTURE):
        text = f"{unit.kernel}\0{unit.key}\0{unit.build().asm['ptx']}"
        yield hashlib.sha256(text.encode()).hexdigest(), unit


def _judge(folder: Path, expected: Sequence[str]) -> str:
    """The word for a folder whose digests should be `expected`, launch by launch until one differs."""
    for (digest, unit), wanted in zip_longest(_digests(folder), expected, fillvalue=("", None)):
        if digest != wanted:
            from mxref.verification.studies.compiled.ahead_of_time import compile_unit

            return _BROKEN if unit is not None and compile_unit(unit).hazards else _OTHER
    return _SAME


def _compare(folders: Sequence[Path]) -> Iterator[str]:
    """A word a folder; the first is what the others are compared with."""
    expected: list[str] = []
    for index, folder in enumerate(folders):
        try:
            if index == 0:
                expected = [digest for digest, _ in _digests(folder)]
            yield _judge(folder, expected) if index else _SAME
        except Exception:  # a mutant that does not compile is no equivalent
            yield _BROKEN


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a compiler prints what it cannot compile
    for word in _compare([Path(argument) for argument in sys.argv[1:]]):
        print(word, file=answers, flush=True)
