"""What a legal call is, and what it leaves behind: tests of any layer, against plain fp64 PyTorch.

A room's test file derives a class from `LegalCalls` and names its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from samples import Sample, Spec, draw, reference
from torch import Tensor

from mxref import MXWeights, decode_mxfp4, flatten_sort_count
from mxref.formats import E8M0_NAN

SMALL = Spec(E=3, K=64, N=40, M=6, k=2, bias=True)
ALL = slice(None)
ROUTING = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value.to(got[name].dtype)), name


def change(sample: Sample, **operands: Any) -> Sample:
    return replace(sample, problem=replace(sample.problem, **operands))


def rearranged(x: Tensor, values: Tensor) -> Tensor:
    """`values`, in whatever strides, as the operand that replaces x."""
    return values.detach().requires_grad_(x.requires_grad)


def _offset(x: Tensor) -> Tensor:
    return torch.cat((x.new_ones(3), x.flatten()))[3:].view(x.shape)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "sliced rows": lambda x: x.repeat_interleave(3, 0)[::3],
    "offset": _offset,
    "expanded": lambda x: x[:1].expand_as(x),
    "one number": lambda x: x.flatten()[1].expand(x.shape),
}
INDEX_STRIDES = {name: STRIDES[name] for name in ("sliced", "offset")}
OPERANDS = ("inputs", "lora_A", "lora_B", "expert_biases", "gates", "expert_weights", "grad_out", "ungated grad_out")


_I32, _I64 = torch.int32, torch.int64
CALLS: dict[str, Callable[[torch.device], Sample]] = {
    "no tokens": lambda d: draw(replace(SMALL, M=0), d),
    "no tokens, gates": lambda d: draw(replace(SMALL, M=0, gates=True), d),
    "one of everything": lambda d: draw(replace(SMALL, E=1, K=32, N=1, M=1, k=1, rank=1, gates=True), d),
    "hundreds of experts": lambda d: draw(replace(SMALL, E=300, K=32, N=8, rank=1), d),
    **{
        f"k = {k}": lambda d, k=k: draw(replace(SMALL, k=k, M=3, gates=True, routing="sentinels"), d)
        for k in range(1, 9)
    },
    "an expert twice in a token": lambda d: routed(d, [[1, 1, 0], [2, 2, 2]], gates=True),
    "positions shuffled within an expert": lambda d: shuffled(draw(replace(SMALL, M=9, gates=True), d)),
    "positions shuffled, without gates": lambda d: shuffled(draw(replace(SMALL, M=9), d)),
    "scaling is negative": lambda d: change(draw(SMALL, d), scaling=-0.5),
    "scaling is zero": lambda d: change(draw(SMALL, d), scaling=0),
    "gates are negative or zero": lambda d: signed_gates(draw(replace(SMALL, gates=True), d)),
    "B is zero": lambda d: zero_B(draw(SMALL, d)),
    "sentinels −1, E and far above": lambda d: routed(d, [[-1, 0], [3, 1], [2**40, -(2**40)], [2, 3]], gates=True),
    "all are sentinels": lambda d: routed(d, [[-1, 3], [4, -5]]),
    "all are sentinels, gates": lambda d: routed(d, [[-1, 3], [4, -5]], gates=True),
    "any id ≥ E marks a sentinel": lambda d: sentinel_ids(draw(replace(SMALL, routing="sentinels", gates=True), d)),
    "tokens of other ranks, grouped": lambda d: draw(
        replace(SMALL, routing="sentinels", grouped_in=True, grouped_out=True), d
    ),
    **{
        f"indices {'/'.join(names)}": lambda d, kinds=kinds: indexed(draw(replace(SMALL, gates=True), d), kinds)
        for kinds in ((_I32, _I32, _I32), (_I32, _I64, _I64), (_I64, _I32, _I64), (_I64, _I64, _I32))
        if (names := [str(kind).removeprefix("torch.") for kind in kinds])
    },
}


def routed(device: torch.device, ids: list[list[int]], gates: bool = False) -> Sample:
    """A call whose router chose these experts; the sample's own routing is given away."""
    chosen = torch.tensor(ids, device=device)
    drawn = draw(replace(SMALL, M=chosen.shape[0], k=chosen.shape[1], gates=gates), device)
    return change(drawn, **dict(zip(ROUTING, flatten_sort_count(chosen, SMALL.E), strict=True)))


def shuffled(sample: Sample) -> Sample:
    """Each expert's rows in another order."""
    order = [torch.arange(start, end).flip(0) for _, start, end in sample.problem.segments()]
    positions = sample.problem.sorted_scattered_idxs
    return change(sample, sorted_scattered_idxs=positions[torch.cat(order).to(positions.device)])


def signed_gates(sample: Sample) -> Sample:
    gates = (
        torch.arange(sample.problem.P, device=sample.problem.device)
        .remainder(3)
        .sub(1)
        .float()
        .view_as(sample.problem.gates)
    )
    return change(sample, gates=gates.detach().requires_grad_())


