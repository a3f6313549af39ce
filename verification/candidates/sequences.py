"""Sequences of calls: what a call returns may not depend on the calls before it, after it, or between its two passes.

hypothesis' state machines choose what is called when, and shrink a sequence that goes wrong to the shortest one.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test

from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.call_machine import CallMachine, DifferentError
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.graphs import GRAPHS
from mxref.verification.candidates.operand_sets import CHANGED, CHANGES, SETS
from mxref.verification.cases.case import Sample

_EXAMPLES, _STEPS = 8, 8

_MANY, _FEWER = 520, 16
"""Calls after a first one that is still held: of so many buffers, or fewer, that take turns, one is taken again. The
layers of a large model, in several batches under way, need as many at once; interpreted kernels take too long."""


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

    class Machine(CallMachine):
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
        _as_in_loaders(Machine())
        for variant in _as_in_variants(Machine()):
            _as_it_was_first(Machine(), variant)
        _as_on_idle_ranks(Machine())
        Machine().in_serving("a")
        _as_in_threads(Machine())
        _as_in_frameworks(Machine())
        if sample.problem.device.type == "cuda":
            Machine().on_streams("a", "d")
        for operand in CHANGED:
            _as_in_training(Machine(), operand)
        run_state_machine_as_test(Machine, settings=profile)
    except DifferentError as error:
        return list(error.answers)
    except (Exception, SystemExit) as error:  # whatever a candidate raises is part of its answer
        return [Answer({}, error=error)]
    return list(seen[-1]) if seen else []


def _as_in_evaluation(machine: CallMachine, many: int) -> None:
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


def _as_in_pipelines(machine: CallMachine, many: int) -> None:
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


def _as_in_distillation(machine: CallMachine) -> None:
    """Two backward passes over one graph, for other gradients in the same memory; outputs whose graph has ended."""
    if not machine.candidate.covers.one_backward:
        machine.forward(which="a")
        machine.backward(index=0, retain=True)
        machine.refill(which="a")
        machine.backward(index=0, retain=False)
    for which in ("a", "d", "d"):
        machine.detach(which=which)
    machine.look_again()


def _as_in_loaders(machine: CallMachine) -> None:
    """Parts of one batch, which have one storage."""
    for which in "cgc":
        machine.forward(which=which)
        machine.backward(index=0, retain=False)
        machine.evaluate(which=which)


def _as_in_variants(machine: CallMachine) -> list[str]:
    """The same tensors in calls that differ in what is no tensor, or in one that is left out; there and back."""
    variants = sorted(machine.samples.keys() - set(SETS[1:]))
    for which in (*variants, *reversed(variants)):
        machine.forward(which=which)
    for _ in range(2 * len(variants)):
        machine.backward(index=0, retain=False)
    machine.look_again()
    return variants


def _as_it_was_first(machine: CallMachine, variant: str) -> None:
    """A variant and then what it varies: the first call with a tensor decides nothing for later ones."""
    for which in (variant, "a"):
        machine.forward(which=which)
        machine.backward(index=0, retain=False)


def _as_on_idle_ranks(machine: CallMachine) -> None:
    """Calls without a row of an expert: zeros too are the caller's to write to."""
    for _ in range(2):
        machine.evaluate(which="no rows")
        machine.forward(which="no rows")
        machine.backward(index=0, retain=False)
        machine.overwrite()


def _as_in_threads(machine: CallMachine) -> None:
    """Calls at the same time: of the same shapes, and of the same tensors in part."""
    for both in (("a", "d"), ("c", "a"), ("a", "b")):
        machine.at_once(both)
    machine.at_once(("a", "d"), "no_grad")


def _as_in_frameworks(machine: CallMachine) -> None:
    """Hooks, steps within a backward pass, checkpointed regions, and outputs that only part of a loss sees."""
    for how in GRAPHS:
        machine.in_graph("a", how)
    machine.ignored("a")
    for variant in ("other s", "no adapters"):
        machine.in_region("a", variant)


def _as_in_training(machine: CallMachine, operand: str) -> None:
    """Operands that change between passes and calls; chance seldom finds sequences of this length."""
    machine.forward(which="a")
    machine.update(which="a", operand=operand)
    machine.backward(index=0, retain=False)
    for how in ("", *CHANGES[1:]):
        if how:
            machine.update(which="a", operand=operand, how=how)
        machine.forward(which="a")
        machine.backward(index=0, retain=False)
