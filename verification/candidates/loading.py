"""Anybody's callable as a candidate: found by name, with what it declares."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, POINTS, Accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.subset import Subset, parse_subset


def load(spec: str) -> Candidate:
    """A candidate from `module:callable` or `path/to/file.py:callable`, with what the callable declares.

    Modules of the current directory come after the installed ones.

    Args:
        spec: where the callable is; dots after the colon walk attributes.

    Raises:
        ValueError: the module, file or callable cannot be found or imported, or its declaration is not understood.
    """
    target = find(spec, "--kernel", "shipped, golden, composite")
    candidate = Candidate(
        spec, target, decode=getattr(target, "mxref_decode", None), configs=getattr(target, "mxref_configs", None)
    )
    points, accumulation, covers = (
        getattr(target, f"mxref_{name}", None) for name in ("points", "accumulation", "covers")
    )
    return declare(candidate, points, accumulation, covers)


def find(spec: str, option: str, known: str) -> Any:
    """A callable from `module:callable` or `path/to/file.py:callable`; see `load`.

    Args:
        spec: where it is.
        option: of the command line, for messages.
        known: names that the option takes besides, for messages.

    Raises:
        ValueError: it cannot be found or imported.
    """
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"{option} is {spec!r}; expected {known}, module:callable or path/to/file.py:callable")
    target: Any = _load_file(Path(source), option) if source.endswith(".py") else _load_module(source, option)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(f"{option} {spec}: {source} has no {attribute!r}")
        target = getattr(target, name)
    if not callable(target):
        raise ValueError(f"{option} {spec}: {attribute} is {type(target).__name__}; expected a callable")
    return target


def declare(
    candidate: Candidate,
    points: Sequence[str] | str | None,
    accumulation: Accumulation | str | None,
    covers: Subset | str | None = None,
) -> Candidate:
    """The candidate with another declaration; None leaves what it has.

    Raises:
        ValueError: a rounding point or an accumulation is not in its list, or the part of the domain is not understood.
    """
    if isinstance(covers, str):
        covers = parse_subset(covers)
    if covers is not None:
        if not isinstance(covers, Subset):
            raise ValueError(f"mxref_covers is {type(covers).__name__}; expected text such as 'forward, gates=none'")
        candidate = replace(candidate, covers=covers)
    if isinstance(points, str):
        points = points.replace(" ", "").split(",")
    if points is not None:
        unknown = [name for name in points if name not in POINTS]
        if unknown:
            raise ValueError(f"rounding point {unknown[0]!r} is unknown; choose from {', '.join(POINTS)}")
        candidate = replace(candidate, declared_points=tuple(points))
    if isinstance(accumulation, str):
        if accumulation not in ACCUMULATIONS:
            raise ValueError(f"accumulation {accumulation!r} is unknown; choose from {', '.join(ACCUMULATIONS)}")
        accumulation = ACCUMULATIONS[accumulation]
    if accumulation is not None and not isinstance(accumulation, Accumulation):
        raise ValueError(f"mxref_accumulation is {type(accumulation).__name__}; expected a name or an Accumulation")
    return candidate if accumulation is None else replace(candidate, accumulation=accumulation)


def _load_file(path: Path, option: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{option}: no file {path}")
    sys.path.append(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"_mxref_candidate_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option}: {path} does not import: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, option: str) -> ModuleType:
    sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option}: module {name} does not import: {type(error).__name__}: {error}") from error