def zero_B(sample: Sample) -> Sample:
    return change(sample, lora_B=torch.zeros_like(sample.problem.lora_B).requires_grad_())


def sentinel_ids(sample: Sample) -> Sample:
    ids = sample.problem.sorted_expert_idxs.clone()
    foreign = ids >= sample.problem.E
    assert foreign.sum() > 1
    ids[foreign] = torch.linspace(sample.problem.E, 2**40, int(foreign.sum()), dtype=torch.float64).to(ids)
    return change(sample, sorted_expert_idxs=ids)


def indexed(sample: Sample, kinds: tuple[torch.dtype, ...]) -> Sample:
    return change(sample, **{n: getattr(sample.problem, n).to(kind) for n, kind in zip(ROUTING, kinds, strict=True)})


LIVE = [[0, 1], [2, -1], [1, 2], [0, 0], [3, -1]]
"""Experts of the calls below: token 0 has experts 0 and 1; expert 1 serves tokens 0 and 2; token 4 is all sentinels."""

POISONED: dict[str, tuple[tuple[int, ...], dict[str, tuple[Any, ...]]]] = {
    # operand: place of a number that is not finite, and all that it reaches (rank 3: expert 1 owns rows 3..5 of A)
    "inputs": ((0, 5), {"y": (0,), "gates": (0,), "lora_A": (slice(6), 5), "lora_B": (ALL, slice(6))}),
    "grad_out": (
        (0, 7),
        {
            "inputs": (0,),
            "gates": (0,),
            "lora_A": (slice(6),),
            "lora_B": (7, slice(6)),
            "expert_biases": (slice(2), 7),
        },
    ),
    "gates": (
        (0, 1),
        {"y": (0,), "inputs": (0,), "lora_A": (slice(3, 6),), "lora_B": (ALL, slice(3, 6)), "expert_biases": (1,)},
    ),
    "expert_weights": ((1, 5, 7), {"y": ([0, 2], 7), "inputs": ([0, 2], 5), "gates": ([0, 2], [1, 0])}),
    "lora_A": (
        (4, 5),
        {"y": ([0, 2],), "inputs": ([0, 2], 5), "gates": ([0, 2], [1, 0]), "lora_B": (ALL, 4)},
    ),
    "lora_B": ((7, 4), {"y": ([0, 2], 7), "inputs": ([0, 2],), "gates": ([0, 2], [1, 0]), "lora_A": (4,)}),
    "scales": ((1, 7, 0), {"y": ([0, 2], 7), "inputs": ([0, 2], slice(32)), "gates": ([0, 2], [1, 0])}),
}


def with_number(sample: Sample, operand: str, place: tuple[int, ...], value: float) -> Sample:
    """The call with one number replaced; in `scales` by the byte that is NaN, in `expert_weights` in dense ones."""
    W = sample.problem.expert_weights
    if operand == "scales":
        scales = W.scales.clone()
        scales[place] = E8M0_NAN
        return change(sample, expert_weights=MXWeights(W.packed, scales, W.K, W.N))
    dense = decode_mxfp4(W, torch.float32).mT.contiguous()
    source = {"grad_out": sample.grad_out, "expert_weights": dense}.get(operand, getattr(sample.problem, operand, None))
    x = source.detach().clone()
    x[place] = value
    x.requires_grad_(source.requires_grad)
    return replace(sample, grad_out=x) if operand == "grad_out" else change(sample, **{operand: x})


def global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "random numbers": torch.get_rng_state().tolist(),
        "numpy": np.geterr(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fp32 precision": torch.get_float32_matmul_precision(),
        "TF32": torch.backends.cuda.matmul.allow_tf32,
    }


