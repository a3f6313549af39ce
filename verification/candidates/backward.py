"""Ways to ask autograd for the gradients of a graph, as callers have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mxref.verification.arithmetic.tensor_bytes import hold_the_same
from mxref.verification.cases.call import Backward


def _at_once(
    y: Tensor, leaves: dict[str, Tensor], dOut: Tensor, retain_graph: bool, create_graph: bool = False
) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(y, list(leaves.values()), dOut, retain_graph, create_graph, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _one_by_one(y: Tensor, leaves: dict[str, Tensor], dOut: Tensor, retain_graph: bool) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for number, (tensor, leaf) in enumerate(leaves.items(), 1):
        found |= _at_once(y, {tensor: leaf}, dOut, retain_graph or number < len(leaves))
    return found


def _accumulated(y: Tensor, leaves: dict[str, Tensor], dOut: Tensor, retain_graph: bool) -> dict[str, Tensor | None]:
    """What the first of two passes left in each `.grad`, if the second has doubled it; what it added otherwise."""
    for leaf in leaves.values():
        leaf.grad = None
        if not leaf.is_leaf:
            leaf.retain_grad()
    y.backward(dOut, retain_graph=True)  # type: ignore[no-untyped-call]
    first = {tensor: None if leaf.grad is None else leaf.grad.clone() for tensor, leaf in leaves.items()}
    y.backward(dOut, retain_graph=retain_graph)  # type: ignore[no-untyped-call]
    found: dict[str, Tensor | None] = {}
    for tensor, leaf in leaves.items():
        once, both, leaf.grad = first[tensor], leaf.grad, None
        if once is None or both is None or hold_the_same(once + once, both):
            found[tensor] = once
        else:
            found[tensor] = both - once
    return found


BACKWARDS: dict[Backward, Callable[[Tensor, dict[str, Tensor], Tensor, bool], dict[str, Tensor | None]]] = {
    "at once": _at_once,
    "one by one": _one_by_one,
    "create_graph": partial(_at_once, create_graph=True),
    "accumulated": _accumulated,
}
"""From Y, its leaves, dOut and whether the graph is kept: the gradient of each leaf, None where there is none."""
