"""Sequences of calls: what a call returns may not depend on the calls before it, after it, or between its two passes.

hypothesis' state machines choose what is called when, and shrink a sequence that goes wrong to the shortest one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test

from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.call_machine import WAYS, DifferentError
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.graphs import GRAPHS, INCOMING
from mxref.verification.candidates.operand_sets import CHANGED, CHANGES, SETS
from mxref.verification.candidates.written_steps import WrittenSteps
from mxref.verification.cases.call import Mode
from mxref.verification.cases.case import Sample

_EXAMPLES, _STEPS = 8, 8

_MANY, _FEWER = 520, 16
"""Calls after a first one that is still held: of so many buffers, or fewer, that take turns, one is taken again. The
layers of a large model, in several batches under way, need as many at once. Large samples take too long, and kernels
that are interpreted."""

_AT_ONCE = (
    ("a", "d"), ("c", "a"), ("a", "b"), ("a", "row by row"), ("another rank", "a"), ("a", "another dtype"),
    ("a", "d", "b"),
)  # fmt: skip
"""Calls at the same time: of the same shapes, of the same tensors in part, and of what differs in one thing."""


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
    last: list[WrittenSteps] = []

    class Machine(WrittenSteps):
        def __init__(self, **how: Any) -> None:
            super().__init__(candidate, sample, seen, **how)
            last[:] = [self]

    phases = (Phase.generate, Phase.shrink)[: 1 + shrink]
    profile = settings(
        max_examples=_EXAMPLES, stateful_step_count=_STEPS, derandomize=True, database=None, deadline=None,
        verbosity=Verbosity.quiet, phases=phases, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    try:
        few = sample.problem.P > 32 or (candidate.operators and sample.problem.device.type == "cpu")
        _as_written(Machine, _FEWER if few else _MANY)
        run_state_machine_as_test(Machine, settings=profile)
    except (Exception, SystemExit) as error:  # whatever a candidate raises is part of its answer
        while parts := getattr(error, "exceptions", ()):  # of what goes wrong in one run and not in the next
            error = parts[0]
        if isinstance(error, DifferentError):
            return list(error.answers)
        return [Answer({}, error=error, circumstance=last[0].told() if last else "")]
    return list(seen[-1]) if seen else []


def _as_written(machine: Callable[..., WrittenSteps], many: int) -> None:
    """Sequences that chance seldom finds."""
    _as_in_evaluation(machine(), many)
    _as_in_pipelines(machine(), many)
    _as_in_distillation(machine())
    _as_in_loaders(machine())
    for variant in _as_in_variants(machine()):
        _as_it_was_first(machine(), variant)
    _as_on_idle_ranks(machine())
    _as_in_serving(machine(), "no_grad")
    served = machine(needs=())
    served.make_in_inference()
    served.evaluate("a", "no_grad")
    _as_in_serving(served, "inference")
    _as_behind_errors(machine())
    machine().chained()
    _as_in_threads(machine())
    _as_in_frameworks(machine())
    device_type = served.sample.problem.device.type
    if device_type == "cuda":
        machine().on_streams("a", "d")
    for how, changes in WAYS:
        for operand in changes:
            trained = machine(**how)
            if trained.script or not how:  # it is covered
                with trained.sample.case.call.around_backward(device_type):
                    _as_in_training(trained, operand)


def _as_in_evaluation(machine: WrittenSteps, many: int) -> None:
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


def _as_in_pipelines(machine: WrittenSteps, many: int) -> None:
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


def _as_in_distillation(machine: WrittenSteps) -> None:
    """Two backward passes over one graph, for other gradients in the same memory; outputs whose graph has ended."""
    if not machine.candidate.covers.one_backward:
        machine.forward(which="a")
        machine.backward(index=0, retain=True)
        machine.refill(which="a")
        machine.backward(index=0, retain=False)
    for which in ("a", "d", "d"):
        machine.detach(which=which)
    machine.look_again()


def _as_in_loaders(machine: WrittenSteps) -> None:
    """Parts of one batch, which have one storage."""
    for which in "cgc":
        machine.forward(which=which)
        machine.backward(index=0, retain=False)
        machine.evaluate(which=which)


def _as_in_variants(machine: WrittenSteps) -> list[str]:
    """The same tensors in calls that differ in what is no tensor, or in one that is left out; there and back."""
    variants = sorted(machine.samples.keys() - set(SETS[1:]))
    for which in (*variants, *reversed(variants)):
        machine.forward(which=which)
    for _ in range(2 * len(variants)):
        machine.backward(index=0, retain=False)
    machine.look_again()
    return variants


def _as_it_was_first(machine: WrittenSteps, variant: str) -> None:
    """A variant and then what it varies: the first call with a tensor decides nothing for later ones."""
    for which in (variant, "a"):
        machine.forward(which=which)
        machine.backward(index=0, retain=False)


def _as_on_idle_ranks(machine: WrittenSteps) -> None:
    """Calls without a row of an expert: zeros too are the caller's to write to."""
    for _ in range(2):
        machine.evaluate(which="no rows")
        machine.forward(which="no rows")
        machine.backward(index=0, retain=False)
        machine.overwrite()


def _as_in_serving(machine: WrittenSteps, mode: Mode) -> None:
    """Calls without a graph: operands change in between, where nobody counts it, and what is no tensor differs."""
    machine.evaluate("a", mode)
    for operand in CHANGED:
        machine.update("a", operand, how=CHANGES[1])
        machine.evaluate("a", mode)
    for which in (*sorted(machine.samples.keys() - set(SETS)), "a"):
        machine.evaluate(which, mode)
    machine.look_again()


def _as_behind_errors(machine: WrittenSteps) -> None:
    """A call that is refused, and then others."""
    machine.refused("a")
    machine.forward("a")
    machine.backward(index=0, retain=False)
    machine.evaluate("a")


def _as_in_threads(machine: WrittenSteps) -> None:
    """Calls at the same time, also under other modes."""
    for which in _AT_ONCE:
        machine.at_once(*which)
    machine.at_once("a", "d", mode="no_grad", algorithms="deterministic")


def _as_in_frameworks(machine: WrittenSteps) -> None:
    """Hooks, steps within a backward pass, checkpointed regions, and outputs that only part of a loss sees."""
    for how in GRAPHS:
        machine.in_graph("a", how)
    machine.ignored("a")
    for how in INCOMING:
        machine.given("a", how)
    machine.forward("a")
    machine.taken_again("a")
    machine.backward(index=0, retain=False)
    for variant in ("other s", "no adapters"):
        machine.in_region("a", variant)


def _as_in_training(machine: WrittenSteps, operand: str) -> None:
    """Operands that change between passes and calls."""
    machine.forward(which="a")
    machine.update(which="a", operand=operand)
    machine.forward(which="a")
    for _ in range(2):
        machine.backward(index=0, retain=False)
    for how in CHANGES[1:]:
        machine.update(which="a", operand=operand, how=how)
        machine.forward(which="a")
        machine.backward(index=0, retain=False)
