"""What the backward pass reads is saved as autograd saves tensors: golden layer, kernels, and their operators alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mxref
from mxref import MXWeights, Problem, kernels
from mxref.kernels.layer.library import scattermoe_lora
from mxref.weights import MXLayout


def operator(
    inputs: Tensor, expert_weights: Tensor | MXWeights, k: int, *, use_fused_dX: bool = False, **rest: Any
) -> Tensor:
    """The registered operator with the layer's arguments."""
    W = expert_weights
    weight, scales = (W.packed, W.scales) if isinstance(W, MXWeights) else (W, None)
    out: Tensor = scattermoe_lora(inputs, weight, scales, k, *rest.values(), use_fused_dX, False)[0]
    return out


LAYERS = {"golden": mxref.parallel_linear_lora, "kernels": kernels.parallel_linear_lora, "operator": operator}
Layer = Callable[..., Tensor]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return LAYERS[request.param]


def tensors(problem: Problem) -> dict[str, Tensor]:
    """Every tensor of a call by name; packed weights are two."""
    found = {name: x for name, x in problem.arguments().items() if isinstance(x, Tensor)}
    W = problem.expert_weights
    return {**found, "packed": W.packed, "scales": W.scales} if isinstance(W, MXWeights) else found


def copied(problem: Problem) -> Problem:
    """The same call on memory of its own."""
    W = problem.expert_weights
    own = MXWeights(W.packed.clone(), W.scales.clone(), W.K, W.N) if isinstance(W, MXWeights) else W.clone()
    leaves = {
        name: x.detach().clone().requires_grad_(x.requires_grad)
        for name, x in problem.arguments().items()
        if isinstance(x, Tensor)
    }
    return replace(problem, **{**leaves, "expert_weights": own})


def with_dense_weights(drawn: Any) -> Any:
    W = mxref.decode_mxfp4(drawn.problem.expert_weights, torch.float32).mT.contiguous()
    return replace(drawn, problem=replace(drawn.problem, expert_weights=W))


ROUTING = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
READ = ("inputs", "lora_A", "lora_B", "gates", "packed", "scales", *ROUTING[1:])
UNREAD = ("sorted_expert_idxs", "expert_biases")  # by the kernels' backward


