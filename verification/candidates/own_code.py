"""The code that judges: what a candidate, which shares its process, must leave in place.

The golden model, the checks, their constants, and the parts of torch and Python that they call. A candidate that
replaces one of them would be its own judge; a library that does so in passing makes every verdict in its process
worthless.
"""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["OwnCode"]

_OWN = "mxref"
_JUDGED = "mxref.kernels"
_NOTHING = object()
"""Where a class inherits what it is asked for."""


@dataclass(frozen=True)
class OwnCode:
    """One look at it.

    Attributes:
        places: for every name in a module, in a class and in an object that a module holds: what holds it, the name,
            what stands there, and its code, if it has any.
    """

    places: tuple[tuple[Any, str, Any, CodeType | None], ...]

    @classmethod
    def now(cls) -> OwnCode:
        """What is imported at this moment."""
        own = [module for name, module in list(sys.modules.items()) if _is_own(name)]
        places = [place for module in own for place in _places(module, vars(module))]
        classes = {value for _, _, value, _ in places if isinstance(value, type) and _is_own(value.__module__)}
        places += [place for each in classes for place in _places(each, vars(each))]
        objects = {id(each): each for _, _, value, _ in places for each in _objects(value)}
        places += [place for each in objects.values() for place in _places(each, vars(each))]
        called = {name for *_, code in places if code is not None for name in _names(code)}
        # Of the module only what is there: to be asked for more makes it import its compiler.
        for holder, names in ((torch, vars(torch)), (torch.Tensor, dir(torch.Tensor))):
            there = vars(holder)
            places += [(holder, name, there.get(name, _NOTHING), None) for name in called.intersection(names)]
        for python in (np, math, builtins):
            places += [(python, name, vars(python)[name], None) for name in called if name in vars(python)]
        return cls(tuple(places))

    def restore(self) -> list[str]:
        """Put back what has been replaced since, and name it."""
        replaced = []
        for holder, name, value, code in self.places:
            now = vars(holder).get(name, _NOTHING)
            if now is not value:
                if holder in (torch, torch.Tensor) and str(getattr(now, "__module__", "")).startswith("torch."):
                    continue  # torch wraps some of its own functions when it imports more of itself
                change = type if isinstance(holder, type) else object  # past what an enum or a frozen object refuses
                change.__delattr__(holder, name) if value is _NOTHING else change.__setattr__(holder, name, value)
            elif code is None or _code(value) is code:
                continue
            else:
                value.__code__ = code
            replaced.append(f"{_name(holder)}.{name} was replaced")
        return replaced


@cache
def _is_own(module: str) -> bool:
    return module.split(".")[0] == _OWN and not f"{module}.".startswith(f"{_JUDGED}.")


def _places(holder: Any, names: Mapping[str, Any]) -> Iterator[tuple[Any, str, Any, CodeType | None]]:
    for name, value in list(names.items()):
        yield holder, name, value, _code(value)


def _objects(value: Any) -> Iterator[Any]:
    """Objects of its own classes: the value, or what it contains."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,):
        if not isinstance(each, type) and _is_own(type(each).__module__) and hasattr(each, "__dict__"):
            yield each


def _code(value: Any) -> CodeType | None:
    return value.__code__ if isinstance(value, FunctionType) else None


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function, or one within it, looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _name(holder: Any) -> str:
    if isinstance(holder, ModuleType):
        return holder.__name__
    kind = holder if isinstance(holder, type) else type(holder)
    return f"{kind.__module__}.{kind.__qualname__}"