class LegalCalls:
    """Tests of `layer`."""

    layer: ClassVar[Callable[..., Tensor]]

    @pytest.fixture(autouse=True)
    def nothing_global_changes(self) -> Iterator[None]:
        before = global_state()
        yield
        assert global_state() == before

    @pytest.mark.parametrize("call", CALLS)
    def test_calls(self, device: torch.device, call: str) -> None:
        drawn = CALLS[call](device)
        assert_same(drawn.run(self.layer), reference(drawn))

    @pytest.mark.parametrize("strides", STRIDES)
    @pytest.mark.parametrize("name", OPERANDS)
    def test_strides(self, device: torch.device, name: str, strides: str) -> None:
        drawn = draw(replace(SMALL, gates=name != "ungated grad_out", routing="sentinels"), device)
        if name == "expert_weights":
            W = decode_mxfp4(drawn.problem.expert_weights, torch.float32).mT.contiguous()
            drawn = change(drawn, expert_weights=STRIDES[strides](W))
        elif name.endswith("grad_out"):
            drawn = replace(drawn, grad_out=STRIDES[strides](drawn.grad_out))
        else:
            x = getattr(drawn.problem, name)
            drawn = change(drawn, **{name: rearranged(x, STRIDES[strides](x))})
        assert_same(drawn.run(self.layer), reference(drawn))

    @pytest.mark.parametrize("strides", INDEX_STRIDES)
    @pytest.mark.parametrize("name", ROUTING)
    def test_strides_of_indices(self, device: torch.device, name: str, strides: str) -> None:
        drawn = draw(replace(SMALL, gates=True), device)
        drawn = change(drawn, **{name: INDEX_STRIDES[strides](getattr(drawn.problem, name))})
        assert_same(drawn.run(self.layer), reference(drawn))

    def test_every_subset_of_gradients(self, device: torch.device) -> None:
        drawn = draw(replace(SMALL, gates=True, routing="sentinels", M=4), device)
        expected, leaves = reference(drawn), drawn.leaves()
        for needed in product((False, True), repeat=len(leaves)):
            frozen = {n: x.detach() for (n, x), need in zip(leaves.items(), needed, strict=True) if not need}
            y = self.layer(**replace(drawn.problem, **frozen).arguments())
            assert y.requires_grad == any(needed)
            names = [name for name in leaves if name not in frozen]
            found = torch.autograd.grad(y, [leaves[n] for n in names], drawn.grad_out.to(y.dtype)) if names else ()
            assert_same(dict(zip(names, found, strict=True)), {name: expected[name] for name in names})

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, device: torch.device, mode: Callable[[], Any]) -> None:
        drawn = draw(replace(SMALL, gates=True), device)
        with mode():
            y = self.layer(**drawn.problem.arguments())
        assert not y.requires_grad
        assert torch.equal(y, reference(drawn)["y"].to(y.dtype))

    def test_autocast_is_ignored(self, device: torch.device) -> None:
        drawn = draw(replace(SMALL, gates=True), device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            got = drawn.run(self.layer)
        assert got["y"].dtype == torch.float32
        assert_same(got, reference(drawn))

    @pytest.mark.parametrize("grouped", [False, True])
    def test_operands_are_not_changed_and_outputs_are_fresh(self, device: torch.device, grouped: bool) -> None:
        flags = {"grouped_in": True, "grouped_out": True} if grouped else {"gates": True}
        drawn = draw(replace(SMALL, routing="sentinels", **flags), device)
        W = drawn.problem.expert_weights
        operands = [x for x in drawn.problem.arguments().values() if isinstance(x, Tensor)]
        operands += [W.packed, W.scales, drawn.grad_out]
        before = [(x.clone(), x._version) for x in operands]
        results = drawn.run(self.layer)
        for x, (values, version) in zip(operands, before, strict=True):
            assert torch.equal(x, values)
            assert x._version == version
        storages = [x.untyped_storage().data_ptr() for x in (*operands, *results.values())]
        assert len(set(storages)) == len(storages)

    @pytest.mark.parametrize("zero", [None, "scaling", "gates", "lora_B"])
    @pytest.mark.parametrize("operand", POISONED)
    def test_what_is_not_finite_goes_where_arithmetic_puts_it(
        self, device: torch.device, operand: str, zero: str | None
    ) -> None:
        """And a zero s, gate or B stops it nowhere."""
        drawn = routed(device, LIVE, gates=True)
        if zero == "scaling":
            drawn = change(drawn, scaling=0.0)
        elif zero is not None:
            drawn = change(drawn, **{zero: torch.zeros_like(getattr(drawn.problem, zero)).requires_grad_()})
        place, reached = POISONED[operand]
        for value in (torch.nan, torch.inf):
            for name, result in with_number(drawn, operand, place, value).run(self.layer).items():
                expected = torch.zeros_like(result, dtype=torch.bool)
                if name in reached:
                    expected[reached[name]] = True
                assert torch.equal(~result.isfinite(), expected), (name, value)

    @pytest.mark.parametrize(
        ("operand", "place"), [("inputs", (4, 5)), ("grad_out", (4, 7)), ("gates", (4, 0)), ("gates", (1, 1))]
    )
    def test_what_only_sentinels_read_reaches_nothing(
        self, device: torch.device, operand: str, place: tuple[int, ...]
    ) -> None:
        drawn = routed(device, LIVE, gates=True)
        expected = drawn.run(self.layer)
        for value in (torch.nan, torch.inf):
            assert_same(with_number(drawn, operand, place, value).run(self.layer), expected)

    @pytest.mark.parametrize("id", [-1, -(2**31)])
    def test_negative_sorted_ids_are_refused(self, device: torch.device, id: int) -> None:
        drawn = draw(SMALL, device)
        ids = drawn.problem.sorted_expert_idxs.clone()
        ids[0] = id
        with pytest.raises(ValueError, match="sorted_expert_idxs"):
            self.layer(**replace(drawn.problem, sorted_expert_idxs=ids).arguments(), validate=True)

    @pytest.mark.parametrize("name", ["packed", "scales"])
    def test_strided_bytes_are_refused(self, device: torch.device, name: str) -> None:
        W = draw(SMALL, device).problem.expert_weights
        given = {"packed": W.packed, "scales": W.scales}
        given[name] = given[name].repeat_interleave(2, 1)[:, ::2]
        with pytest.raises(ValueError, match=f"{name} has .* expected contiguous bytes"):
            MXWeights(given["packed"], given["scales"], W.K, W.N)
