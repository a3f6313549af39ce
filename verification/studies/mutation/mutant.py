"""A mutant: one small edit of a kernel source, located exactly once, together with the function that it breaks."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import mxref

__all__ = [
    "KERNELS",
    "Bug",
    "Function",
    "Mutant",
    "Source",
    "StaleMutantError",
    "fingerprint",
    "is_fast",
    "is_for_gpu_tilings",
    "locate",
    "read_sources",
]

KERNELS = Path(mxref.__file__).parent / "kernels"
"""The sources that are mutated."""


_GPU_SWITCHES = ("FAST", "SETTLE", "hopper")
"""Compile-time switches of the kernels, and fields of a tiling, that are off under the interpreter."""


class StaleMutantError(ValueError):
    """A mutant no longer fits the sources; the message names it and says what to do."""


@dataclass(frozen=True)
class Bug:
    """A mutant by hand: a snippet that occurs exactly once in a file, and what to put there.

    Attributes:
        name: unique, in words.
        file: name of the file among the kernels.
        before, after: the edit; `before` may be a part of a line or span lines.
        category: what kind of mistake it is, such as "masks".
        why: how a person comes to write it, or what it breaks.
        gpu_only: the interpreter cannot show it (rounding to 16 bits, tensor cores, ...).
    """

    name: str
    file: str
    before: str
    after: str
    category: str
    why: str
    gpu_only: bool = False


@dataclass(frozen=True)
class Mutant:
    """One edit of one source: characters start..end of `file` become `after`.

    Attributes:
        name: unique and reproducible.
        file: name of the file among the kernels.
        function: qualified name of the innermost function around the edit, "" at module level.
        line: first line of the edit, from 1.
        start, end: the edited span of the file's text.
        before, after: the text there, and what replaces it.
        category: the kind of mistake of a mutant by hand, the operator of a systematic one.
        why: see `Bug`; empty for a systematic one.
        by_hand: whether a person wrote it.
        gpu_only: see `Bug`.
    """

    name: str
    file: str
    function: str
    line: int
    start: int
    end: int
    before: str
    after: str
    category: str
    why: str = ""
    by_hand: bool = False
    gpu_only: bool = False

    def apply(self, text: str) -> str:
        """The mutated source."""
        assert text[self.start : self.end] == self.before
        return text[: self.start] + self.after + text[self.end :]

    def edit(self, text: str) -> tuple[str, str]:
        """The edited lines before and after, without indentation: what identifies the mutant to a reader."""
        mutated = self.apply(text)
        first = text.rfind("\n", 0, self.start) + 1
        stop = text.find("\n", self.end)
        stop = len(text) if stop < 0 else stop
        return text[first:stop].strip(), mutated[first : stop + len(mutated) - len(text)].strip()


@dataclass(frozen=True)
class Function:
    """A function of a source. `launches`: it starts kernels itself, through `launch`."""

    name: str
    node: ast.FunctionDef
    jit: bool
    launches: bool


@dataclass(frozen=True)
class Source:
    """One file of the kernels: its name, its text and what the parser makes of it."""

    file: str
    text: str

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, outer before inner."""
        return list(_functions(ast.parse(self.text).body, ""))

    @cached_property
    def gpu_only(self) -> set[str]:
        """Jit functions that the interpreter never runs: Gluon, inline assembly, and what only GPU branches call."""
        gluon = {f.name for f in self.functions if any(_is_jit(d, "gluon") for d in f.node.decorator_list)}
        jitted = {f.name for f in self.functions if f.jit}
        assembly = {f.name for f in self.functions if f.jit and "inline_asm" in self.of(f.node)}
        fast = set().union(*(_called(part) for f in self.functions for part in _fast_parts(f.node)), set())
        slow = set().union(*(_called(f.node, skip_fast=True) for f in self.functions if f.name not in assembly), set())
        return gluon | assembly | ((fast - slow) & jitted)

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        for line in self.text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """A node's characters start..end; the parser counts bytes of UTF-8 within lines."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.expr | ast.stmt) -> str:
        """A node's text."""
        start, end = self.span(node)
        return self.text[start:end]

    def line(self, offset: int) -> int:
        """The line that holds a character, from 1."""
        return self.text.count("\n", 0, offset) + 1

    def function_at(self, offset: int) -> str:
        """Qualified name of the innermost function around a character; "" at module level."""
        around = [f.name for f in self.functions if self.span(f.node)[0] <= offset < self.span(f.node)[1]]
        return around[-1] if around else ""

    def _offset(self, line: int, column: int) -> int:
        start = self._line_starts[line - 1]
        text = self.text[start : self._line_starts[line]]
        return start + (column if text.isascii() else len(text.encode()[:column].decode()))


