"""The kernels' sources as texts and syntax trees: what is mutated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import mxref

KERNELS = Path(mxref.__file__).parent / "kernels"
"""The sources that are mutated."""

_GPU_FIELDS = ("hopper", "fragments", "fused")
"""What a tiling has that only a GPU runs."""
_GPU_NAMES = ("aligned", "words", "_boxes")
"""Arguments and variables of a launcher that only a GPU's loads notice: copies of what begins between multiples of 16
bytes, and boxes of rows."""


@dataclass(frozen=True)
class Place:
    """A function of the sources: a file such as "device/decode.py", and a qualified name; "" for the module itself."""

    file: str
    function: str = ""

    def __str__(self) -> str:
        return f"kernels/{self.file}" + (f", {self.function}" if self.function else "")


@dataclass(frozen=True)
class Function:
    """A function of a source. `launches`: it prepares launches of kernels, or starts them, as `launch(…)`."""

    name: str
    node: ast.FunctionDef
    jit: bool
    launches: bool


@dataclass(frozen=True)
class Source:
    """One file of the kernels: its name, such as "device/decode.py", its text and what the parser makes of it."""

    file: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, outer before inner."""
        return list(_functions(self.tree.body, ""))

    @cached_property
    def gpu_only(self) -> set[str]:
        """Jit functions that the interpreter never runs: Gluon, inline assembly, and what only GPU branches call."""
        gluon = {f.name for f in self.functions if any(_is_jit(d, "gluon") for d in f.node.decorator_list)}
        jitted = {f.name for f in self.functions if f.jit}
        assembly = {f.name for f in self.functions if f.jit and "inline_asm" in self.of(f.node)}
        gpu = set().union(*(_called(part) for f in self.functions for part in _gpu_parts(f.node)), set())
        both = set().union(*(_called(f.node, skip_gpu=True) for f in self.functions if f.name not in assembly), set())
        return gluon | assembly | ((gpu - both) & jitted)

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        for line in self.text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    def function(self, name: str) -> ast.AST | None:
        """A function's syntax tree by its qualified name, the module's for ""; None if there is no such function."""
        return next((f.node for f in self.functions if f.name == name), None) if name else self.tree

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        """A node's characters start..end; the parser counts bytes of UTF-8 within lines."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.expr | ast.stmt) -> str:
        """A node's text."""
        start, end = self.span(node)
        return self.text[start:end]

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


def is_gpu_branch(node: ast.AST) -> TypeGuard[ast.If]:
    """Whether the node is an `if` whose body only a GPU runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Attribute) and node.test.attr in _GPU_FIELDS


def is_for_gpu_loads(node: ast.AST) -> bool:
    """Whether the node is an argument or an assignment whose value only a GPU's loads notice."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
        return (target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")) in _GPU_NAMES
    return isinstance(node, ast.keyword) and node.arg in _GPU_NAMES


def is_for_gpu_tilings(node: ast.AST) -> bool:
    """Whether the node is an `if` that only takes a tiling's `dense()`, which is itself unless a GPU alone has it."""
    if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1 or not isinstance(node.body[0], ast.Assign):
        return False
    value = node.body[0].value
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "dense"


def _gpu_parts(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    for node in ast.walk(function):
        if is_gpu_branch(node):
            yield from node.body


def _called(node: ast.AST, skip_gpu: bool = False) -> set[str]:
    """Names that are called in a node; `skip_gpu`: but for GPU branches."""
    names = {node.func.id} if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else set()
    skipped = node.body if skip_gpu and is_gpu_branch(node) else []
    children = (child for child in ast.iter_child_nodes(node) if child not in skipped)
    return names.union(*(_called(child, skip_gpu) for child in children), set())


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
            launches = any(
                isinstance(called, ast.Name) and called.id in ("launch", "PreparedLaunch") for called in calls
            )
            yield Function(prefix + node.name, node, jit, launches)
            yield from _functions(node.body, f"{prefix}{node.name}.")
