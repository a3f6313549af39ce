"""What a candidate answers: plain data, for checks to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Outputs = Mapping[str, Tensor | None]
"""By tensor, "Y" and "dX", "dA", "dB", "dbias", "dgates" of the operands that are there. A key that is missing means
that the candidate does not compute it, a None that it computed nothing."""

OPERAND_OF = {"dX": "inputs", "dA": "lora_A", "dB": "lora_B", "dbias": "expert_biases", "dgates": "gates"}
"""Gradient -> operand."""


class UnusableAnswerError(TypeError):
    """What a candidate takes or returns is not what the layer's signature says; the message says what."""


@dataclass(frozen=True)
class Written:
    """Memory that should have stayed as it was, and how many of its elements' bytes did not.

    Attributes:
        place: an operand's name, or "fresh memory" for what the candidate allocated.
        elements: of the operand.
        inside, outside: bytes of it, and around it, that were overwritten.
        note: which tensor it was, in words.
    """

    place: str
    elements: int
    inside: int
    outside: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class Answer:
    """One run.

    Attributes:
        outputs: see `Outputs`.
        label: which of several answers to one case; empty for the only one.
        error: what the candidate raised instead.
        circumstance: what was different in this run, in words: «when it runs again».
        like: index of the answer in the same list whose bits this one must have; None for no such claim.
        rows: tensor -> bool [rows], those that count; all where a tensor is missing.
        written: what was watched while it ran.
    """

    outputs: Outputs
    label: str = ""
    error: BaseException | None = None
    circumstance: str = ""
    like: int | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    written: tuple[Written, ...] = ()


def answered(call: Callable[[], Outputs], label: str = "", circumstance: str = "", like: int | None = None) -> Answer:
    """The answer that `call` gives; whatever it raises is part of it, a SystemExit too: 0 would read as a pass."""
    try:
        return Answer(call(), label, None, circumstance, like)
    except (Exception, SystemExit) as error:
        return Answer({}, label, error, circumstance, like)
