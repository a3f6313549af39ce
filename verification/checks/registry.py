"""Every check, in the order in which the gate asks: what it is called, why it exists, who is asked.

The gate, its report, the planted bugs, the scoreboard and the README's table are made from this list. A new check is a
function of `checks` that compares answers with an expectation, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from mxref.verification.candidates import asking, asking_activation, asking_kernels
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.sequences import in_sequences
from mxref.verification.cases import small, suites
from mxref.verification.cases.activation import ActivationCase, activation_cases
from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.cases.tables import TableCase, table_cases
from mxref.verification.checks.activation import right_activation
from mxref.verification.checks.bits import a_configuration, same_bits, same_values
from mxref.verification.checks.drift import no_drift
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.memory import inside_tensors, right_and_unwritten, unwritten, wide_indices
from mxref.verification.checks.operators import equal_operators, refused, right_tables
from mxref.verification.checks.ratios import right_exponents, right_signs
from mxref.verification.checks.values import decoded_bits, equal, inside_intervals


class Asked(StrEnum):
    """Who is asked."""

    ANY = "any candidate"
    OWN = "this project's kernels"
    INTERPRETED = "this project's kernels, interpreted"
    OWN_ON_GPU = "this project's kernels, on a GPU"


Cases = Callable[[Scope], Sequence[Case | TableCase | ActivationCase]]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: unique, in words.
        why: what it sees that others do not, for a reader who meets it for the first time.
        asked: who is asked.
        cases: what is asked about.
        ask: how a candidate is run for it; checks with the same `ask` and `cases` share the run.
        compare: answers and an expectation (the sample, if the case is no Case) -> findings, without the check's name.
    """

    name: str
    why: str
    asked: Asked
    cases: Cases = lambda scope: []
    ask: Callable[[Candidate, Any], list[Answer]] = lambda candidate, sample: []
    compare: Callable[[Sequence[Answer], Any], list[Finding]] = lambda answers, expected: []

    def is_for(self, own: bool, device: torch.device) -> bool:
        """Whether a candidate is asked on a device; `own`: it is this project's kernels."""
        return {
            Asked.ANY: True,
            Asked.OWN: own,
            Asked.INTERPRETED: own and device.type == "cpu",
            Asked.OWN_ON_GPU: own and device.type == "cuda",
        }[self.asked]


def why() -> dict[str, str]:
    """Name -> why, of every check, of the state and of the baseline."""
    return {check.name: check.why for check in (*CHECKS, STATE, BASELINE)}


def _small(cases: Callable[[str], list[Case]]) -> Cases:
    """The small cases in every suite."""
    return lambda scope: cases(scope.device_type)


def _few(cases: Callable[[str], list[Case]]) -> Cases:
    """All small cases where mutants are judged, which may be visible in one alone; otherwise the first five."""
    return lambda scope: cases(scope.device_type)[: None if scope.suite == "small" else 5]


def _named(cases: Callable[[Suite, str], list[Case]]) -> Cases:
    """The named cases of a suite."""
    return lambda scope: cases(scope.suite, scope.device_type)


def _guarded(device_type: str) -> list[Case]:
    """Integer cases in either layout."""
    cases = small.integer_cases(device_type)
    return [*cases, *suites.in_fragments(cases)]


def _operators(scope: Scope) -> list[Case]:
    """The case of the registered operators."""
    return [small.operator_case(scope.device_type)]


def _fitted(cases: Cases) -> Cases:
    """Cases that hold a candidate against itself, each as near to what it covers as can be."""
    return lambda scope: [scope.subset.fitted(case) if isinstance(case, Case) else case for case in cases(scope)]


_drawn, _behaviour = suites.ordinary_cases, _fitted(_named(suites.behaviour_cases))

