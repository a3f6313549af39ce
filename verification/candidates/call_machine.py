"""The machine that sequences of calls drive: each step is a call, a backward pass, a change, or a look at results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from mxref.verification.candidates import operand_sets
from mxref.verification.candidates.answer import Answer, Outputs
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.operand_sets import CHANGED, CHANGES, SETS
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.call import Mode
from mxref.verification.cases.case import Sample


class Way(NamedTuple):
    """How all calls of a sequence are made, by the names in `Call`, and the operands that change in between."""

    how: dict[str, Any]
    changes: tuple[str, ...]


WAYS = (
    Way({}, CHANGED),
    Way({"owner": "parameter", "autocast": "both passes"}, ("lora_A", "lora_B", "expert_biases")),
    Way({"owner": "computed"}, ("inputs", "gates", "lora_A")),
)
"""On leaves, on a module's parameters in one region of autocast, or on what other operations have computed."""


class DifferentError(AssertionError):
    """A result is not what it should be."""

    def __init__(self, answers: tuple[Answer, Answer]) -> None:
        super().__init__(answers[1].circumstance)
        self.answers = answers


@dataclass
class _Pending:
    """A forward pass whose backward pass may still come.

    Attributes:
        name: of the output in the script.
        which: operands it was called with.
        y, leaves: its graph.
        expected: the golden model's results for the operands as they were.
        kept: a copy of y as it came.
        changed: whether an operand was changed in place since.
    """

    name: str
    which: str
    y: Tensor
    leaves: dict[str, Tensor]
    expected: Outputs
    kept: Tensor
    changed: bool = False


