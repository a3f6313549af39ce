"""Two threads that take turns: at operators too, around locks, and when one raises."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
import torch
from tapped import tap
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mxref.verification.candidates import turns
from mxref.verification.candidates.turns import in_turns

X = torch.eye(3)


@pytest.mark.parametrize(
    "operation", [lambda x: x @ x, lambda x: x + x, lambda x: x[0], lambda x: x.sum(), torch.exp, torch.zeros_like]
)
def test_the_other_thread_comes_between_at_every_operation(operation: Callable[[Tensor], Tensor]) -> None:
    shared = dict[str, int]()

    def write_and_read(number: int) -> int:
        shared["number"] = number
        operation(X)
        return shared["number"]

    assert in_turns(lambda: write_and_read(0), lambda: write_and_read(1)) == (1, 1)
    assert _get_current_dispatch_mode() is None


def test_the_other_thread_comes_between_in_a_backward_pass() -> None:
    shared = dict[str, int]()

    def gradient(number: int) -> float:
        def change(grad: Tensor) -> Tensor:
            shared["number"] = number
            grad = grad + grad
            return grad * shared["number"]

        x = torch.ones((), requires_grad=True)
        return float(*torch.autograd.grad(tap(x, change), x))

    assert in_turns(lambda: gradient(1), lambda: gradient(2)) == (4, 4)


def test_backward_passes_in_one_thread_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where autograd runs the nodes of two passes in one thread, in turns: neither can go before."""
    looks, place = list[int](), turns._Turns._place
    monkeypatch.setattr(turns, "_PATIENCE", 0.1)
    monkeypatch.setattr(turns._Turns, "_place", lambda self, number: looks.append(number) or place(self, number))
    nodes = 50
    with ThreadPoolExecutor(1) as device:

        def passes() -> int:
            mode, x = _get_current_dispatch_mode(), torch.zeros(())

            def node() -> None:
                with mode:
                    x.add_(1)

            for _ in range(nodes):
                device.submit(node).result()
            return int(x)

        assert in_turns(passes, passes) == (nodes, nodes)
    assert len(looks) < nodes


def test_what_torch_compiles_is_called_too() -> None:
    compiled = torch.compile(lambda x: (x @ x).sum(), backend="aot_eager")
    assert in_turns(lambda: float(compiled(X)), lambda: float(compiled(2 * X))) == (3, 12)


def test_a_lock_that_is_held_meanwhile_stops_nobody() -> None:
    lock, shared = Lock(), dict[str, int]()

    def write_and_read(number: int) -> int:
        with lock:
            shared["number"] = number
            torch.exp(X)
            return shared["number"]

    assert in_turns(lambda: write_and_read(0), lambda: write_and_read(1)) == (0, 1)


def test_three_take_turns() -> None:
    shared = list[int]()

    def write(number: int) -> None:
        for _ in range(2):
            shared.append(number)
            torch.exp(X)

    in_turns(*(lambda number=number: write(number) for number in range(3)))  # type: ignore[misc]
    assert shared == [0, 1, 2, 0, 1, 2]


def test_each_returns_its_own() -> None:
    assert in_turns(lambda: int(X.sum()), lambda: int((2 * X).sum())) == (3, 6)


@pytest.mark.parametrize("raising", [0, 1])
def test_what_one_raises_is_raised(raising: int) -> None:
    def run(number: int) -> None:
        torch.exp(X)
        if number == raising:
            raise ValueError("it went wrong")

    with pytest.raises(ValueError, match="it went wrong"):
        in_turns(lambda: run(0), lambda: run(1))