CHECKS: tuple[Check, ...] = (
    Check(
        "integer",
        "Inputs are small integers chosen so that every sum is exact in any order. Nothing may differ, not by one bit: "
        "whatever does is a wrong index, sign, scale or a missing term, never rounding.",
        Asked.ANY, suites.exact_cases, asking.once, equal,
    ),
    Check(
        "integer, further",
        "The same on weights that are decoded already, on an N that no tile divides, and with gates beyond fp16's "
        "range.",
        Asked.OWN, _named(suites.own_integer_cases), asking.once, equal,
    ),
    Check(
        "fragments",
        "The same on packed weights in the order in which tensor cores take them, to which the loaders bring them on "
        "Hopper: every code under every scale byte, every option.",
        Asked.OWN, suites.fragment_cases, asking.once, equal,
    ),
    Check(
        "decode",
        "Every pair of an MXFP4 code and a scale byte, 16 × 256 of them, in every place of a block, is decoded through "
        "the products and compared with the value that the format defines.",
        Asked.ANY, suites.decode_cases, asking.once, equal,
    ),
    Check(
        "decode in 16 bits",
        "The same in bf16 and fp16 under Triton's interpreter, whose fp32 is exact enough for what is exact.",
        Asked.INTERPRETED, _named(suites.narrow_decode_cases), asking.once, equal,
    ),
    Check(
        "decoder",
        "A decode that runs outside the products is compared bit by bit, −0 included, which a product loses.",
        Asked.ANY, _named(suites.decoder_cases), asking.by_its_decoder, decoded_bits,
    ),
    Check(
        "tables",
        "The kernels' tables of tiles and rows, entry by entry: products hide a schedule's mistakes where two cancel, "
        "where a tile is computed twice, or where no case has as many tiles as a real batch.",
        Asked.OWN, lambda scope: table_cases(), asking_kernels.for_tables, right_tables,
    ),
    Check(
        "addresses",
        "Every load and store lies inside the tensors of its launch, and no two programs write the same element: a "
        "mask that is too wide often changes no result, and faults one day.",
        Asked.INTERPRETED, _few(small.integer_cases), asking_kernels.with_watched_memory, inside_tensors,
    ),
    Check(
        "interval",
        "Ordinary numbers. For every single element the interval in which an honest result must lie is derived from "
        "the declared rounding points and accumulation; no tolerance is tuned. One element outside fails the case.",
        Asked.ANY, _drawn, asking.once, inside_intervals,
    ),
    Check(
        "drift",
        "Errors too small for any one element to show, seen by their mean: over every expert and block of columns the "
        "error is fitted to the base term, to LoRA's term and to their sum. A slope fails if it is larger than honest "
        "rounding makes it; the probability that honest arithmetic fails anywhere in a run is 1 in 100,000.",
        Asked.ANY, _drawn, asking.once, no_drift,
    ),
    Check(
        "sign",
        "No sign may differ wherever the accepted interval lies on one side of zero.",
        Asked.ANY, _drawn, asking.once, right_signs,
    ),
    Check(
        "exponent",
        "The ratio to the exact value must round to 2^0 wherever honest rounding leaves it there. What it rounds to "
        "instead names the bug: a power of two is a wrong exponent, zero is a row that was dropped.",
        Asked.ANY, _drawn, asking.once, right_exponents,
    ),
    Check(
        "operators",
        "The public operators beside the layer, in every layout, into buffers of NaN.",
        Asked.OWN, _operators, asking_kernels.by_operators, equal_operators,
    ),
    Check(
        "refusals",
        "What does not fit an operator is refused before anything runs, by the right kind of error.",
        Asked.OWN, _operators, asking_kernels.with_bad_arguments, refused,
    ),
    Check(
        "activation",
        "What lies between the projections, SwiGLU in its forms, and its gradient: every element inside an interval "
        "derived from the documented errors of exp and division, at the bounds of a clamp and where numbers are not "
        "finite too; in memory and with indices that are watched as above and below.",
        Asked.OWN, activation_cases, asking_activation.with_its_gradient, right_activation,
    ),
    Check(
        "poison",
        "Every operand lies between red zones of NaN, and memory that nobody has written yet is filled with NaN. Not "
        "one bit of a result may change.",
        Asked.ANY, _behaviour, asking.in_poisoned_memory, same_bits,
    ),
    Check(
        "unmutated",
        "Operands, the gradients that they hold already, and what lies around them in memory, are bit for bit what "
        "they were before the call.",
        Asked.ANY, _behaviour, asking.in_poisoned_memory, unwritten,
    ),
    Check(
        "red zones",
        "What the kernels allocate lies between red zones too: a lost mask of a load spreads NaN, that of a store "
        "damages a zone, and an element that nothing wrote stays NaN.",
        Asked.OWN, _few(small.integer_cases), asking_kernels.between_fresh_red_zones,
        right_and_unwritten,
    ),
    Check(
        "remote rows",
        "Rows that belong to remote experts hold NaN: no result may notice.",
        Asked.OWN, _small(small.remote_cases), asking.once, equal,
    ),
    Check(
        "out of range",
        "Positions and offsets out of range that nobody checked, as on a GPU: rows with good ones stay right, and "
        "nothing is read or written outside a tensor.",
        Asked.OWN, _small(small.unordered_cases), asking_kernels.with_indices_out_of_range,
        right_and_unwritten,
    ),
    Check(
        "index width",
        "Products of two sizes are 64 bits wide: a 32-bit offset is right until a tensor has 2^31 elements, which no "
        "test has time for, so the arithmetic itself is watched.",
        Asked.INTERPRETED, _small(small.index_cases), asking_kernels.with_watched_indices, wide_indices,
    ),
    Check(
        "index width, decoder",
        "The same for the decoder.",
        Asked.INTERPRETED, _small(small.stack_cases), asking_kernels.with_watched_indices_of_the_decoder,
        wide_indices,
    ),
    Check(
        "rows",
        "A token's rows keep their bits when other tokens change their values, and, under a pinned configuration, when "
        "other tokens leave the batch.",
        Asked.ANY, _behaviour, asking.among_other_tokens, same_bits,
    ),
    Check(
        "second backward",
        "A second backward pass over a retained graph gives the first one's gradients, bit for bit.",
        Asked.ANY, _behaviour, asking.with_two_backwards, same_bits,
    ),
    Check(
        "determinism",
        "The same call, again and again, gives the same bits; interpreted, also when the programs of each kernel run "
        "from the last to the first, since a GPU promises no order.",
        Asked.ANY, _behaviour, asking.repeatedly, same_bits,
    ),
    Check(
        "sequences",
        "Calls in any order, of several forward passes, gradients of earlier ones, many graphs alive at once, calls "
        "without a graph, operands changed in place as an optimiser does or given other memory through `.data`, other "
        "shapes in the same memory: a result depends on its operands alone. A failure is shrunk to the shortest "
        "sequence.",
        Asked.ANY, _fitted(small.sequence_cases), in_sequences, same_values,
    ),
    Check(
        "subsets",
        "Which operands need a gradient changes no result: each subset of the gradients is what it is among all.",
        Asked.ANY, _fitted(small.subset_cases), asking.for_every_subset, same_values,
    ),
    Check(
        "configurations",
        "Every kernel configuration that dispatch can reach is pinned and judged, and dispatch on its own gives the "
        "bits of one of them: no other is shipped.",
        Asked.ANY, _named(suites.configuration_cases), asking.under_every_configuration,
        a_configuration,
    ),
    Check(
        "guard pages",
        "Every tensor ends right before addresses that nothing is mapped to: a load behind its end, whose value a mask "
        "would drop, faults. A fault ends the use of the GPU in its process, so this comes last.",
        Asked.OWN_ON_GPU, _small(_guarded), asking_kernels.at_guard_pages, equal,
    ),
)  # fmt: skip

_BY_NAME = {check.name: check for check in CHECKS}
INTEGER, DECODE, POISON, SECOND_BACKWARD = (
    _BY_NAME[name] for name in ("integer", "decode", "poison", "second backward")
)
VALUES = INTERVAL, DRIFT, SIGN, EXPONENT = tuple(_BY_NAME[name] for name in ("interval", "drift", "sign", "exponent"))
"""VALUES are what ordinary numbers are judged by; all of these are known apart from the other checks."""

STATE = Check(
    "state",
    "After each case torch's global state is what it was before: default dtype and device, gradient mode, autocast, "
    "deterministic mode, threads, products in TF32, subnormals, modes, tracing, and random numbers, none of which the "
    "layer draws.",
    Asked.ANY,
)  # fmt: skip
"""Held around every asking, see `gate.run`."""

BASELINE = Check(
    "baseline",
    "The largest and the RMS error against the ones accepted for this architecture. What is worse, though still inside "
    "the bound, is shown until it is accepted on purpose.",
    Asked.OWN,
)  # fmt: skip
"""Held against a finished run, see `records.ulp_baseline`."""
