"""The systematic mutants: small operators over every jit function and every launcher, from the syntax tree.

Whatever functions there are get swept, so a rewritten kernel has its mutants at once. A name is file, function,
operator and ordinal. Compile options (`num_warps`, `num_stages`) and the numbers of layouts are left alone: they choose
a speed, or which thread holds what, not a result.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from mxref.verification.studies.mutation.mutant import Mutant, mutate
from mxref.verification.studies.mutation.sources import (
    Function,
    Source,
    is_for_gpu_loads,
    is_for_gpu_tilings,
    is_gpu_branch,
)

Edit = tuple[ast.expr | ast.stmt, str]
"""A node and the text that replaces it."""

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is",
}  # fmt: skip
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.FloorDiv: "%", ast.Mod: "//", ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>",
    ast.RShift: "<<", ast.Div: "*",
}  # fmt: skip
_DROPPED = (ast.Add, ast.Sub, ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)
_EXTREMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "sum": "max"}
_DTYPES = {"int64": "int32", "float32": "float16", "uint32": "int32", "uint16": "uint8", "int32": "int16"}
_SPEED_ONLY = ("num_warps", "num_stages", "max_registers")


def sweep(source: Source) -> list[Mutant]:
    """Every systematic mutant of one file, in the order of the text; the same change counts once."""
    mutants: dict[tuple[str, int, int, str], Mutant] = {}
    for function in source.functions:
        if not (function.jit or function.launches):
            continue
        ordinals: Counter[str] = Counter()
        gpu_only = function.name in source.gpu_only
        for node, on_gpu in _nodes(function):
            for operator, edits in OPERATORS.items():
                for place, after in edits(node, source, function):
                    ordinals[operator] += 1
                    name = f"{source.file.removesuffix('.py')}:{function.name}:{operator}:{ordinals[operator]}"
                    unseen = gpu_only or on_gpu or (is_gpu_branch(node) and after == "False")
                    mutant = mutate(source, place, after, name)
                    if mutant is not None:
                        mutants.setdefault(mutant.change, replace(mutant, category=operator, gpu_only=unseen))
    return list(mutants.values())


def _nodes(function: Function) -> Iterator[tuple[ast.AST, bool]]:
    """The body's nodes, outer before inner, in the order of the text; no docstring, annotation or compile option.

    Beside each: whether it lies where the interpreter does not come, or in what only a GPU's tilings or loads notice.
    """
    pending: list[tuple[ast.AST, bool]] = [(node, False) for node in reversed(function.node.body)]
    while pending:
        node, on_gpu = pending.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Raise | ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in _SPEED_ONLY):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_left_alone(node.func.attr):
            continue
        on_gpu = on_gpu or is_for_gpu_tilings(node) or (not function.jit and is_for_gpu_loads(node))
        yield node, on_gpu
        if isinstance(node, ast.keyword) and node.arg == "other":
            continue
        body = node.body if is_gpu_branch(node) else []
        children = [child for child in ast.iter_child_nodes(node) if not _is_annotation(node, child)]
        pending.extend((child, on_gpu or child in body) for child in reversed(children))


def _is_left_alone(function: str) -> bool:
    return function == "program_id" or function.endswith("Layout")


def _is_annotation(node: ast.AST, child: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and child is node.annotation


def _constants(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """±1 on a number."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield node, f"{source.of(node)} + 1"
        yield node, f"{source.of(node)} - 1"


