"""Python sources by what they do: digests, imports. Standard library only, and the same in every Python version."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache


def digest(texts: Mapping[str, str]) -> str:
    """One SHA-256 for the sources of `texts`, text by name."""
    return _sha(json.dumps(digests(texts), sort_keys=True))


def digests(texts: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each text's syntax tree, by name.

    Left out, because they decide nothing: comments and layout, strings that stand alone (docstrings), and what a
    `raise` says. Annotations stay in: `tl.constexpr` is one.
    """
    return {name: _digest(text) for name, text in texts.items()}


@cache
def _digest(text: str) -> str:
    return _sha(_canonical(ast.parse(text)))


@cache
def imported(text: str, package: str) -> tuple[str, ...]:
    """Modules of `package` that a source imports anywhere, by absolute names, without the package's own name."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return tuple(name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}."))


def _canonical(node: ast.AST) -> str:
    """A syntax tree as text; empty fields are left out, since newer Pythons have fields that older ones lack."""
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!r}"
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return f"Raise({'' if raised is None else _canonical(raised)})"
    fields = ((name, _field(value)) for name, value in ast.iter_fields(node))
    return f"{type(node).__name__}({', '.join(f'{name}={text}' for name, text in fields if text)})"


def _field(value: object) -> str:
    if isinstance(value, ast.expr_context):
        return ""
    if isinstance(value, ast.JoinedStr):  # Python 3.12 ends some of them with an empty string
        parts = [part for part in value.values if not (isinstance(part, ast.Constant) and part.value == "")]
        return f"JoinedStr({_field(parts)})"
    if isinstance(value, ast.AST):
        return _canonical(value)
    if isinstance(value, list):
        return f"[{', '.join(_items(value))}]" if value else ""
    return "" if value is None else repr(value)


def _items(values: list[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, ast.Expr) and isinstance(value.value, ast.Constant) and isinstance(value.value.value, str):
            continue
        yield _field(value)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
