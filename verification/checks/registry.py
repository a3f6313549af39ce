"""Every check, in the gate's order: name, reason, who is asked.

The gate, its report, the planted bugs, the scoreboard and the README's table are made from this list. A new check is a
function of `checks` and a line here; or in `own.registry`, if this project's kernels alone are asked: the wheel leaves
those out.
"""

from __future__ import annotations

from mxref.verification.candidates import asking
from mxref.verification.candidates.sequences import in_sequences
from mxref.verification.cases import small, suites
from mxref.verification.cases.case import Case
from mxref.verification.checks.bits import a_configuration, same_bits, same_values
from mxref.verification.checks.check import Asked, Cases, Check, named
from mxref.verification.checks.drift import no_drift
from mxref.verification.checks.memory import unwritten
from mxref.verification.checks.ratios import right_exponents, right_signs
from mxref.verification.checks.values import decoded_bits, equal, inside_intervals
from mxref.verification.clone import IS_CLONE, of_a_clone


def why() -> dict[str, str]:
    """Name -> why, of every check, of the state and of the baseline."""
    return {check.name: check.why for check in (*CHECKS, STATE, BASELINE)}


def _fitted(cases: Cases) -> Cases:
    """Cases that hold a candidate against itself, each as near as possible to what it covers."""
    return lambda scope: [scope.subset.fitted(case) if isinstance(case, Case) else case for case in cases(scope)]


_drawn, _behaviour = suites.ordinary_cases, _fitted(named(suites.behaviour_cases))

_OF_ANY: tuple[Check, ...] = (
    Check(
        "integer",
        "Inputs are small integers chosen so that every sum is exact in any order. Nothing may differ, not by one bit: "
        "whatever does is a wrong index, sign, scale or a missing term, never rounding.",
        Asked.ANY, suites.exact_cases, asking.once, equal,
    ),
    Check(
        "decode",
        "Every pair of an MXFP4 code and a scale byte, 16 × 256 of them, in every place of a block, is decoded through "
        "the products, alone and beside every option, and compared with the value that the format defines.",
        Asked.ANY, suites.decode_cases, asking.once, equal,
    ),
    Check(
        "decoder",
        "A decode that runs outside the products is compared bit by bit, −0 included, which a product loses.",
        Asked.ANY, named(suites.decoder_cases), asking.by_its_decoder, decoded_bits,
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
        "Calls in any order, of several forward passes, gradients of earlier ones, as many graphs alive as a large "
        "model has layers, calls without a graph, operands changed in place as an optimiser does or given other "
        "memory through `.data`, results that the caller overwrites, other shapes in the same memory, the same shapes "
        "elsewhere, with other strides or all in one storage, tensors of a subclass or with their signs put off, the "
        "same tensors in calls that differ in something else, hooks, steps within a backward pass, checkpointed "
        "regions, calls that are refused, two layers in a row, calls at the same time in threads, and on a GPU on two "
        "streams: a result depends on its operands alone. A failure is shrunk to the shortest sequence.",
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
        Asked.ANY, named(suites.configuration_cases), asking.under_every_configuration,
        a_configuration,
    ),
)  # fmt: skip

CHECKS: tuple[Check, ...] = (*_OF_ANY, *(of_a_clone("checks.own.registry", "").CHECKS if IS_CLONE else ()))
"""Those of any candidate, then those of this project's kernels."""

_BY_NAME = {check.name: check for check in CHECKS}
INTEGER, DECODE, POISON, SECOND_BACKWARD = (
    _BY_NAME[name] for name in ("integer", "decode", "poison", "second backward")
)
VALUES = INTERVAL, DRIFT, SIGN, EXPONENT = tuple(_BY_NAME[name] for name in ("interval", "drift", "sign", "exponent"))
"""VALUES are what ordinary numbers are judged by; all of these are known apart from the other checks."""

STATE = Check(
    "state",
    "After each case torch's global state is what it was before: default dtype and device, gradient mode, autocast, "
    "deterministic mode, threads, products in TF32, sums in 16 bits, subnormals, modes, hooks, tracing, what backends, "
    "warnings, logging, signals and the environment are set to, and random numbers, Python's and NumPy's too, none of "
    "which the layer draws.",
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
