"""Sequences of calls: what a call returns may not depend on the calls before it, after it, or between its two passes.

hypothesis' state machines choose what is called when, and shrink a sequence that goes wrong to the shortest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from torch import Tensor

from mxref.verification.candidates.answer import Answer, Outputs
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.operand_sets import CHANGED, CHANGES, SETS, changed, operand_sets
from mxref.verification.candidates.shipped import golden
from mxref.verification.candidates.turns import in_turns
from mxref.verification.cases.call import Mode
from mxref.verification.cases.case import Sample

_EXAMPLES, _STEPS = 8, 8

_MANY, _FEWER = 520, 16
"""Calls after a first one that is still held: of so many buffers, or fewer, that take turns, one is taken again. The
layers of a large model, in several batches under way, need as many at once; interpreted kernels take too long."""
_CYCLES = 20_000_000
"""Of a GPU, some 10 ms: before that a call was made and has started what it starts."""


def in_sequences(candidate: Candidate, sample: Sample, shrink: bool = True) -> list[Answer]:
    """A call's results after a sequence that changes them, beside what the golden model gives for the same operands.

    Args:
        candidate: who is asked.
        sample: an integer fixture of at least four tokens, its rows of x by token: sums stay exact when signs change.
        shrink: look for the shortest sequence that goes wrong.

    Returns:
        Two answers, the second to be like the first, with the shortest sequence in its circumstance; of a sequence that
        went well if none goes wrong.
    """
    seen: list[tuple[Answer, Answer]] = []

    class Machine(_Calls):
        def __init__(self) -> None:
            super().__init__(candidate, sample, seen)

    phases = (Phase.generate, Phase.shrink)[: 1 + shrink]
    profile = settings(
        max_examples=_EXAMPLES, stateful_step_count=_STEPS, derandomize=True, database=None, deadline=None,
        verbosity=Verbosity.quiet, phases=phases, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        many = _FEWER if candidate.operators and sample.problem.device.type == "cpu" else _MANY
        _as_in_evaluation(Machine(), many)
        _as_in_pipelines(Machine(), many)
        _as_in_distillation(Machine())
        _as_in_variants(Machine())
        _as_in_threads(Machine())
        if sample.problem.device.type == "cuda":
            Machine().on_streams("a", "d")
        for operand in CHANGED:
            _as_in_training(Machine(), operand)
        run_state_machine_as_test(Machine, settings=profile)
    except _DifferentError as error:
        return list(error.answers)
    except (Exception, SystemExit) as error:  # whatever a candidate raises is part of its answer
        return [Answer({}, error=error)]
    return list(seen[-1]) if seen else []


def _as_in_evaluation(machine: _Calls, many: int) -> None:
    """Results without a graph, many of them alive at once; then training on the same operands."""
    machine.evaluate(which="a")
    for _ in range(many):
        machine.evaluate(which="d")
    machine.look_again()
    machine.evaluate(which="a", rows=2)
    for _ in range(2):
        machine.evaluate(which="d")
    machine.look_again()
    for _ in range(2):  # the caller's own: what is returned next is not what it has overwritten
        machine.overwrite()
        machine.evaluate(which="a")
        machine.forward(which="a")
        machine.backward(index=0, retain=False)


def _as_in_pipelines(machine: _Calls, many: int) -> None:
    """Many graphs alive at once, whose backward passes come in another order; then calls that differ in more."""
    machine.forward(which="a")
    for _ in range(many):
        machine.forward(which="d")
    for index in (0, -1, 0, -1):
        machine.backward(index=index, retain=False)
    machine.look_again()
    for which in ("a", "b", "e", "f"):
        machine.forward(which=which)
    for index in (-4, -3, -2, -1):
        machine.backward(index=index, retain=False)
    machine.look_again()


def _as_in_distillation(machine: _Calls) -> None:
    """Two backward passes over one graph, for other gradients in the same memory; outputs whose graph has ended."""
    if not machine.candidate.covers.one_backward:
        machine.forward(which="a")
        machine.backward(index=0, retain=True)
        machine.refill(which="a")
        machine.backward(index=0, retain=False)
    for which in ("a", "d", "d"):
        machine.detach(which=which)
    machine.look_again()


def _as_in_variants(machine: _Calls) -> None:
    """The same tensors in calls that differ in what is no tensor, or in one that is left out; there and back."""
    variants = sorted(machine.samples.keys() - set(SETS[1:]))
    for which in (*variants, *reversed(variants)):
        machine.forward(which=which)
    for _ in range(2 * len(variants)):
        machine.backward(index=0, retain=False)
    machine.look_again()


def _as_in_threads(machine: _Calls) -> None:
    """Calls at the same time: of the same shapes, and of the same tensors in part."""
    for both in (("a", "d"), ("c", "a"), ("a", "b")):
        machine.at_once(both)
    machine.at_once(("a", "d"), "no_grad")


def _as_in_training(machine: _Calls, operand: str) -> None:
    """Operands that change between passes and calls; chance seldom finds sequences of this length."""
    machine.forward(which="a")
    machine.update(which="a", operand=operand)
    machine.backward(index=0, retain=False)
    for how in ("", *CHANGES[1:]):
        if how:
            machine.update(which="a", operand=operand, how=how)
        machine.forward(which="a")
        machine.backward(index=0, retain=False)


class _DifferentError(AssertionError):
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


class _Calls(RuleBasedStateMachine):
    """Calls on sets of operands (see `operand_sets`), each the same tensors in every call."""

    def __init__(self, candidate: Candidate, sample: Sample, seen: list[tuple[Answer, Answer]]) -> None:
        super().__init__()
        self.candidate, self.seen, self.script = candidate, seen, list[str]()
        self.pending: list[_Pending] = []
        self.kept: list[tuple[Outputs, Outputs]] = []  # what was returned as it is, and a copy of it as it came
        self.samples = operand_sets(sample)
        self.expected: dict[str, Outputs] = {}  # as long as the operands are what they are

    @rule(which=st.sampled_from(SETS))
    def forward(self, which: str) -> None:
        """Call, and hold the output against the golden model."""
        name = f"y{sum(line.startswith('y') for line in self.script)}"
        self.script.append(f"{name} = layer({which})")
        sample = self.samples[which]
        y, leaves = self.candidate.trace(sample, copy=False)
        pending = _Pending(name, which, y, leaves, self._golden(which), y.detach().clone())
        self.pending.append(pending)
        self._hold({"Y": y.detach()}, pending.expected)

    @rule(which=st.sampled_from(SETS), mode=st.sampled_from(("inference", "no_grad")))
    def evaluate(self, which: str, mode: str = "inference", rows: int | None = None) -> None:
        """Call without a graph and keep the output, or so many rows of it."""
        self.script.append(f"layer({which}){f'[:{rows}]' if rows else ''} under {mode}")
        self._keep(self.candidate.trace(self.samples[which].called(mode=mode), copy=False)[0], which, rows)

    def detach(self, which: str) -> None:
        """Call, and keep the output alone, whose graph ends."""
        self.script.append(f"layer({which}).detach()")
        self._keep(self.candidate.trace(self.samples[which], copy=False)[0].detach(), which)

    def _keep(self, y: Tensor, which: str, rows: int | None = None) -> None:
        self._hold({"Y": y}, self._golden(which))
        self.kept.append(({"Y": y[:rows]}, {"Y": y[:rows].clone()}))

    def refill(self, which: str) -> None:
        """The same tensor of incoming gradients holds others."""
        self.script.append(f"change dOut of {which} in place")
        self.samples[which].grad_out.neg_()
        self.expected.pop(which, None)
        for pending in self.pending:
            if pending.which == which:
                pending.expected = self._golden(which)

    @precondition(lambda self: bool(self.pending))
    @rule(index=st.integers(0, 3), retain=st.booleans())
    def backward(self, index: int, retain: bool) -> None:
        """Gradients of an earlier call, one of several; after a change in place they may be refused."""
        pending = self.pending[index % len(self.pending)]
        retain = retain and not self.candidate.covers.one_backward
        self.script.append(f"gradients({pending.name}{', retain_graph=True' if retain else ''})")
        try:
            gradients = self.candidate.gradients(self.samples[pending.which], pending.y, pending.leaves, retain)
        except RuntimeError:
            if not pending.changed:
                raise
            gradients = {}
        if not retain or not gradients:
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
        problem = self.samples[which].problem
        again = sum(line.startswith(f"change {which}.{operand} ") for line in self.script) % 2 == 1
        values = changed(problem, operand, again)
        if not values:
            return
        for old, new in values:
            if how == ".data is another tensor":
                old.data = new.detach().clone()
            else:
                (old.detach() if how == "in place" else old.data).copy_(new)
        self.script.append(f"change {which}.{operand} {how}")
        touched = {"b"} if which == "b" else {"a", "c"}
        for each in touched:
            self.expected.pop(each, None)
        for pending in self.pending:
            pending.changed |= pending.which in touched

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

    def at_once(self, both: tuple[str, str], mode: Mode = "grad") -> None:
        """Two calls and their gradients, each in a thread of its own; the second under a mode."""
        self.script.append(
            f"layer({both[0]}) and its gradients, and in another thread layer({both[1]}) under {mode} and its own"
        )

        def call(which: str, mode: Mode = "grad") -> Outputs:
            # What is global is set for both threads.
            return self._run(self.samples[which].called(algorithms="any", default_dtype=torch.float32, mode=mode))

        with self.samples[both[0]].case.call.in_both_passes():
            found = in_turns(lambda: call(both[0]), lambda: call(both[1], mode))
        for which, outputs in zip(both, found, strict=True):
            self._hold(outputs, self._golden(which))

    def on_streams(self, *which: str) -> None:
        """Calls and their gradients, each on a stream of its own, where its operands are filled long after the call."""
        self.script.append(f"layer({') and layer('.join(which)}) and their gradients, each on a stream of its own")
        begun = []
        for each in which:
            sample, stream = self.samples[each], torch.cuda.Stream()
            tensors: dict[str, Tensor] = {}
            sample.mapped(tensors.setdefault)
            late = sample.mapped(lambda _, x: torch.zeros_like(x))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(_CYCLES)
                late.mapped(lambda name, x: x.copy_(tensors[name]))  # noqa: B023
                begun.append((late, self._run(late)))
        torch.cuda.synchronize()
        for each, (_, outputs) in zip(which, begun, strict=True):
            self._hold(outputs, self._golden(each))

    @precondition(lambda self: bool(self.pending or self.kept))
    @rule()
    def look_again(self) -> None:
        """Outputs and gradients that were returned earlier are what they were."""
        self.script.append("look at every output again")
        for pending in self.pending:
            self._hold({"Y": pending.y.detach()}, {"Y": pending.kept})
        for found, copy in self.kept:
            self._hold(found, copy)

    def _run(self, sample: Sample) -> Outputs:
        y, leaves = self.candidate.trace(sample, copy=False)
        return {"Y": y.detach(), **self.candidate.gradients(sample, y, leaves)}

    def _golden(self, which: str) -> Outputs:
        """The golden model's results for operands as they are."""
        if which not in self.expected:
            self.expected[which] = golden().run(self.samples[which])
        return self.expected[which]

    def _hold(self, got: Outputs, expected: Outputs) -> None:
        """Keep the answers; raise if a value is wrong."""
        got = _copied(got)
        right = {name: _like(expected.get(name), x) for name, x in got.items()}
        after = f"after «{'; '.join(_counted(self.script))}»"
        self.seen[:] = [(Answer(right), Answer(got, circumstance=after, like=0))]
        if not all(_equal(x, right[name]) for name, x in got.items()):
            raise _DifferentError(self.seen[0])


def _counted(script: Iterable[str]) -> Iterator[str]:
    """Each line once, with how many times in a row."""
    for line, alike in groupby(script):
        times = len(list(alike))
        yield f"{line}, {times} times" if times > 1 else line


def _copied(outputs: Outputs) -> Outputs:
    return {name: None if x is None else x.clone() for name, x in outputs.items()}


def _like(x: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A value in another one's dtype, and +0 for −0, which a sum may lose."""
    return x if x is None or other is None else x.to(other.dtype) + 0.0


def _equal(x: Tensor | None, right: Tensor | None) -> bool:
    if x is None or right is None:
        return x is right
    return x.shape == right.shape and torch.equal(x, right)
