"""What else a caller's graph may have in it, which changes no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

_Leaves = dict[str, Tensor]


@contextmanager
def _in_anomaly_mode(y: Tensor, leaves: _Leaves) -> Iterator[Tensor]:
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        yield y


@contextmanager
def _added_to(y: Tensor, leaves: _Leaves) -> Iterator[Tensor]:
    yield y.add_(1.0)


@contextmanager
def _hooked(y: Tensor, leaves: _Leaves) -> Iterator[Tensor]:
    """A hook takes back what −Y does to the gradient."""
    y.register_hook(torch.neg)  # type: ignore[no-untyped-call]
    yield -y


@contextmanager
def _stepping(y: Tensor, leaves: _Leaves) -> Iterator[Tensor]:
    stepped: list[Tensor] = []

    def step(leaf: Tensor, gradient: Tensor) -> None:
        leaf.data.neg_()
        stepped.append(leaf)

    hooks = [leaf.register_hook(partial(step, leaf)) for leaf in leaves.values()]  # type: ignore[no-untyped-call]
    yield y
    for hook in hooks:
        hook.remove()
    for leaf in stepped:
        leaf.data.neg_()


GRAPHS: dict[str, Callable[[Tensor, _Leaves], AbstractContextManager[Tensor]]] = {
    "anomalies are looked for": _in_anomaly_mode,
    "1 is added to Y in place": _added_to,
    "a hook of Y changes its gradient": _hooked,
    "each operand changes when its gradient is there": _stepping,
}
"""By what it is: from Y and the leaves a context in which gradients are asked of what it gives."""

MAY_BE_REFUSED = ("1 is added to Y in place",)
"""By torch, where the backward pass reads Y, or Y is a view that a custom function made."""


def _made_in_inference(dOut: Tensor) -> Tensor:
    with torch.inference_mode():
        return dOut.clone()


INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "dOut requires a gradient": lambda dOut: dOut.detach().clone().requires_grad_(),
    "dOut was made under inference_mode": _made_in_inference,
}
"""How gradients come about that a caller hands over, which asks for no second derivative."""


class Ignored(torch.autograd.Function):
    """A copy of Y, for which there is no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """The copy."""
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        """None."""