@pytest.mark.parametrize("name", [*READ, "expert_weights"])
def test_a_change_between_the_passes_raises(sample: Any, layer: Layer, name: str) -> None:
    drawn = sample(gates=True, bias=True)
    drawn = with_dense_weights(drawn) if name == "expert_weights" else drawn
    drawn = replace(drawn, problem=copied(drawn.problem))
    y = layer(**drawn.problem.arguments())
    with torch.no_grad():
        tensors(drawn.problem)[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(drawn.grad_out)


@pytest.mark.parametrize("name", [*READ, *UNREAD, "expert_weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_raises_or_the_forwards_values_count(sample: Any, layer: Layer, name: str, dtype: torch.dtype) -> None:
    """Where the operand was cast, or laid out again, the copy is what the backward pass reads."""
    drawn = sample(gates=True, bias=True)
    drawn = with_dense_weights(drawn) if name == "expert_weights" else drawn
    problem = copied(drawn.problem)
    casts = {"inputs": problem.inputs.detach().to(dtype).requires_grad_()}
    if name == "expert_weights":
        casts[name] = problem.expert_weights.to(dtype)
    drawn = replace(drawn, problem=replace(problem, **casts))
    expected = replace(drawn, problem=copied(drawn.problem)).run(layer)
    y = layer(**drawn.problem.arguments())
    with torch.no_grad():
        tensors(drawn.problem)[name].add_(1)
    got = None
    with suppress(RuntimeError):
        got = torch.autograd.grad(y, list(drawn.leaves().values()), drawn.grad_out.to(y.dtype))
    assert got is None or all(torch.equal(a, expected[leaf]) for leaf, a in zip(drawn.leaves(), got, strict=True))


@pytest.mark.parametrize("name", UNREAD)
def test_what_no_gradient_reads_may_change(sample: Any, name: str) -> None:
    drawn = sample(gates=True, bias=True)
    drawn = replace(drawn, problem=copied(drawn.problem))
    y = kernels.parallel_linear_lora(**drawn.problem.arguments())
    with torch.no_grad():
        tensors(drawn.problem)[name].add_(1)
    y.backward(drawn.grad_out)


def test_inputs_may_change_where_only_they_need_a_gradient(sample: Any) -> None:
    """As with torch's own linear layer: dX reads W, A and B, not x."""
    drawn = sample()
    problem = replace(drawn.problem, lora_A=drawn.problem.lora_A.detach(), lora_B=drawn.problem.lora_B.detach())
    x = problem.inputs.detach().clone().requires_grad_()
    rows = x * 1
    y = kernels.parallel_linear_lora(**replace(problem, inputs=rows).arguments())
    with torch.no_grad():
        rows.add_(1)
    (dx,) = torch.autograd.grad(y, x, drawn.grad_out)
    assert torch.equal(dx, drawn.run(mxref.parallel_linear_lora)["inputs"])


@pytest.mark.parametrize("dense", [False, True])
def test_hooks_see_what_is_read(sample: Any, layer: Layer, dense: bool) -> None:
    drawn = sample(gates=True, bias=True)
    drawn = with_dense_weights(drawn) if dense else drawn
    seen: set[int] = set()
    with saved_tensors_hooks(lambda x: (seen.add(x.untyped_storage().data_ptr()), x)[1], lambda x: x):
        layer(**drawn.problem.arguments())
    named = tensors(drawn.problem)
    names = {*READ, "expert_weights"} & named.keys()
    assert {name for name in names if named[name].untyped_storage().data_ptr() not in seen} == set()


def test_tensors_that_hooks_replace_are_the_ones_read(sample: Any, layer: Layer) -> None:
    drawn = sample(gates=True, bias=True, routing="sentinels")
    expected = drawn.run(layer)
    with save_on_cpu():
        got = drawn.run(layer)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_second_backward_over_a_retained_graph(sample: Any, layer: Layer) -> None:
    drawn = sample(gates=True, bias=True, routing="sentinels")
    leaves = list(drawn.leaves().values())
    y = layer(**drawn.problem.arguments())
    first = torch.autograd.grad(y, leaves, drawn.grad_out, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, leaves, drawn.grad_out)))


def test_each_call_has_its_own_gradients(sample: Any, layer: Layer) -> None:
    """Forward, forward, backward, backward, of one shape."""
    drawn = [sample(seed, gates=True, bias=True, routing="sentinels") for seed in (0, 1)]
    expected = [one.run(layer) for one in drawn]
    outputs = [layer(**one.problem.arguments()) for one in drawn]
    for one, y, wanted in zip(drawn, outputs, expected, strict=True):
        assert torch.equal(y, wanted["y"])
        got = torch.autograd.grad(y, list(one.leaves().values()), one.grad_out)
        assert all(torch.equal(a, wanted[name]) for name, a in zip(one.leaves(), got, strict=True))


def test_a_checkpointed_region_lets_everything_go(sample: Any, layer: Layer) -> None:
    drawn = sample(gates=True, bias=True)
    frozen = replace(drawn.problem, **{name: x.detach() for name, x in drawn.leaves().items()})
    made: dict[str, weakref.ref[Tensor]] = {}

    def region(x: Tensor) -> Tensor:
        own = copied(frozen)
        made.update((name, weakref.ref(t)) for name, t in tensors(own).items())
        return layer(**replace(own, inputs=x).arguments())

    y: Tensor = checkpoint(region, drawn.problem.inputs, use_reentrant=False)
    gc.collect()
    assert {name for name, t in made.items() if t() is not None} == set()
    (dx,) = torch.autograd.grad(y, drawn.problem.inputs, drawn.grad_out)
    assert torch.equal(dx, drawn.run(layer)["inputs"])


def test_recycled_weights_under_checkpointing(sample: Any, layer: Layer) -> None:
    """Two layers stream their weights through one buffer, which the backward pass's recomputation fills again."""
    drawn = [sample(seed, k=1, K=64, N=64) for seed in (0, 1)]
    slot = copied(drawn[0].problem).expert_weights

    def pair(x: Tensor, recycle: bool) -> Tensor:
        for one in drawn:

            def region(h: Tensor, problem: Problem = one.problem) -> Tensor:
                W = problem.expert_weights
                if recycle:
                    slot.packed.copy_(W.packed)
                    slot.scales.copy_(W.scales)
                    W = slot
                return layer(**replace(problem, inputs=h, expert_weights=W).arguments())

            x = checkpoint(region, x, use_reentrant=False)
        return x

    x = drawn[0].problem.inputs
    results = [torch.autograd.grad(pair(x, recycle).sum(), x)[0] for recycle in (False, True)]
    assert torch.equal(*results)


@pytest.mark.parametrize("layer", [mxref.parallel_linear_lora, kernels.parallel_linear_lora], ids=["golden", "kernels"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", list(MXLayout))
def test_another_layout_when_a_region_is_computed_again(
    sample: Any, layer: Layer, first: MXLayout, fused: bool
) -> None:
    """Weights that are repacked for good between the passes: their bytes are others, their gradients are not."""
    drawn = sample(gates=True, bias=True, K=64, N=64)
    plain = drawn.problem.expert_weights
    held = [plain.repack(first)]

    def region(x: Tensor) -> Tensor:
        problem = replace(drawn.problem, inputs=x, expert_weights=held[0])
        return layer(**problem.arguments(), use_fused_dX=fused)

    y: Tensor = checkpoint(region, drawn.problem.inputs, use_reentrant=False)
    held[0] = plain.repack(MXLayout.FRAGMENTS if first == MXLayout.FWD else MXLayout.FWD)
    (dx,) = torch.autograd.grad(y, drawn.problem.inputs, drawn.grad_out)
    assert torch.equal(dx, drawn.run(layer)["inputs"])
