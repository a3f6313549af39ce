"""FSDP2 before torch 2.13 cannot shard parameters of bytes; mended here for packed experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["bytes_shardable"]

_FIXED = Version("2.13")
"""The oldest torch that was seen to shard parameters of bytes by itself."""


@contextmanager
def bytes_shardable() -> Iterator[None]:
    """Within it, `fully_shard` takes parameters of bytes with any torch.

        with bytes_shardable():
            model = accelerator.prepare(model)

    No effect from torch 2.13 on. Not thread-safe.
    """
    if Version(torch.__version__) >= _FIXED:
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group  # private, of known versions

    group: Any = _fsdp_param_group
    before, group.FSDPParam = group.FSDPParam, _mended()
    try:
        yield
    finally:
        group.FSDPParam = before


@cache
def _mended() -> Any:
    """FSDP2's class of a sharded parameter, for bytes too.

    FSDP2's own makes each part a parameter that asks for a gradient, which bytes refuse, before it sets `requires_grad`
    (PyTorch issue 177844), and casts gathered bytes by the mixed-precision policy.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    module: Any = _fsdp_param

    @contextmanager
    def asking_as_they_may() -> Iterator[None]:
        module.nn = SimpleNamespace(Module=nn.Module, Parameter=_parameter)
        try:
            yield
        finally:
            module.nn = nn

    class Mended(module.FSDPParam):  # type: ignore[misc]
        def _init_sharded_param(self, *arguments: Any, **options: Any) -> None:
            with asking_as_they_may():
                super()._init_sharded_param(*arguments, **options)

        def to_sharded_post_forward(self) -> None:
            with asking_as_they_may():
                super().to_sharded_post_forward()

        def init_dtype_attrs(self, mp_policy: MixedPrecisionPolicy) -> None:
            numbers = self.sharded_param.is_floating_point()
            super().init_dtype_attrs(mp_policy if numbers else MixedPrecisionPolicy())

    return Mended


def _parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    """A parameter that asks for a gradient only if it can have one."""
    return nn.Parameter(data, requires_grad and data.is_floating_point())
