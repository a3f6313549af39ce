"""Ways to ask a candidate about one sample; each returns its answers and judges nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime import interpreter

from mxref.verification.arithmetic.thresholds import RUNS, RUNS_INTERPRETED
from mxref.verification.candidates.answer import OPERAND_OF, Answer, Outputs, answered
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory import RedZone, between_red_zones, uninitialised_memory
from mxref.verification.cases.case import Sample
from mxref.verification.cases.tokens import disturbed, select, tokens_of, without


def once(candidate: Candidate, sample: Sample) -> list[Answer]:
    """One forward and one backward pass."""
    return [answered(lambda: candidate.run(sample))]


def repeatedly(candidate: Candidate, sample: Sample) -> list[Answer]:
    """Several runs on fresh copies of the operands, each to be like the first.

    Interpreted, every second one takes the programs of each kernel in reverse: two that write the same element show.
    """
    interpreted = sample.problem.device.type == "cpu"
    answers = once(candidate, sample)
    for run in range(2, (RUNS_INTERPRETED if interpreted else RUNS) + 1):
        reverse = interpreted and run % 2 == 0
        how = f"in run {run}{', its programs in reverse order' if reverse else ''}"
        with reversed_programs() if reverse else nullcontext():
            answers.append(answered(lambda: candidate.run(sample), circumstance=how, like=0))
    return answers


def among_other_tokens(candidate: Candidate, sample: Sample) -> list[Answer]:
    """A token's rows of Y, dX and dgates when other tokens change their values, and when they leave the batch.

    The second half needs one configuration for both batches: each that the candidate can be pinned to. Without a pin
    dispatch may choose by size, and rows are asked for at equal shapes only.
    """
    if candidate.configs is None:
        return _other_values(candidate, sample, "", "at equal shapes; no configuration can be pinned", 0)
    pinned, answers = _pinned(candidate, sample)
    for name, each in pinned.items():
        answers += _other_values(each, sample, f"{name}, other values", "under a pinned configuration", len(answers))
        answers += _fewer_tokens(each, sample, f"{name}, fewer rows", len(answers))
    return answers


def in_poisoned_memory(candidate: Candidate, sample: Sample) -> list[Answer]:
    """A run in ordinary memory, and one with operands between red zones and uninitialised memory full of NaN."""
    with uninitialised_memory(poisoned=False):
        clean = answered(lambda: candidate.run(sample))
    inside, zones = between_red_zones(sample)

    for tensor, name in OPERAND_OF.items():  # as if others had been accumulated
        operand = getattr(inside.problem, name)
        if operand is not None and sample.case.call.wants(tensor):
            zones[f"{name}.grad"] = zone = RedZone(torch.ones_like(operand), float("nan"))
            operand.grad = zone.inside

    def run() -> Outputs:
        y, leaves = candidate.trace(inside, copy=False)
        return {"Y": y.detach(), **candidate.gradients(inside, y, leaves, copy=False)}

    with uninitialised_memory(poisoned=True):
        poisoned = answered(run, circumstance="between red zones, in fresh memory full of NaN", like=0)
    return [clean, replace(poisoned, written=tuple(zone.written(name) for name, zone in zones.items()))]


def with_two_backwards(candidate: Candidate, sample: Sample) -> list[Answer]:
    """The gradients of two backward passes over one retained graph, the second for −2·dOut, divided by −2.

    Between them the caller overwrites the first ones, which are its own. Zeros have no sign here.
    """
    kept: list[Outputs] = []

    def first() -> Outputs:
        y, leaves = candidate.trace(sample)
        gradients = candidate.gradients(sample, y, leaves, retain_graph=True)
        copies = {tensor: None if x is None else x + 0.0 for tensor, x in gradients.items()}
        for x in gradients.values():
            if x is not None and x.is_contiguous():  # others may have elements in memory once
                x.mul_(float("nan"))
        other = replace(sample, grad_out=-2.0 * sample.grad_out)
        again = candidate.gradients(other, y, leaves) if gradients else {}
        kept.append({tensor: None if x is None else x / -2.0 + 0.0 for tensor, x in again.items()})
        return copies

    answer = answered(first)
    if answer.error is not None:
        return [answer]
    return [answer, Answer(kept[0], circumstance="in a second backward pass, for −2·dOut", like=0)]


def for_every_subset(candidate: Candidate, sample: Sample) -> list[Answer]:
    """Each subset of the gradients by itself, to be like the same ones among all of them; and Y without a graph."""
    whole = answered(lambda: candidate.run(sample))
    if whole.error is not None:
        return [whole]
    names = [name for name in whole.outputs if name != "Y"]
    answers = [whole]
    for needs in (chosen for count in range(1, len(names)) for chosen in combinations(names, count)):
        call = replace(sample.case.call, needs=needs)
        part = replace(sample, case=replace(sample.case, call=call))
        answers.append(replace(whole, outputs={name: whole.outputs[name] for name in ("Y", *needs)}))
        how = f"when only {', '.join(OPERAND_OF[name] for name in needs)} need{'s' * (len(needs) == 1)} a gradient"
        answers.append(answered(partial(candidate.run, part), circumstance=how, like=len(answers) - 1))
    graph = len(answers)
    answers.append(replace(whole, outputs={"Y": whole.outputs["Y"]}))
    for mode in ("no_grad", "inference"):
        run = partial(candidate.run, sample.called(mode=mode))
        answers.append(answered(run, circumstance=f"under {mode}", like=graph))
    return answers


def under_every_configuration(candidate: Candidate, sample: Sample) -> list[Answer]:
    """What dispatch chooses on its own, then every configuration that it can reach, pinned; none without a pin."""
    if candidate.configs is None:
        return []
    pinned, errors = _pinned(candidate, sample)
    runs = [answered(partial(each.run, sample), label) for label, each in pinned.items()]
    return errors or once(candidate, sample) + runs


def by_its_decoder(candidate: Candidate, sample: Sample) -> list[Answer]:
    """The weights as the candidate's own decoder gives them, "W" [E, N, K]; nothing from one without."""
    decode, weights = candidate.decode, sample.problem.expert_weights
    if decode is None or isinstance(weights, Tensor):
        return []
    return [answered(lambda: {"W": decode(weights, sample.case.dtype)})]


