"""Every check of a step on several ranks, in the order in which findings are told; and this project's steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxref.verification.checks.finding import Finding
from mxref.verification.distributed import checks
from mxref.verification.distributed.checks import Answers

__all__ = ["CHECKS", "ENDS", "OWN", "StepCheck", "why"]

OWN = {
    "experts-in-parallel": "mxref.verification.distributed.shipped:ExpertsInParallel",
    "fully-sharded": "mxref.verification.distributed.shipped:FullySharded",
    "two-dimensions": "mxref.verification.distributed.shipped:OnTwoDimensions",
}
"""This project's steps by name, and where each is defined."""


@dataclass(frozen=True)
class StepCheck:
    """One check.

    Attributes:
        name: unique, in words.
        why: what it sees that others do not.
        asked: whether it is asked of answers.
        compare: answers -> findings, without the check's name.
    """

    name: str
    why: str
    asked: Callable[[Answers], bool]
    compare: Callable[[Answers], list[Finding]]


def why() -> dict[str, str]:
    """Name -> why, of every check."""
    return {check.name: check.why for check in (ENDS, *CHECKS)}


def _exact(answers: Answers) -> bool:
    return answers.expected.fixture.case.exact


def _always(answers: Answers) -> bool:
    return True


ENDS = StepCheck(
    "ends",
    "Every rank comes back with an answer. A rank that dies, raises, or waits for a collective that another one skips "
    "is named, with the line where it is; nobody waits for ever.",
    _always, lambda answers: [],
)  # fmt: skip
"""Held by whoever runs the ranks, see `judging`."""

CHECKS: tuple[StepCheck, ...] = (
    StepCheck(
        "once",
        "No expert's gradient is 2, 4 or ½ times what it should be: an adapter's gradient counts once, however many "
        "ranks hold a replica, and a sum is no mean. It names what the next check only finds.",
        _exact, checks.once,
    ),
    StepCheck(
        "gradients",
        "Small integers, whose sums are exact in any order and however ranks share them out. On every rank loss, Y, "
        "dX, dgates and the whole dA and dB are the single process's, bit for bit: any difference is a wrong slice, "
        "offset, order, factor or group, never rounding.",
        _exact, checks.inside,
    ),
    StepCheck(
        "interval",
        "Ordinary numbers, a mean over tokens, a softmax router. For every element the interval is derived in which "
        "fp32 arithmetic lies in any order, and what the sum over ranks adds in the dtype and order that the step "
        "declares: a sum in bf16 declared as fp32 lies outside, and so does a router without its softmax's own term. "
        "In bf16 and fp16 each rounding point of the layer is accounted for, and one more on the way shows.",
        lambda answers: not _exact(answers), checks.inside,
    ),
    StepCheck(
        "replicas",
        "What every rank has whole has the same bits on all of them: losses, reduced gradients, and the model after "
        "the last update. Replicas that differ by one bit train apart.",
        lambda answers: len(answers.trained) > 1, checks.agree,
    ),
    StepCheck(
        "update",
        "After the last step a parameter is what it was less the learning rate times the gradients that were "
        "reported: what is reported is what was applied, on every rank.",
        _always, checks.updated,
    ),
    StepCheck(
        "packed",
        "Packed codes and scales, gathered after the last update and read back from what was saved, have every byte "
        "that they had. Bytes that are NaN in some float format change where they are gathered or saved as one.",
        _always, checks.kept,
    ),
    StepCheck(
        "saved",
        "What the step's own loader reads, in one process, is what was trained: every expert's adapters, of whichever "
        "rank, in the model's layout.",
        lambda answers: bool(answers.saved), checks.saved,
    ),
    StepCheck(
        "repeat",
        "The same model and batches once more give the same bits on every rank.",
        lambda answers: bool(answers.again), checks.repeated,
    ),
)  # fmt: skip
