"""The golden layer against exact rational arithmetic, gradcheck, and autograd of its own forward."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mxref import MXWeights, Problem, encode_mxfp4, flatten_sort_count, parallel_linear_lora
from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, backward, forward

Matrix = list[list[Fraction]]


def make_problem(
    *,
    E: int = 3,
    K: int = 32,
    N: int = 5,
    M: int = 4,
    k: int = 2,
    rank: int = 2,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    gates: bool = False,
    grouped_in: bool = False,
    grouped_out: bool = False,
    sentinels: bool = True,
    seed: int = 0,
) -> Problem:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    ids = torch.randint(-1 if sentinels else 0, E + 1 if sentinels else E, (M, k), generator=draw)
    return Problem(
        normal(M * k if grouped_in else M, K),
        encode_mxfp4(normal(E, N, K)),
        1 if grouped_in else k,
        *flatten_sort_count(ids, E),
        lora_A=normal(E * rank, K) if rank else None,
        lora_B=normal(N, E * rank) if rank else None,
        scaling=0.7,
        expert_biases=normal(E, N) if bias else None,
        gates=normal(M, k) if gates else None,
        grouped_in=grouped_in,
        grouped_out=grouped_out,
    )


FLAGS = [
    {"grouped_in": grouped_in, "grouped_out": grouped_out, "gates": gates}
    for grouped_in, grouped_out, gates in product((False, True), repeat=3)
    if not (grouped_out and gates)
]


def leaves(problem: Problem) -> tuple[Problem, dict[str, Tensor]]:
    """The same problem with its differentiable operands as fresh leaves."""
    names = ["inputs", "lora_A", "lora_B", "expert_biases", "gates"]
    fresh = {
        name: getattr(problem, name).detach().clone().requires_grad_()
        for name in names
        if getattr(problem, name) is not None
    }
    return replace(problem, **fresh), fresh


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_hand_written_backward_passes_gradcheck(flags: dict[str, bool]) -> None:
    problem, operands = leaves(make_problem(**flags))

    def layer(*values: Tensor) -> Tensor:
        call = replace(problem, **dict(zip(operands, values, strict=True)))
        return parallel_linear_lora(**call.arguments(), mode="exact")

    assert torch.autograd.gradcheck(layer, tuple(operands.values()))


def composed(problem: Problem) -> Tensor:
    """The layer from differentiable torch operations alone, row by row."""
    weights = problem.expert_weights
    assert isinstance(weights, MXWeights)
    rows: list[Tensor | None] = [None] * problem.P
    for row, e in enumerate(problem.sorted_expert_idxs.tolist()):
        position = int(problem.sorted_scattered_idxs[row])
        y = problem.inputs.new_zeros(problem.N)
        if e < problem.E:
            x = problem.inputs[row if problem.grouped_in else position // problem.k]
            y = x @ problem.expert_weight(e)
            if problem.lora_A is not None and problem.lora_B is not None:
                own = slice(e * problem.rank, (e + 1) * problem.rank)
                y = y + problem.scaling * (x @ problem.lora_A[own].T) @ problem.lora_B[:, own].T
            if problem.expert_biases is not None:
                y = y + problem.expert_biases[e]
            if problem.gates is not None:
                y = y * problem.gates.flatten()[position]
        rows[row if problem.grouped_out else position] = y
    out = torch.stack([row for row in rows if row is not None])
    return out if problem.gates is None else out.view(*problem.gates.shape, -1).sum(1)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize(("rank", "bias"), [(2, True), (0, False)])
def test_forward_and_backward_equal_autograd_of_torch_operations(flags: dict[str, bool], rank: int, bias: bool) -> None:
    problem = make_problem(rank=rank, bias=bias, **flags)
    ours, our_leaves = leaves(problem)
    theirs, their_leaves = leaves(problem)
    out, expected = parallel_linear_lora(**ours.arguments(), mode="exact"), composed(theirs)
    # Two fp64 evaluations of sums of at most 40 terms of size ~10: 40 · 2^-53 · 400 < 1e-11.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    grad_out = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out.backward(grad_out)
    expected.backward(grad_out)
    for name, leaf in our_leaves.items():
        torch.testing.assert_close(leaf.grad, their_leaves[name].grad, rtol=0, atol=1e-11, msg=lambda m, n=name: n + m)


def rational(x: Tensor) -> Matrix:
    return [[Fraction(v) for v in row] for row in x.double().tolist()]


def matmul(a: Matrix, b: Matrix) -> Matrix:
    return [[sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in zip(*b)] for row in a]  # noqa: B905


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a)]  # noqa: B905


def nearest(value: Fraction, precision: int) -> Fraction:
    """Round a rational to `precision` significant bits, ties to even, from the definition."""
    if value == 0:
        return value
    quantum = Fraction(1)
    while abs(value) >= quantum * 2**precision:
        quantum *= 2
    while abs(value) < quantum * 2 ** (precision - 1):
        quantum /= 2
    return round(value / quantum) * quantum


def rounded(a: Matrix) -> Matrix:
    return [[nearest(v, 8) for v in row] for row in a]


def plus(a: Matrix, s: Fraction, b: Matrix) -> Matrix:
    return [[x + s * y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_contract_mode_equals_rational_arithmetic_at_every_rounding_point(seed: int) -> None:
    problem = make_problem(E=2, N=3, M=3, k=2, dtype=torch.bfloat16, gates=True, sentinels=False, seed=seed)
    s = Fraction(problem.scaling)
    gates = [Fraction(g) for g in problem.gates.double().flatten().tolist()]  # type: ignore[union-attr]
    grad_out = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
    points = RoundingPoints.contract(torch.bfloat16)
    fwd = forward(problem, points)
    bwd = backward(problem, fwd, grad_out, points)

    out: Matrix = [[Fraction(0)] * problem.N for _ in range(3)]
    dx: Matrix = [[Fraction(0)] * problem.K for _ in range(3)]
    for e, start, end in problem.segments():
        positions = problem.sorted_scattered_idxs[start:end].tolist()
        own = slice(2 * e, 2 * e + 2)
        X = rational(problem.inputs[[p // 2 for p in positions]])
        W, A, B = (rational(m) for m in (problem.expert_weight(e), *problem.expert_lora(e)))
        bias = rational(problem.expert_biases[e : e + 1])[0]  # type: ignore[index]
        Z = rounded(matmul(X, transposed(A)))
        Y = rounded(plus(plus(matmul(X, W), s, matmul(Z, transposed(B))), Fraction(1), [bias] * len(X)))
        dOut = [rational(grad_out)[p // 2] for p in positions]
        dY = rounded([[gates[p] * v for v in row] for p, row in zip(positions, dOut, strict=True)])
        V = rounded(matmul(dY, B))
        D = rounded(plus(matmul(dY, transposed(W)), s, matmul(V, A)))
        dA = rounded([[s * v for v in row] for row in matmul(transposed(V), X)])
        dB = rounded([[s * v for v in row] for row in matmul(transposed(dY), Z)])
        dbias = rounded([[sum(column, Fraction(0)) for column in zip(*dY)]])  # noqa: B905
        assert rational(fwd.z.value[start:end]) == Z  # type: ignore[union-attr]
        assert rational(fwd.y.value[start:end]) == Y
        assert rational(bwd.dy.value[start:end]) == dY
        assert rational(bwd.v.value[start:end]) == V  # type: ignore[union-attr]
        assert rational(bwd.d.value[start:end]) == D
        assert rational(bwd.dA.value[own]) == dA  # type: ignore[union-attr]
        assert rational(bwd.dB.value[:, own]) == dB  # type: ignore[union-attr]
        assert rational(bwd.dbias.value[e : e + 1]) == dbias  # type: ignore[union-attr]
        for p, y, dout, d in zip(positions, Y, dOut, D, strict=True):
            out[p // 2] = [o + gates[p] * v for o, v in zip(out[p // 2], y, strict=True)]
            dx[p // 2] = [o + v for o, v in zip(dx[p // 2], d, strict=True)]
            dgate = nearest(sum((a * b for a, b in zip(y, dout, strict=True)), Fraction(0)), 8)
            assert Fraction(float(bwd.dgates.value.flatten()[p])) == dgate  # type: ignore[union-attr]
    assert rational(fwd.out.value) == rounded(out)
    assert rational(bwd.dx.value) == rounded(dx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_contract_mode_returns_activation_and_parameter_dtypes(dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, gates=True)
    assert problem.lora_A is not None
    problem, operands = leaves(replace(problem, lora_A=problem.lora_A.float()))
    out = parallel_linear_lora(**problem.arguments())
    out.sum().backward()
    assert out.dtype == dtype
    assert {name: leaf.grad.dtype for name, leaf in operands.items() if leaf.grad is not None} == {
        "inputs": dtype,
        "lora_A": torch.float32,
        "lora_B": dtype,
        "expert_biases": dtype,
        "gates": dtype,
    }


def test_rounding_points_change_what_they_name() -> None:
    problem = make_problem(dtype=torch.bfloat16, gates=True, N=64, K=64, M=16)
    contract = RoundingPoints.contract(torch.bfloat16)
    base = forward(problem, contract)
    for flag in ("lora_after_output", "gates_before_output", "scaling_in_B"):
        other = forward(problem, replace(contract, **{flag: True}))
        assert not torch.equal(other.out.value, base.out.value), flag
    unrounded = forward(problem, replace(contract, z=False))
    assert unrounded.z is not None
    assert torch.equal(unrounded.z.value, unrounded.z.exact)
    assert not torch.equal(unrounded.y.exact, base.y.exact)


def test_sentinel_rows_are_skipped_not_multiplied() -> None:
    problem = make_problem(M=3, k=2, gates=True)
    ids = torch.tensor([[0, -1], [5, 2], [-1, 9]])
    routing = flatten_sort_count(ids, 3)
    gates = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [torch.nan, torch.nan]], dtype=torch.float64)
    call, operands = leaves(replace(problem, **_routing(routing), gates=gates))
    out = parallel_linear_lora(**call.arguments(), mode="exact")
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert (out[2] == 0).all()
    for name, leaf in operands.items():
        assert torch.isfinite(leaf.grad).all(), name  # type: ignore[arg-type]
    assert operands["gates"].grad.flatten()[[1, 2, 4, 5]].eq(0).all()  # type: ignore[union-attr]
    assert (operands["inputs"].grad[2] == 0).all()  # type: ignore[index]


def test_no_tokens_and_experts_without_rows_give_zeros() -> None:
    empty, operands = leaves(make_problem(M=0))
    out = parallel_linear_lora(**empty.arguments())
    assert out.shape == (0, 5)
    out.sum().backward()
    for leaf in operands.values():
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
    problem = make_problem(M=3, k=1)
    routing = flatten_sort_count(torch.ones(3, 1, dtype=torch.int64), 3)
    call, operands = leaves(replace(problem, **_routing(routing)))
    parallel_linear_lora(**call.arguments()).sum().backward()
    assert (operands["lora_A"].grad[[0, 1, 4, 5]] == 0).all()  # type: ignore[index]
    assert (operands["expert_biases"].grad[[0, 2]] == 0).all()  # type: ignore[index]


def test_second_backward_over_a_retained_graph_gives_the_same_gradients() -> None:
    problem, operands = leaves(make_problem(dtype=torch.bfloat16, gates=True))
    out = parallel_linear_lora(**problem.arguments())
    first = torch.autograd.grad(out.sum(), list(operands.values()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(operands.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operands_narrower_than_the_parameters_are_rounded_before_use() -> None:
    problem = make_problem(dtype=torch.bfloat16)
    assert problem.lora_A is not None
    assert problem.lora_B is not None
    wide = replace(problem, lora_A=problem.lora_A.float() * (1 + 2**-12), lora_B=problem.lora_B.float())
    A, _ = wide.expert_lora(0)
    assert torch.equal(A, round_to(A, torch.bfloat16))
    assert torch.equal(parallel_linear_lora(**wide.arguments()), parallel_linear_lora(**problem.arguments()))


def _routing(sorted_rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets"), sorted_rows, strict=True))


def dense(problem: Problem) -> Tensor:
    return torch.stack([problem.expert_weight(e) for e in range(problem.E)]).to(problem.dtype)


def test_dense_weights_give_the_packed_weights_result() -> None:
    problem = make_problem(dtype=torch.bfloat16)
    twin = replace(problem, expert_weights=dense(problem))
    assert torch.equal(parallel_linear_lora(**twin.arguments()), parallel_linear_lora(**problem.arguments()))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"inputs": torch.zeros(4, 32, dtype=torch.int8)}, TypeError, "inputs is torch.int8"),
    ({"inputs": torch.zeros(4)}, ValueError, "inputs has shape"),
    ({"inputs": torch.zeros(4, 64)}, ValueError, "inputs has 64 columns"),
    ({"k": 0}, ValueError, "k is 0"),
    ({"k": 2.0}, TypeError, "k is 2.0"),
    ({"k": 3}, ValueError, "k is 3 with 4 input rows"),
    ({"grouped_in": True}, ValueError, "grouped_in"),
    ({"expert_weights": torch.zeros(3, 32, 5, dtype=torch.float16)}, TypeError, "activation dtype"),
    ({"expert_weights": torch.zeros(3, 32, 5, dtype=torch.float64).requires_grad_()}, ValueError, "frozen"),
    ({"expert_weights": torch.zeros(3, 32, 5, dtype=torch.uint8)}, TypeError, "MXWeights"),
    ({"expert_offsets": torch.zeros(4, dtype=torch.int64)}, ValueError, "expert_offsets has 4 entries"),
    ({"sorted_expert_idxs": torch.zeros(8)}, TypeError, "sorted_expert_idxs is torch.float32"),
    ({"sorted_scattered_idxs": torch.zeros(7, dtype=torch.int64)}, ValueError, "sorted_scattered_idxs has 7"),
    ({"sorted_scattered_idxs": torch.full((8,), 9)}, ValueError, "not a permutation"),
    ({"sorted_expert_idxs": torch.arange(7, -1, -1)}, ValueError, "not ascending"),
    ({"expert_offsets": torch.tensor([0, 0, 0])}, ValueError, "inclusive cumulative"),
    ({"scaling": float("nan")}, ValueError, "scaling is nan"),
    ({"scaling": "2"}, TypeError, "scaling is '2'"),
    ({"lora_A": None}, ValueError, "lora_A is missing"),
    ({"lora_A": torch.zeros(7, 32)}, ValueError, "lora_A has shape"),
    ({"lora_B": torch.zeros(6, 5)}, ValueError, "lora_B has shape"),
    ({"lora_B": torch.zeros(5, 6, dtype=torch.int32)}, TypeError, "lora_B is torch.int32"),
    ({"expert_biases": torch.zeros(3, 4)}, ValueError, "expert_biases has shape"),
    ({"gates": torch.zeros(4, 2), "grouped_out": True}, ValueError, "grouped_out"),
    ({"gates": torch.zeros(4, 3)}, ValueError, "gates has shape"),
    ({"inputs": torch.zeros(4, 32, device="meta", dtype=torch.float64)}, ValueError, "lies on"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_wrong_operands_are_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = replace(make_problem(), **change)
    with pytest.raises(error, match=message):
        parallel_linear_lora(**problem.arguments())


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'fast'"):
        parallel_linear_lora(**make_problem().arguments(), mode="fast")
