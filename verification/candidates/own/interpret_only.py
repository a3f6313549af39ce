"""Triton's interpreter, faster in a process that compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Number
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_MOST = 2000
"""Pairs of operands that are remembered; constants among them hold a block's memory each."""


def interpret_only(report_overflow: bool = False) -> None:
    """Prepare this process for nothing but Triton's interpreter, in a third of the time.

    The interpreter replaces all of Triton's language at every launch and every call of a jit function, to put it back
    after a launch, and builds its table of dtypes at every operation: once is enough where nothing compiles. It makes
    the same few types and shapes again for every value, and finds out again what becomes of two operands, which are
    remembered. It also computes every 32-bit operation a second time in 64 bits, to report an overflow; a GPU wraps
    around, and so does it unless `report_overflow`.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=report_overflow)
    interpreter._patch_attr = _call_directly
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    numpy_dtype, known = interpreter._get_np_dtype, dict[str, Any]()

    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered
    _remember_types()
    _remember_operands()


def _call_directly(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace one function of the language by one that has the interpreter's semantics, and nothing to check."""
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, called)


def _remember_types() -> None:
    """A block's type, and what a value has but for its handle, is made once for each dtype and shape."""
    make_type, make_value, equal = tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__
    types, values = dict[Any, dict[str, Any]](), dict[str, dict[str, Any]]()

    def type_of(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def value_of(self: Any, handle: Any, type: Any) -> None:
        if type.name not in values:
            make_value(self, handle, type)
            values[type.name] = {name: x for name, x in vars(self).items() if name != "handle"}
        vars(self).update(values[type.name], handle=handle)

    tl.block_type.__init__, tl.tensor.__init__ = type_of, value_of
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _remember_operands() -> None:
    """What becomes of two operands before an elementwise operation is found out once for their types and numbers."""
    check = TritonSemantic.binary_op_type_checking_impl
    known = dict[Any, tuple[Callable[[Any], Any], Callable[[Any], Any]]]()

    def operands_of(self: Any, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> tuple[Any, Any]:
        key = _key(lhs), _key(rhs), flags, *named.items()
        if key in known:
            left, right = known[key]
            return left(lhs), right(rhs)
        operands: tuple[Any, Any] = check(self, lhs, rhs, *flags, **named)
        if len(known) >= _MOST:
            known.clear()
        known[key] = _change(self, lhs, operands[0]), _change(self, rhs, operands[1])
        return operands

    TritonSemantic.binary_op_type_checking_impl = operands_of


def _key(operand: Any) -> Any:
    """What decides over an operand's change: its type, or the number (0.0 and -0.0 are two)."""
    return operand.type.name if isinstance(operand, tl.tensor) else (type(operand), repr(operand))


def _change(semantic: TritonSemantic, before: Any, after: Any) -> Callable[[Any], Any]:
    """What makes of an operand like `before` one like `after`."""
    if isinstance(before, Number):
        after.handle.data.flags.writeable = False
        return lambda number: after
    if after is before:
        return lambda operand: operand
    to, cast = after.type, before.type.scalar != after.type.scalar

    def changed(operand: Any) -> Any:
        if cast:
            operand = semantic.cast(operand, to.scalar)
        if operand.type.name == to.name:
            return operand
        if operand.type.is_block():
            return tl.tensor(semantic.builder.create_broadcast(operand.handle, to.shape), to)
        return tl.tensor(semantic.builder.create_splat(to, operand.handle), to)

    return changed