class CallMachine(RuleBasedStateMachine):
    """Calls on sets of operands (see `operand_sets`), each the same tensors in every call.

    `how`: in which way all calls are made, by the names in `Call`, if the candidate covers it.
    """

    def __init__(self, candidate: Candidate, sample: Sample, seen: list[tuple[Answer, Answer]], **how: Any) -> None:
        super().__init__()
        self.candidate, self.sample, self.seen, self.script = candidate, sample, seen, list[str]()
        self.pending: list[_Pending] = []
        self.kept: list[tuple[Outputs, Outputs]] = []  # what was returned as it is, and a copy of it as it came
        self.held: list[Tensor] = []  # memory that others have taken meanwhile
        self.expected: dict[str, Outputs] = {}  # as long as the operands are what they are
        self.owned(how)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """The sets that are covered."""
        holds = self.candidate.covers.holds
        sets = operand_sets.operand_sets(self.sample).items()
        return {name: each for name, each in sets if name == "a" or holds(each.case)}

    @initialize(how=st.sampled_from([way.how for way in WAYS]))
    def owned(self, how: dict[str, Any]) -> None:
        """Calls are made in a way, if that is covered."""
        for name, value in how.items():
            asked = self.sample.called(**{name: value})
            if self.candidate.covers.holds(asked.case):
                self.sample = asked
                self.script.append(f"in all calls {name}: {value}")

    @rule(which=st.sampled_from(SETS))
    def forward(self, which: str) -> None:
        """Call, and hold the output against the golden model."""
        which = self._covered(which)
        name = f"y{sum(line.startswith('y') for line in self.script)}"
        self.script.append(f"{name} = layer({which})")
        sample = self.samples[which]
        y, leaves = self.candidate.trace(sample, copy=False)
        pending = _Pending(name, which, y, leaves, self._golden(which), y.detach().clone())
        self.pending.append(pending)
        self._hold({"Y": y.detach()}, pending.expected)

    @rule(which=st.sampled_from(SETS), mode=st.sampled_from(("inference", "no_grad")))
    def evaluate(self, which: str, mode: Mode = "inference", rows: int | None = None) -> None:
        """Call without a graph and keep the output, or so many rows of it."""
        which = self._covered(which)
        self.script.append(f"layer({which}){f'[:{rows}]' if rows else ''} under {mode}")
        self._keep(self.candidate.trace(self.samples[which].called(mode=mode), copy=False)[0], which, rows)

    def _keep(self, y: Tensor, which: str, rows: int | None = None) -> None:
        self._hold({"Y": y}, self._golden(which))
        self.kept.append(({"Y": y[:rows]}, {"Y": y[:rows].clone()}))

    @precondition(lambda self: bool(self.pending))
    @rule(index=st.integers(0, 3), retain=st.booleans())
    def backward(self, index: int, retain: bool) -> None:
        """Gradients of an earlier call, one of several; after a change in place they may be refused."""
        pending = self.pending[index % len(self.pending)]
        retain = retain and not self.candidate.covers.one_backward
        self.script.append(f"gradients({pending.name}{', retain_graph=True' if retain else ''})")
        try:
            gradients = self.candidate.gradients(
                self.samples[pending.which], pending.y, pending.leaves, retain, copy=False
            )
        except RuntimeError:
            if not pending.changed:
                raise
            gradients, retain = {}, False
        if not retain:
            self.pending.remove(pending)
        self._hold(gradients, pending.expected)
        self.kept.append((gradients, _copied(gradients)))

    @precondition(lambda self: bool(self.pending))
    @rule(which=st.sampled_from("ab"), operand=st.sampled_from(CHANGED))
    def update(self, which: str, operand: str, how: str = CHANGES[0]) -> None:
        """Give operands other values: signs, powers of two or order, which leave every sum exact.

        Args:
            which: operands of "a" or "b".
            operand: one of CHANGED; nothing happens where the sample has none.
            how: one of CHANGES; but for the first, which autograd counts, no pass may be pending.
        """
        which = self._covered(which)
        problem = self.samples[which].problem
        times = sum(line.startswith(f"change {which}.{operand} ") for line in self.script)
        values = operand_sets.changed(problem, operand, times)
        for old, new in values:
            with torch.inference_mode(old.is_inference()):
                if how == ".data is another tensor":
                    old.data = operand_sets.strided(new, "transposed")
                else:
                    (old.detach() if how == "in place" else old.data).copy_(new)
        self.script.append(f"change {which}.{operand} {how}")
        self.expected.clear()
        for pending in self.pending:
            pending.changed |= (pending.which == "b") == (which == "b")

    @precondition(lambda self: bool(self.kept))
    @rule()
    def overwrite(self) -> None:
        """What was returned, but for outputs whose backward pass may still come, is the caller's to write to."""
        self.script.append("overwrite every gradient, and outputs without a graph")
        for found, _ in self.kept:
            for x in found.values():
                if x is not None and 0 not in x.stride():  # one that autograd expanded cannot be written to
                    with torch.inference_mode():
                        x.fill_(float("nan"))
        self.kept.clear()

    @precondition(lambda self: bool(self.pending or self.kept))
    @rule()
    def look_again(self) -> None:
        """Outputs and gradients that were returned earlier are what they were."""
        self.script.append("look at every output again")
        for pending in self.pending:
            self._hold({"Y": pending.y.detach()}, {"Y": pending.kept})
        for found, copy in self.kept:
            self._hold(found, copy)

    def told(self) -> str:
        """The sequence so far, in words."""
        return f"after «{'; '.join(_counted(self.script))}»"

    def _covered(self, which: str) -> str:
        """The set, or a where that is not covered."""
        return which if which in self.samples else "a"

    def _run(self, sample: Sample) -> Outputs:
        y, leaves = self.candidate.trace(sample, copy=False)
        return {"Y": y.detach(), **self.candidate.gradients(sample, y, leaves, copy=False)}

    def _golden(self, which: str) -> Outputs:
        """The golden model's results for operands as they are."""
        if which not in self.expected:
            self.expected[which] = golden().run(self.samples[which])
        return self.expected[which]

    def _hold(self, got: Outputs, expected: Outputs) -> None:
        """Keep the answers; raise if a value is wrong."""
        got = _copied(got)
        right = {name: _like(expected.get(name), x) for name, x in got.items()}
        self.seen[:] = [(Answer(right), Answer(got, circumstance=self.told(), like=0))]
        if not all(_equal(x, right[name]) for name, x in got.items()):
            raise DifferentError(self.seen[0])


def _counted(script: Iterable[str]) -> Iterator[str]:
    """Each line once, with how many times in a row; outputs are numbered on."""
    for _, alike in groupby(script, _unnumbered):
        line, *others = alike
        yield f"{line}, {len(others) + 1} times" if others else line


@cache
def _unnumbered(line: str) -> str:
    return re.sub(r"^y\d+ = ", "y = ", line)


def _copied(outputs: Outputs) -> Outputs:
    return {name: None if x is None else x.clone() for name, x in outputs.items()}


def _like(x: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A value in another one's dtype, and +0 for −0, which a sum may lose."""
    return x if x is None or other is None else x.to(other.dtype) + 0.0


def _equal(x: Tensor | None, right: Tensor | None) -> bool:
    if x is None or right is None:
        return x is right
    return x.shape == right.shape and torch.equal(x, right)