def read_sources(folder: Path = KERNELS) -> dict[str, Source]:
    """Every Python file of the kernels, by its path below `folder`."""
    rooms = sorted(path for path in folder.iterdir() if path.is_dir() and (path / "__init__.py").is_file())
    paths = [path for place in (folder, *rooms) for path in sorted(place.glob("*.py"))]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: Source(name, path.read_text(encoding="utf-8")) for name, path in zip(names, paths, strict=True)}


def locate(bug: Bug, sources: Mapping[str, Source]) -> Mutant:
    """Find a bug's snippet.

    Raises:
        StaleMutantError: the file is gone, the snippet does not occur exactly once, or the result does not parse.
    """
    stale = f"mutant {bug.name!r} is stale"
    if bug.file not in sources:
        raise StaleMutantError(f"{stale}: there is no kernels/{bug.file}; move it to where its code went, or drop it")
    source = sources[bug.file]
    found = source.text.count(bug.before)
    if found != 1:
        raise StaleMutantError(
            f"{stale}: its snippet occurs {found} times in kernels/{bug.file}; expected exactly one; "
            f"adapt it to the sources: {bug.before!r}"
        )
    start = source.text.index(bug.before)
    mutant = Mutant(
        bug.name, bug.file, source.function_at(start), source.line(start), start, start + len(bug.before), bug.before,
        bug.after, bug.category, bug.why, by_hand=True, gpu_only=bug.gpu_only,
    )  # fmt: skip
    try:
        changed = ast.dump(ast.parse(mutant.apply(source.text)))
    except SyntaxError as error:
        raise StaleMutantError(f"{stale}: the edited kernels/{bug.file} does not parse: {error}") from None
    if changed == ast.dump(ast.parse(source.text)):
        raise StaleMutantError(f"{stale}: its edit changes no code in kernels/{bug.file}")
    return mutant


def fingerprint(sources: Mapping[str, Source]) -> str:
    """Names one state of the sources."""
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\0{source.text}\0".encode())
    return digest.hexdigest()[:16]


def is_fast(node: ast.AST) -> TypeGuard[ast.If]:
    """Whether the node is an `if` whose body only a GPU runs: on a switch, or on a tiling's own word for it."""
    if not isinstance(node, ast.If):
        return False
    name = node.test.id if isinstance(node.test, ast.Name) else getattr(node.test, "attr", None)
    return name in _GPU_SWITCHES


def is_for_gpu_tilings(node: ast.AST) -> bool:
    """Whether the node is an `if` that only takes a tiling's `dense()`, which is itself unless a GPU alone has it."""
    if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1 or not isinstance(node.body[0], ast.Assign):
        return False
    value = node.body[0].value
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "dense"


def _fast_parts(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    for node in ast.walk(function):
        if is_fast(node):
            yield from node.body


def _called(node: ast.AST, skip_fast: bool = False) -> set[str]:
    """Names that are called in a node; `skip_fast`: but for GPU branches."""
    names = {node.func.id} if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else set()
    skipped = node.body if skip_fast and is_fast(node) else []
    children = (child for child in ast.iter_child_nodes(node) if child not in skipped)
    return names.union(*(_called(child, skip_fast) for child in children), set())


def _is_jit(decorator: ast.expr, module: str | None = None) -> bool:
    """Whether a decorator is `module.jit`, called or not; None for any module."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    if not isinstance(target, ast.Attribute) or target.attr != "jit" or not isinstance(target.value, ast.Name):
        return False
    return module is None or target.value.id == module


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[Function]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            jit = any(_is_jit(decorator) for decorator in node.decorator_list)
            calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
            launches = any(isinstance(called, ast.Name) and called.id == "launch" for called in calls)
            yield Function(prefix + node.name, node, jit, launches)
            yield from _functions(node.body, f"{prefix}{node.name}.")