def _comparisons(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """< for <=, == for !=, and so on."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = source.of(node.left), source.of(node.comparators[0])
        yield node, f"({left}) {_COMPARE[type(node.ops[0])]} ({right})"


def _binary(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """Another arithmetic or bit operator."""
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield node, f"({source.of(node.left)}) {_BINARY[type(node.op)]} ({source.of(node.right)})"


def _dropped(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """One side of an operation left out: a term, a factor, a condition of a mask."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, _DROPPED):
        yield node, source.of(node.left)
        yield node, source.of(node.right)
    if isinstance(node, ast.AugAssign):
        yield node, f"{source.of(node.target)} = {source.of(node.value)}"


def _masks(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """A load or store without its mask."""
    if not (isinstance(node, ast.Call) and source.of(node.func) in ("tl.load", "tl.store")):
        return
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if "mask" in keywords:
        kept = [source.of(argument) for argument in node.args]
        kept += [f"{k.arg}={source.of(k.value)}" for k in node.keywords if k.arg not in ("mask", "other")]
        yield node, f"{source.of(node.func)}({', '.join(kept)})"


def _padding(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """What a load returns where its mask is false: NaN, as memory may hold, for zero; 0 for anything else.

    Another number would do no harm in an operand of a product, whose other operand is 0 there; NaN does.
    """
    if isinstance(node, ast.keyword) and node.arg == "other":
        yield node.value, 'float("nan")' if source.of(node.value) in ("0", "0.0") else "0"


def _strides(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """A stride in place of its neighbour."""
    if isinstance(node, ast.Name) and node.id.startswith("stride_") and isinstance(node.ctx, ast.Load):
        family = [a.arg for a in function.node.args.args if a.arg.startswith(node.id[:-1])]
        if node.id in family and len(family) > 1:
            yield node, family[(family.index(node.id) + 1) % len(family)]


def _extremes(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """min for max and back, max for sum."""
    if not isinstance(node, ast.Call):
        return
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    if name in _EXTREMES:
        yield called, source.of(called)[: -len(name)] + _EXTREMES[name]


def _dtypes(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """A narrower dtype."""
    if isinstance(node, ast.Attribute) and node.attr in _DTYPES and source.of(node.value) in ("tl", "torch"):
        yield node, f"{source.of(node.value)}.{_DTYPES[node.attr]}"


def _conditions(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """`and` for `or` and back, or one side alone."""
    if isinstance(node, ast.BoolOp):
        parts = [f"({source.of(value)})" for value in node.values]
        yield node, (" or " if isinstance(node.op, ast.And) else " and ").join(parts)
        for part in parts:
            yield node, part


def _branches(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """A condition that always or never holds."""
    if isinstance(node, ast.If | ast.IfExp):
        yield node.test, "True"
        yield node.test, "False"


def _arguments(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """Two neighbouring arguments swapped; the accumulator of a dot left out."""
    if not isinstance(node, ast.Call) or any(isinstance(argument, ast.Starred) for argument in node.args):
        return
    texts = [source.of(argument) for argument in node.args]
    rest = [f"{'**' if k.arg is None else k.arg + '='}{source.of(k.value)}" for k in node.keywords]
    called = source.of(node.func)
    if called == "tl.dot" and len(texts) == 3:
        yield node, f"{called}({', '.join(texts[:2] + rest)})"
    if called != "tl.where" and (called.startswith("tl.") or isinstance(node.func, ast.Attribute)):
        return
    start = 1 if called == "tl.where" else 0
    for i in range(start, len(texts) - 1):
        swapped = [*texts[:i], texts[i + 1], texts[i], *texts[i + 2 :]]
        yield node, f"{called}({', '.join(swapped + rest)})"


def _statements(node: ast.AST, source: Source, function: Function) -> Iterator[Edit]:
    """A store or an early return left out."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and source.of(node.value.func) == "tl.store":
        yield node, "pass"
    if isinstance(node, ast.Return) and node.value is None:
        yield node, "pass"


OPERATORS: dict[str, Callable[[ast.AST, Source, Function], Iterator[Edit]]] = {
    "constant": _constants,
    "comparison": _comparisons,
    "operator": _binary,
    "dropped term": _dropped,
    "dropped mask": _masks,
    "padding": _padding,
    "stride": _strides,
    "min/max": _extremes,
    "dtype": _dtypes,
    "condition": _conditions,
    "branch": _branches,
    "argument": _arguments,
    "statement": _statements,
}
"""Name -> what it does to one node."""
