"""Triton's interpreter, faster in a process that compiles nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def interpret_only(report_overflow: bool = False) -> None:
    """Prepare this process for nothing but Triton's interpreter, in two fifths of the time.

    The interpreter replaces all of Triton's language at every launch and every call of a jit function, to put it back
    after a launch, and builds its table of dtypes at every operation: once is enough where nothing compiles. It makes
    the same few types and shapes again for every value, which are remembered. It also
    computes every 32-bit operation a second time in 64 bits, to report an overflow; a GPU wraps around, and so does it
    unless `report_overflow`.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=report_overflow)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    numpy_dtype, known = interpreter._get_np_dtype, dict[str, Any]()

    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered
    _remember_types()


def _remember_types() -> None:
    """A block's type, and what a value has but for its handle, is made once for each dtype and shape."""
    make_type, make_value = tl.block_type.__init__, tl.tensor.__init__
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
