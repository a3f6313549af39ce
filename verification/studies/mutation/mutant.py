"""A mutant: one small edit of one node of a kernel source.

It is known by the smallest node that the edit changes, so that the same change is one mutant however it is written.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from mxref.verification.studies.mutation.sources import Place, Source

Node = ast.expr | ast.stmt

_NEED_NO_PARENTHESES = (ast.Name, ast.Constant, ast.Attribute, ast.Call, ast.Subscript)


@dataclass(frozen=True)
class Mutant:
    """One edit of one source: characters start..end of the file become `after`.

    Attributes:
        name: unique and reproducible.
        place: the innermost function around the edit.
        line: first line of the edit, from 1.
        start, end: the edited span of the file's text.
        before, after: the text there, and what replaces it.
        change: file and span of the smallest node that differs, and the syntax tree in its place.
        category: the kind of mistake of a mutant by hand, the operator of a systematic one.
        why: how a person comes to write it, or what it breaks; empty for a systematic one.
        by_hand: whether a person wrote it.
        gpu_only: the interpreter cannot show it (rounding to 16 bits, tensor cores, ...).
    """

    name: str
    place: Place
    line: int
    start: int
    end: int
    before: str
    after: str
    change: tuple[str, int, int, str]
    category: str = ""
    why: str = ""
    by_hand: bool = False
    gpu_only: bool = False

    def apply(self, text: str) -> str:
        """The mutated source."""
        assert text[self.start : self.end] == self.before
        return text[: self.start] + self.after + text[self.end :]

    def edit(self, text: str) -> tuple[str, str]:
        """The lines that differ, before and after, without indentation: what shows the mutant to a reader."""
        before, after = text.splitlines(), self.apply(text).splitlines()
        while before and after and before[-1] == after[-1]:
            del before[-1], after[-1]
        while before and after and before[0] == after[0]:
            del before[0], after[0]
        return "\n".join(before).strip(), "\n".join(after).strip()


def mutate(source: Source, node: Node, after: str, name: str) -> Mutant | None:
    """The mutant that puts the code `after` in a node's place; None if it is the same code.

    Raises:
        SyntaxError: `after` is no expression, or no statements where the node is one.
    """
    new = ast.parse(after).body if isinstance(node, ast.stmt) else [ast.parse(after, mode="eval").body]
    smallest, changed = _smallest_change(node, new)
    if _dump([smallest]) == _dump(changed):
        return None
    start, end = source.span(node)
    if isinstance(node, ast.stmt):
        after = after.replace("\n", "\n" + " " * node.col_offset)
    elif not isinstance(new[0], _NEED_NO_PARENTHESES):
        after = f"({after})"
    place = Place(source.file, source.function_at(start))
    change = (source.file, *source.span(smallest), _dump(changed))
    return Mutant(name, place, node.lineno, start, end, source.text[start:end], after, change)


def _smallest_change(old: Node, new: Sequence[Node]) -> tuple[Node, Sequence[Node]]:
    """The innermost expression or statement that differs, and what takes its place."""
    result: tuple[Node, Sequence[Node]] = (old, new)
    pair: tuple[ast.AST, ast.AST] | None = (old, new[0]) if len(new) == 1 else None
    while pair is not None and (pair := _only_difference(*pair)) is not None:
        if isinstance(pair[0], Node) and isinstance(pair[1], Node):
            result = pair[0], [pair[1]]
    return result


def _only_difference(old: ast.AST, new: ast.AST) -> tuple[ast.AST, ast.AST] | None:
    """The one child in which two nodes of a kind differ; None if there are more, or no such child."""
    if type(old) is not type(new):
        return None
    differing = []
    for part in old._fields:
        before, after = _values(old, part), _values(new, part)
        if len(before) != len(after):
            return None
        differing += [each for each in zip(before, after, strict=True) if _dump([each[0]]) != _dump([each[1]])]
    match differing:
        case [(ast.AST() as inner, ast.AST() as changed)]:
            return inner, changed
    return None


def _values(node: ast.AST, part: str) -> list[object]:
    value = getattr(node, part, None)
    return value if isinstance(value, list) else [value]


def _dump(nodes: Sequence[object]) -> str:
    return "\n".join(ast.dump(node) if isinstance(node, ast.AST) else repr(node) for node in nodes)
