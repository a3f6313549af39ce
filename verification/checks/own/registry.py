"""The checks of this project's kernels alone, in the order in which the gate asks, behind those of any candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mxref.verification.candidates import asking
from mxref.verification.candidates.own import asking_activation, asking_kernels
from mxref.verification.cases import suites
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.own import kernels, small
from mxref.verification.cases.own.activation import activation_cases
from mxref.verification.cases.own.tables import table_cases
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.check import Asked, Cases, Check, named
from mxref.verification.checks.memory import inside_tensors, right_and_unwritten, wide_indices
from mxref.verification.checks.own.activation import right_activation
from mxref.verification.checks.own.operators import equal_operators, refused, right_tables
from mxref.verification.checks.values import equal


def _small(cases: Callable[[str], list[Case]]) -> Cases:
    """The small cases in every suite."""
    return lambda scope: cases(scope.device_type)


def _few(cases: Callable[[str], list[Case]]) -> Callable[[Scope], list[Case]]:
    """All small cases where mutants are judged, which may be visible in one alone; otherwise the first five."""
    return lambda scope: cases(scope.device_type)[: None if scope.suite == "small" else 5]


def _watched(scope: Scope) -> list[Case]:
    """Few integer cases, and packed weights that begin anywhere."""
    small_cases = _few(small.integer_cases)(scope)
    offset = replace(small_cases[0], name="offset weights", call=Call(weights="offset"))
    return [*small_cases, *suites.in_fragments([offset])]


def _guarded(device_type: str) -> list[Case]:
    """Integer cases in either layout."""
    cases = small.integer_cases(device_type)
    return [*cases, *suites.in_fragments(cases)]


def _operators(scope: Scope) -> list[Case]:
    """The case of the registered operators."""
    return [kernels.operator_case(scope.device_type)]


CHECKS: tuple[Check, ...] = (
    Check(
        "integer, further",
        "Small integers once more: on weights that are decoded already, on an N that no tile divides, and with gates "
        "beyond fp16's range.",
        Asked.OWN, named(kernels.own_integer_cases), asking.once, equal,
    ),
    Check(
        "fragments",
        "Small integers on packed weights in the order in which tensor cores take them, to which the loaders bring "
        "them on Hopper: every code under every scale byte, every option.",
        Asked.OWN, kernels.fragment_cases, asking.once, equal,
    ),
    Check(
        "decode in 16 bits",
        "Every code under every scale byte once more, in bf16 and fp16 under Triton's interpreter, whose fp32 is exact "
        "enough for what is exact.",
        Asked.INTERPRETED, named(kernels.narrow_decode_cases), asking.once, equal,
    ),
    Check(
        "tables",
        "The kernels' tables of tiles and rows, entry by entry: products hide a schedule's mistakes where two cancel, "
        "where a tile is computed twice, or where no case has as many tiles as a real batch.",
        Asked.OWN, lambda scope: table_cases(), asking_kernels.for_tables, right_tables,
    ),
    Check(
        "addresses",
        "Every load and store lies inside the tensors of its launch, at a multiple of its size, and no two programs "
        "write the same element: a mask that is too wide often changes no result, and faults one day.",
        Asked.INTERPRETED, _watched, asking_kernels.with_watched_memory, inside_tensors,
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
        "finite too; in memory and with indices that are watched as elsewhere.",
        Asked.OWN, activation_cases, asking_activation.with_its_gradient, right_activation,
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
        Asked.OWN, _small(kernels.remote_cases), asking.once, equal,
    ),
    Check(
        "out of range",
        "Positions and offsets out of range that nobody checked, as on a GPU: rows with good ones stay right, and "
        "nothing is read or written outside a tensor.",
        Asked.OWN, _small(kernels.unordered_cases), asking_kernels.with_indices_out_of_range,
        right_and_unwritten,
    ),
    Check(
        "index width",
        "Products of two sizes are 64 bits wide: a 32-bit offset is right until a tensor has 2^31 elements, which no "
        "test has time for, so the arithmetic itself is watched.",
        Asked.INTERPRETED, _small(kernels.index_cases), asking_kernels.with_watched_indices, wide_indices,
    ),
    Check(
        "index width, decoder",
        "The same for the decoder.",
        Asked.INTERPRETED, _small(kernels.stack_cases), asking_kernels.with_watched_indices_of_the_decoder,
        wide_indices,
    ),
    Check(
        "guard pages",
        "Every tensor ends right before addresses that nothing is mapped to: a load behind its end, whose value a mask "
        "would drop, faults. A fault ends the use of the GPU in its process, so this comes last.",
        Asked.OWN_ON_GPU, _small(_guarded), asking_kernels.at_guard_pages, equal,
    ),
)  # fmt: skip
