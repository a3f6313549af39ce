"""What the layer promises beyond its values: same bits again, frozen operands, only needed gradients, no sync."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mxref
from mxref import MXWeights, kernels
from mxref.kernels import Config, ScatterMoELoRA
from mxref.kernels.device.configs import TABLE, config_for, reachable_configs
from mxref.kernels.device.launch import recording

FUSED = {"use_fused_dX": True, "use_fused_gather": True}


def test_retained_graph_and_repeated_call(sample: Any) -> None:
    drawn = sample(routing="sentinels", gates=True, bias=True)
    leaves = list(drawn.leaves().values())
    y = kernels.parallel_linear_lora(**drawn.problem.arguments(), **FUSED)
    first = torch.autograd.grad(y, leaves, drawn.grad_out, retain_graph=True)
    second = torch.autograd.grad(y, leaves, drawn.grad_out)
    again = drawn.run(kernels.parallel_linear_lora, **FUSED)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, list(again.values())[1:]))
    assert torch.equal(y, again["y"])


def test_operands_are_not_changed(sample: Any) -> None:
    drawn = sample(routing="sentinels", gates=True, bias=True)
    weights = drawn.problem.expert_weights
    operands = [x for x in drawn.problem.arguments().values() if isinstance(x, torch.Tensor)]
    operands += [weights.packed, weights.scales, drawn.grad_out]
    before = [x.clone() for x in operands]
    drawn.run(kernels.parallel_linear_lora)
    assert all(map(torch.equal, before, operands))


@pytest.mark.parametrize("needed", ["inputs", "lora_A", "lora_B", "expert_biases", "gates"])
def test_each_gradient_alone(sample: Any, needed: str) -> None:
    drawn = sample(gates=True, bias=True)
    expected = drawn.run(mxref.parallel_linear_lora)[needed]
    frozen = {name: x.detach() for name, x in drawn.leaves().items() if name != needed}
    y = kernels.parallel_linear_lora(**{**drawn.problem.arguments(), **frozen})
    (gradient,) = torch.autograd.grad(y, drawn.leaves()[needed], drawn.grad_out)
    assert torch.equal(gradient, expected)


def test_foreign_gates_and_rows_do_not_spread(sample: Any) -> None:
    """Whatever lies in a sentinel's gate, its slot is skipped."""
    drawn = sample(routing="sentinels", gates=True, bias=True)
    p = drawn.problem
    expected = drawn.run(kernels.parallel_linear_lora)
    foreign = p.sorted_scattered_idxs[p.sorted_expert_idxs >= p.E]
    gates = p.gates.detach().clone()
    gates.view(-1)[foreign] = torch.nan
    got = replace(drawn, problem=replace(p, gates=gates.requires_grad_())).run(kernels.parallel_linear_lora)
    assert foreign.numel()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (got["gates"].view(-1)[foreign] == 0).all()


def test_nan_blocks_stay_in_their_columns(sample: Any) -> None:
    drawn = sample(K=96, N=64)
    weights = drawn.problem.expert_weights
    scales = weights.scales.clone()
    scales[:, 5, 1] = 255
    poisoned = MXWeights(weights.packed, scales, weights.K, weights.N)
    got = drawn.run(kernels.parallel_linear_lora, expert_weights=poisoned, **FUSED)
    clean = drawn.run(kernels.parallel_linear_lora, **FUSED)
    columns = torch.arange(64, device=got["y"].device) != 5
    assert got["y"][:, 5].isnan().all()
    assert torch.equal(got["y"][:, columns], clean["y"][:, columns])
    assert got["inputs"][:, 32:64].isnan().all()
    assert torch.equal(got["inputs"][:, :32], clean["inputs"][:, :32])


@pytest.mark.gpu
def test_packed_and_dense_agree_in_every_bit(device: torch.device) -> None:
    """The same tiles and the same chain: only the way a weight arrives differs."""
    torch.manual_seed(0)
    weights = mxref.encode_mxfp4(torch.randn(3, 224, 160)).to(device)
    routing = mxref.flatten_sort_count(torch.randint(0, 3, (40, 2)).to(device), 3)
    x, A, B = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
        for shape in ((40, 160), (15, 160), (224, 15))
    )
    results = []
    for w, fused in ((weights, True), (weights, False), (mxref.decode_mxfp4(weights, torch.bfloat16).mT, False)):
        y = kernels.parallel_linear_lora(x, w, 2, *routing, A, B, 0.7, use_fused_dX=fused)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, A, B))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.gpu