def _pinned(candidate: Candidate, sample: Sample) -> tuple[dict[str, Candidate], list[Answer]]:
    """The candidate under each configuration that it names, or the error that it raises instead."""
    assert candidate.configs is not None
    try:
        return {str(config): candidate.pinned(config) for config in candidate.configs_for(sample)}, []
    except Exception as error:
        return {}, [Answer({}, "configurations", error)]


def _other_values(candidate: Candidate, sample: Sample, label: str, how: str, index: int) -> list[Answer]:
    """Every second token gets other values, a thousand times as large; the rest must not notice."""
    odd = torch.arange(1, sample.case.tokens, 2, device=sample.problem.device)
    kept = {tensor: ~torch.isin(tokens, odd) for tensor, tokens in tokens_of(sample).items()}

    def run(each: Sample) -> Outputs:
        outputs = candidate.run(each)
        return {name: x[kept[name]] for name, x in outputs.items() if name in kept and x is not None}

    circumstance = f"when other rows have other values, {how}"
    return [
        answered(lambda: run(sample), label),
        answered(lambda: run(disturbed(sample, odd)), label, circumstance, index),
    ]


def _fewer_tokens(candidate: Candidate, sample: Sample, label: str, index: int) -> list[Answer]:
    """A third of the tokens by themselves: other companions, other tiles, and on a GPU other places in them.

    Interpreted, a tile's product is NumPy's, whose bits follow a row's place in the tile. The first tokens keep theirs.
    """
    tokens = torch.arange(sample.case.tokens, device=sample.problem.device)
    keep = tokens[: -(-len(tokens) // 3)] if tokens.device.type == "cpu" else tokens[1::3]

    def whole() -> Outputs:
        outputs = candidate.run(sample)
        known = tokens_of(sample)
        return {name: select(sample, name, x, keep) for name, x in outputs.items() if name in known and x is not None}

    def part() -> Outputs:
        outputs = candidate.run(without(sample, keep))
        return {name: outputs.get(name) for name in tokens_of(sample)}

    return [answered(whole, label), answered(part, label, "in a smaller batch", index)]


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Within this context interpreted programs run from the last to the first: a GPU promises no order.

    What is not interpreted is as ever.
    """
    place = interpreter.InterpreterBuilder.set_grid_idx

    def from_the_end(builder: Any, *index: int) -> None:
        place(builder, *(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    with patch.object(interpreter.InterpreterBuilder, "set_grid_idx", from_the_end):
        yield
