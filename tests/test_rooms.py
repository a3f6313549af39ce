"""Rooms import only what the rules below allow; read from the sources, imports inside functions included."""

from __future__ import annotations

import importlib.util
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = _load(ROOT / "docs" / "draw_rooms.py")

CONTAINERS = {
    f"mxref.{name}" for name in ("formats", "fragments", "weights", "routing", "problem", "swiglu", "subnormals")
}
"""What the kernels may import of the golden model: what data looks like, never how results come about."""

ALSO = {"kernels/models": "mxref.checkpoints"}
"""A room and the package that it may import besides: models are loaded from checkpoints by names on disk."""

ANSWER = "mxref.verification.candidates.answer"
"""The one module of `candidates` that a check may import: what a candidate has answered."""

REGISTRY = {f"mxref.verification.checks.{name}" for name in ("check", "registry", "own.registry")}
"""The lists of checks and their entries, which name how candidates are run for each; no check itself."""


@pytest.fixture(scope="module")
def imports() -> list[tuple[str, str]]:
    """Pairs of a module and one that imports it."""
    return sorted(rooms.imports().edges)


def _named(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{importer} imports {imported}" for imported, importer in pairs]


def test_every_room_is_listed() -> None:
    found = {name for module in rooms.modules() if (name := rooms.room(module)) is not None}
    assert found == set(rooms.ORDER)


def test_a_room_imports_only_rooms_before_it(imports: list[tuple[str, str]]) -> None:
    place = {name: i for i, name in enumerate(rooms.ORDER)}
    inside = [(a, b) for a, b in imports if rooms.room(a) and rooms.room(b)]
    assert not _named([(a, b) for a, b in inside if place[rooms.room(a)] > place[rooms.room(b)]])


def test_no_module_reaches_itself() -> None:
    circles = [sorted(found) for found in nx.strongly_connected_components(rooms.imports()) if len(found) > 1]
    assert not circles


def test_the_golden_model_imports_neither_kernels_nor_verification(imports: list[tuple[str, str]]) -> None:
    golden = ("mxref", "mxref/checkpoints")
    assert not _named([(a, b) for a, b in imports if rooms.room(b) in golden and rooms.room(a) not in golden])


def test_kernels_know_the_golden_model_s_containers_alone(imports: list[tuple[str, str]]) -> None:
    wrong = []
    for imported, importer in imports:
        home = rooms.room(importer) or ""
        if home.startswith("kernels/") and not imported.startswith("mxref.kernels"):
            also = ALSO.get(home)
            allowed = imported in CONTAINERS or (also is not None and imported.startswith(also))
            wrong += [] if allowed else [(imported, importer)]
    assert not _named(wrong)


def test_a_check_knows_an_answer_and_no_candidate(imports: list[tuple[str, str]]) -> None:
    of_candidates = [(a, b) for a, b in imports if rooms.room(a) == "verification/candidates" and a != ANSWER]
    assert not _named(
        [(a, b) for a, b in of_candidates if rooms.room(b) == "verification/checks" and b not in REGISTRY]
    )


def test_what_the_wheel_has_imports_nothing_that_it_leaves_out(imports: list[tuple[str, str]]) -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["exclude"]

    def left_out(module: str) -> bool:
        return any(fnmatch(f"{module}.", f"{pattern}.*") for pattern in patterns)

    assert sum(left_out(module) for module in rooms.modules()) > 100
    assert not _named([(a, b) for a, b in imports if left_out(a) and not left_out(b)])


def test_the_picture_shows_these_imports() -> None:
    assert rooms.drawn() == rooms.described(*rooms.arrows()), "stale; run: python docs/draw_rooms.py"