def test_rows_do_not_depend_on_the_batch(device: torch.device) -> None:
    """Tensor cores compute a tile's rows apart; the interpreter's BLAS does not promise that."""
    torch.manual_seed(0)
    config = Config(16, 64, 32)
    weights = mxref.encode_mxfp4(torch.randn(3, 96, 160)).to(device)
    x = torch.randn(40, 160, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, 3, (40, 2), device=device)
    A, B = torch.randn(12, 160, device=device), torch.randn(96, 12, device=device)

    def layer(tokens: slice) -> torch.Tensor:
        routing = mxref.flatten_sort_count(ids[tokens], 3)
        y = kernels.parallel_linear_lora(x[tokens], weights, 2, *routing, A, B, 0.3, config=config)
        return y.unflatten(0, (-1, 2))

    assert torch.equal(layer(slice(0, 40))[7:12], layer(slice(7, 12)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_their_parameters_dtype(sample: Any, dtype: torch.dtype) -> None:
    drawn = sample(gates=True, bias=True)
    x = drawn.problem.inputs.detach().to(dtype).requires_grad_()
    got = replace(drawn, problem=replace(drawn.problem, inputs=x)).run(kernels.parallel_linear_lora)
    assert got["inputs"].dtype == dtype
    assert {got[name].dtype for name in ("lora_A", "lora_B", "expert_biases", "gates")} == {torch.float32}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_host_code_reads_no_device_value(architecture: str) -> None:
    """On `meta` tensors there is no value to read: a synchronisation in forward or backward would raise."""
    E, K, N, M, k, r = 4, 64, 96, 8, 2, 3
    weights = MXWeights(*(torch.empty(E, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32)), K, N)
    ids = torch.empty(M * k, dtype=torch.int64, device="meta")
    x, A, B = (torch.empty(s, device="meta", requires_grad=True) for s in ((M, K), (E * r, K), (N, E * r)))
    with recording(architecture) as recorder:
        kernels.parallel_linear_lora(x, weights, k, ids, ids, ids[:E], A, B).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    names = [launch.kernel.fn.__name__ for launch in recorder.launches]
    assert names.count("grouped_matmul_kernel") == 4, "Z, Y, V and D, each once"


@pytest.mark.parametrize("architecture", TABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_dispatched_config_is_enumerated_and_fits(architecture: str, dtype: torch.dtype) -> None:
    reachable = reachable_configs(architecture, dtype)
    for rows in (0, 1, 64, 65, 500, 10_000):
        assert config_for(architecture, rows, 4, dtype) in reachable
    for config in reachable:
        config.check_fits(architecture, dtype)


def test_errors_name_the_argument(sample: Any) -> None:
    drawn = sample()
    arguments = drawn.problem.arguments()

    def call(**changed: Any) -> None:
        kernels.parallel_linear_lora(**{**arguments, **changed})

    dense = torch.zeros(3, 96, 160, device=drawn.problem.device)
    with pytest.raises(ValueError, match="expert_weights requires grad"):
        call(expert_weights=dense.clone().requires_grad_())
    with pytest.raises(ValueError, match="expert_weights requires grad"):
        ScatterMoELoRA.apply(*{**arguments, "expert_weights": dense.requires_grad_()}.values(), False, False)
    with pytest.raises(TypeError, match=r"inputs is torch\.float64"):
        call(inputs=drawn.problem.inputs.double())
    with pytest.raises(ValueError, match="lora_A has rank 129"):
        call(
            lora_A=torch.zeros(3 * 129, 96, device=dense.device), lora_B=torch.zeros(160, 3 * 129, device=dense.device)
        )
    with pytest.raises(TypeError, match="config is tuple"):
        call(config=(16, 32, 32))
    with pytest.raises(ValueError, match=r"config\.BLOCK_M is 24"):
        Config(24, 32, 32)
    with pytest.raises(ValueError, match=r"config\.num_stages is 0"):
        Config(16, 32, 32, num_stages=0)
    with pytest.raises(ValueError, match="needs 1572864 bytes of shared memory"):
        Config(256, 256, 256, num_stages=6).check_fits("sm_90", torch.bfloat16)
    with pytest.raises(ValueError, match="sorted_scattered_idxs"):
        call(sorted_scattered_idxs=drawn.problem.sorted_scattered_idxs + 1, validate=True)
