"""This project's public operators and tables: equal to what they must be, and what does not fit refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxref.verification.candidates.answer import Answer
from mxref.verification.cases.own.tables import TableCase, TableSample
from mxref.verification.checks.elements import raised
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.weights import MXWeights, decode_mxfp4

_REFUSED_BY: dict[str, type[Exception]] = {"a dtype that is no float": TypeError}
"""Misuse -> what it must raise, where that is not a ValueError."""


def equal_operators(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Each operator's result equals the reference's; labels are those of `candidates.asking_kernels.by_operators`."""
    right, case = _operator_results(expected), expected.sample.case.name

    def judge(tensor: str, answer: Answer) -> Finding:
        if answer.error is None:
            return _equality(case, tensor, answer.outputs["out"], right[tensor])
        reason = f"raised {type(answer.error).__name__}: {answer.error}"
        return Finding("", case, tensor, Status.FAIL, reason, right[tensor].numel(), 0)

    return [judge(answer.label, answer) for answer in answers]


def refused(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """What does not fit is refused before anything runs, by the right kind of error."""
    findings = []
    for answer in answers:
        wanted, error = _REFUSED_BY.get(answer.label, ValueError), answer.error
        status, reason = Status.FAIL, f"accepted; expected a {wanted.__name__}"
        if isinstance(error, wanted):
            status, reason = Status.PASS, f"refused by a {wanted.__name__}"
        elif error is not None:
            reason = f"raised {type(error).__name__}: {error}; expected a {wanted.__name__}"
        findings.append(Finding("", expected.sample.case.name, answer.label, status, reason, 0, 0))
    return findings


def right_tables(answers: Sequence[Answer], sample: TableSample) -> list[Finding]:
    """Every entry of the tables of tiles and of rows; nothing is written outside a table."""
    findings, case = [], sample.case
    for answer in answers:
        if answer.error is not None:
            findings.append(raised(answer, case.name))
            continue
        for table, got in answer.outputs.items():
            if not case.known:
                continue
            height = table.partition(" rows a tile")[0]
            value = _tiles(case, int(height)) if height.isdigit() else _rows(case)
            findings.append(_equality(case.name, table, got, value))
        for written in answer.written:
            status = Status.FAIL if written.outside else Status.PASS
            reason = f"{written.outside} bytes written outside {written.note}" if written.outside else "as it was"
            findings.append(Finding("", case.name, written.place, status, reason, 0, written.outside))
    return findings


def _operator_results(expected: Expectation) -> dict[str, Tensor]:
    problem = expected.sample.problem
    weights, A, B, positions = problem.expert_weights, problem.lora_A, problem.lora_B, problem.sorted_scattered_idxs
    assert isinstance(weights, MXWeights)
    assert A is not None
    assert B is not None
    layout = {True: "expert order", False: "positions"}
    results = {"Y, a fresh buffer": _laid_out(expected.fwd.y.value, positions, False)}
    for read in (True, False):
        for write in (True, False):
            how = f"{layout[read]} to {layout[write]}"
            results[f"Y, {how}"] = _laid_out(expected.fwd.y.value, positions, write)
            results[f"D, {how}"] = _laid_out(expected.bwd.d.value, positions, write)
    r, some = problem.rank, torch.arange(problem.E - 1, -1, -2, device=A.device)
    own = [slice(e * r, (e + 1) * r) for e in some.tolist()]
    decoded = decode_mxfp4(weights, problem.dtype)[some]
    return results | {
        "A of some experts": torch.cat([A[rows] for rows in own]),
        "B of some experts": torch.cat([B[:, columns] for columns in own], 1),
        "W of no experts": decoded[:0],
        "W of some experts": decoded,
    }


def _laid_out(rows: Tensor, positions: Tensor, grouped: bool) -> Tensor:
    """Rows in expert order, put at their positions unless `grouped`."""
    if grouped:
        return rows
    by_position = torch.empty_like(rows)
    by_position[positions] = rows
    return by_position


def _equality(case: str, tensor: str, got: object, value: Tensor) -> Finding:
    count = value.numel()
    fits = isinstance(got, Tensor) and not got.is_meta and got.shape == value.shape
    if not isinstance(got, Tensor) or not fits or (not value.is_floating_point() and got.dtype != value.dtype):
        form = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        reason = f"is {form}; expected {value.dtype} {tuple(value.shape)}"
        return Finding("", case, tensor, Status.FAIL, reason, count, count)
    wrong = int((got.to(value.device).double() != value.double()).sum())
    if wrong:
        return Finding("", case, tensor, Status.FAIL, f"{wrong} elements differ from the reference", count, wrong)
    return Finding("", case, tensor, Status.PASS, "equal to the reference", count, 0)


def _tiles(case: TableCase, height: int) -> Tensor:
    """int32 [T, 3] of (group, first row, end): T the most tiles that P rows can need, unused entries zero."""
    begins, P = [0, *case.ends], case.P
    rows = [
        (group, first, min(first + height, end))
        for group, (begin, end) in enumerate(zip(begins, [*case.ends, P], strict=True))
        for first in range(begin, end, height)
    ]
    groups = min(len(case.ends) + 1, P)
    table = torch.zeros((P + groups * (height - 1)) // height, 3, dtype=torch.int32)
    if rows:
        table[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    return table


def _rows(case: TableCase) -> Tensor:
    """int32 [P]: the routed row at each position; −1 where no expert owns it, or nobody says that it is there."""
    positions = case.positions()[: case.ends[-1]]
    rows, inverse = torch.arange(len(positions), dtype=torch.int32), torch.full((case.P,), -1, dtype=torch.int32)
    within = (positions >= 0) & (positions < case.P)
    inverse[positions[within]] = rows[within]
    return inverse
