"""Where a person's description of an edit belongs: by function and syntax tree, whatever the layout and comments."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mxref.verification.studies.mutation.mutant import Mutant, Node, mutate
from mxref.verification.studies.mutation.sources import Place, Source

_REST = "..."
"""In the code of an edit: whatever is there."""


class StaleMutantError(ValueError):
    """A mutant no longer fits the sources; the message names it and says what to do."""


@dataclass(frozen=True)
class Edit:
    """An expression or a statement of a function, and the code in its place.

    `...` stands for any expression, and as a call's last argument for all that follow; in `after` for the same again.

    Attributes:
        before: code that occurs once in the function. A string is a part of one, such as an assembler's instruction.
        after: the code to put there, for a statement any number of them.
        within: where `before` occurs more than once, code around the one that is meant.
    """

    before: str
    after: str
    within: str = ""


def locate(place: Place, edit: Edit, sources: Mapping[str, Source], name: str) -> Mutant:
    """The mutant that an edit makes of the sources.

    Code that has left its function is found where it went, as long as it occurs once in all sources.

    Raises:
        StaleMutantError: no single place fits, or the edit is no code or changes none.
    """
    stale = f"mutant {name!r} is stale"
    try:
        source = sources.get(place.file)
        function = source.function(place.function) if source is not None else None
        here = [] if source is None or function is None else list(_matches(edit, source, function))
        found = here or [match for other in sources.values() for match in _matches(edit, other, other.tree)]
        if len(found) != 1:
            told = f"its code occurs {len(here)} times in {place}" if function is not None else f"there is no {place}"
            others = dict.fromkeys(str(match.place) for match in found if not here)
            told += f", it occurs in {'; '.join(others)}" if others else ""
            raise StaleMutantError(f"{stale}: {told}; expected one place; adapt it to the sources: {edit.before!r}")
        mutant = mutate(found[0].source, found[0].node, found[0].replacement(edit), name)
    except SyntaxError as error:
        raise StaleMutantError(f"{stale}: its edit does not parse: {error}: {edit.before!r}, {edit.after!r}") from None
    if mutant is None:
        raise StaleMutantError(f"{stale}: its edit changes no code: {edit.before!r}, {edit.after!r}")
    return mutant


@dataclass
class _Match:
    """A node that an edit can mean, and the texts that `...` stood for."""

    source: Source
    node: Node
    holes: list[str] = field(default_factory=list)

    @property
    def place(self) -> Place:
        return Place(self.source.file, self.source.function_at(self.source.span(self.node)[0]))

    def replacement(self, edit: Edit) -> str:
        """What to put in the node's place."""
        part, new = _string(_parse(edit.before)), _string(_parse(edit.after))
        if part is not None and new is not None:
            return self.source.of(self.node).replace(part, new)
        after = edit.after
        for hole in self.holes[: after.count(_REST)]:
            after = after.replace(_REST, hole, 1)
        return after

    def fits(self, pattern: object, value: object) -> bool:
        """Whether a piece of a syntax tree is what a pattern describes."""
        if _is_rest(pattern):
            if isinstance(value, ast.expr):
                self.holes.append(f"({self.source.of(value)})")
            return isinstance(value, ast.expr)
        if type(pattern) is not type(value):
            return False
        if isinstance(pattern, list) and isinstance(value, list):
            return len(pattern) == len(value) and all(map(self.fits, pattern, value))
        if isinstance(pattern, ast.Call) and isinstance(value, ast.Call) and _is_open(pattern):
            return self._fits_call(pattern, value)
        if isinstance(pattern, ast.AST):
            return all(self.fits(getattr(pattern, part), getattr(value, part)) for part in pattern._fields)
        return pattern == value

    def _fits_call(self, pattern: ast.Call, call: ast.Call) -> bool:
        """Whether a call is what a pattern describes whose last argument stands for all the others."""
        given = len(pattern.args) - 1
        rest: list[ast.expr | ast.keyword] = [*call.args[given:], *call.keywords]
        fits = self.fits(pattern.func, call.func) and self.fits(pattern.args[:given], call.args[:given])
        if fits:
            ends = [self.source.span(node) for node in rest]
            self.holes.append(self.source.text[min(ends)[0] : max(ends)[1]] if ends else "")
        return fits


def _matches(edit: Edit, source: Source, root: ast.AST) -> Iterator[_Match]:
    """The nodes below `root` that an edit can mean."""
    before = _parse(edit.before)
    if isinstance(before, ast.expr) and not isinstance(_parse(edit.after), ast.expr):
        before = ast.Expr(before)
    around, seen = [root], set[ast.AST]()
    if edit.within:
        within = _parse(edit.within)
        around = [node for node in ast.walk(root) if isinstance(node, Node) and _Match(source, node).fits(within, node)]
    for node in (node for each in around for node in ast.walk(each)):
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            match, text = _Match(source, node), _string(before)
            if text in (_string(node) or "") if text is not None else match.fits(before, node):
                yield match


def _is_rest(pattern: object) -> bool:
    return isinstance(pattern, ast.Constant) and pattern.value is ...


def _is_open(call: ast.Call) -> bool:
    """Whether a call's last argument stands for all that follow."""
    return bool(call.args) and not call.keywords and _is_rest(call.args[-1])


def _string(node: object) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _parse(code: str) -> ast.AST:
    """An expression, a statement, or a module of several."""
    body = ast.parse(code).body
    if len(body) != 1:
        return ast.Module(body, [])
    return body[0].value if isinstance(body[0], ast.Expr) else body[0]
