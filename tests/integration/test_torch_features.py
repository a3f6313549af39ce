"""The layer under torch's own machinery: operators, the compiler, checkpointing, autocast, accumulation, strides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from moe_models import EXPERTS, HIDDEN, TOP_K, packed_experts, tiny_gpt_oss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mxref import encode_mxfp4, flatten_sort_count
from mxref.kernels.device.launch import PreparedLaunch
from mxref.kernels.layer.library import expert_linear, scattermoe_lora, scattermoe_lora_backward
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.peft import get_peft_model

E, K, N, M, R = 3, 64, 32, 5, 2
CPU = torch.device("cpu")


@pytest.fixture
def where() -> torch.device:
    """Torch's machinery is the same everywhere; the kernels under it are judged on a GPU by the gate."""
    return CPU


def operands(case: str, device: torch.device = CPU) -> tuple[Any, ...]:
    """Arguments of the operator: "plain", "all" (every optional operand), "dense" or "grouped"."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    w = encode_mxfp4(torch.randn(E, N, K, generator=generator)).to(device)
    order = flatten_sort_count(torch.randint(E, (M, TOP_K), generator=generator).to(device), E)
    if case == "plain":
        return leaf(M, K), w.packed, w.scales, TOP_K, *order, *(None, None, 1.0, None, None), *(False,) * 4
    lora = leaf(E * R, K), leaf(N, E * R), 0.5
    if case == "dense":
        return leaf(M, K), leaf(E, K, N).detach(), None, TOP_K, *order, *lora, None, None, *(False,) * 4
    if case == "grouped":
        return leaf(M * TOP_K, K), w.packed, w.scales, 1, *order, *lora, None, None, True, True, True, True
    bias, gates = leaf(E, N), leaf(M, TOP_K)
    return leaf(M, K), w.packed, w.scales, TOP_K, *order, *lora, bias, gates, False, False, True, True


@pytest.mark.parametrize("case", ["all", "dense"])
def test_opcheck_forward(case: str) -> None:
    results = torch.library.opcheck(scattermoe_lora, operands(case))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", ["all", "dense"])
def test_opcheck_backward(case: str) -> None:
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in operands(case)]
    grad = torch.ones(M if case == "all" else M * TOP_K, N)
    _, z, y = scattermoe_lora(*arguments)
    results = torch.library.opcheck(scattermoe_lora_backward, (grad, z, y, [True, True, True, False, True], *arguments))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", ["plain", "all", "dense", "grouped"])
def test_operator_has_the_eager_bits(case: str, where: torch.device) -> None:
    arguments = operands(case, where)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    results = []
    for layer in (lambda *args: scattermoe_lora(*args)[0], expert_linear):
        y = layer(*arguments)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["plain", "all", "dense", "grouped"])
def test_operator_does_the_eager_work(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels in the same order, forward and backward, but for tables: nothing is computed twice."""
    launched: list[str] = []
    launch = PreparedLaunch.__call__

    def counted(self: PreparedLaunch, *given: Any) -> None:
        launched.append(self.kernel.__name__)
        launch(self, *given)

    monkeypatch.setattr(PreparedLaunch, "__call__", counted)
    arguments = operands(case)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    work = []
    for layer in (expert_linear, lambda *args: scattermoe_lora(*args)[0]):
        launched.clear()
        y = layer(*arguments)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        work.append([name for name in launched if name != "tables_kernel"])
    assert len(work[0]) >= 2
    assert work[0] == work[1]


def routed(seed: int = 2, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, HIDDEN, generator=generator)
    index, gates = torch.randint(EXPERTS, (M, TOP_K), generator=generator), torch.rand(M, TOP_K, generator=generator)
    return x.to(device).requires_grad_(), index.to(device), gates.to(device)


def outcome(experts: PackedExperts, call: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> list[Tensor]:
    trained = [p for p in experts.parameters() if p.requires_grad]
    y = call(x, *rest)
    return [y, *torch.autograd.grad(y, (x, *trained), torch.ones_like(y))]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_compiles_without_a_graph_break(family: str, where: torch.device) -> None:
    experts = packed_experts(family).to(where)
    expected = outcome(experts, experts, *routed(device=where))
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    got = outcome(experts, compiled, *routed(device=where))
    assert len(got) == 6
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compiles_under_checkpointing_and_autocast() -> None:
    experts = packed_experts()

    def block(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = checkpoint(experts, *args, use_reentrant=False)
        return y

    expected = outcome(experts, block, *routed())
    torch._dynamo.reset()
    got = outcome(experts, torch.compile(block, fullgraph=True, backend="aot_eager"), *routed())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_whole_model_with_peft_compiles() -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=R, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(pack_experts(tiny_gpt_oss(), rank=0), config).base_model.model
    ids = torch.arange(6)[None]
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(ids, use_cache=False)
    assert explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)


def test_activation_checkpointing(where: torch.device) -> None:
    experts = packed_experts().to(where)
    expected = outcome(experts, experts, *routed(device=where))
    got = outcome(experts, lambda *args: checkpoint(experts, *args, use_reentrant=False), *routed(device=where))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradient_accumulation() -> None:
    """Two backward passes add up to the sum of their gradients, in the parameters' dtype."""
    experts = packed_experts()
    apart = [outcome(experts, experts, *routed(seed))[2:] for seed in (2, 3)]
    for seed in (2, 3):
        experts(*routed(seed)).sum().backward()
    trained = [p for p in experts.parameters() if p.requires_grad]
    for parameter, first, second in zip(trained, *apart, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, first + second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast_of_the_activations(dtype: torch.dtype, where: torch.device) -> None:
    experts = packed_experts().to(where)
    x, index, gates = routed(device=where)
    with torch.autocast(where.type, dtype=dtype):
        y = experts(x, index, gates)
    assert y.dtype == torch.float32
    assert torch.equal(y.to(dtype), experts(x.to(dtype), index, gates))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters() if p.requires_grad)


def test_operands_that_are_not_contiguous() -> None:
    """Strided inputs, gates, and output gradients, one of them broadcast from a scalar."""
    experts = packed_experts()
    x, index, gates = routed()
    strided = [t.detach().repeat_interleave(2, dim=1)[:, ::2] for t in (x, index, gates)]
    assert not any(t.is_contiguous() for t in strided)
    strided[0].requires_grad_()
    trained = [p for p in experts.parameters() if p.requires_grad]
    weights = torch.randn(HIDDEN, M, generator=torch.Generator().manual_seed(4)).mT
    for grad in (weights, torch.ones(()).expand(M, HIDDEN)):
        assert not grad.is_contiguous()
        expected = experts(x, index, gates)
        results = [expected, *torch.autograd.grad(expected, (x, *trained), grad.contiguous())]
        y = experts(*strided)
        got = [y, *torch.autograd.grad(y, (strided[0], *trained), grad)]
        assert all(torch.equal(a, b) for a, b in zip(got, results, strict=True))


def test_adapters_that_are_not_contiguous() -> None:
    arguments = list(operands("all"))
    expected = expert_linear(*arguments)
    grads = torch.autograd.grad(expected, arguments[7:9], torch.ones_like(expected))
    for place in (7, 8):
        arguments[place] = arguments[place].detach().mT.contiguous().mT.requires_grad_()
        assert not arguments[place].is_contiguous()
    y = expert_linear(*arguments)
    got = torch.autograd.grad(y, arguments[7:9], torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip((y, *got), (expected, *grads), strict=True))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_fp32_inputs_whatever_the_parameters_are(parameters: torch.dtype) -> None:
    """Products in fp32; each parameter's gradient in its own dtype."""
    experts = packed_experts().to(parameters)
    x, index, gates = routed()
    y = experts(x, index, gates)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    trained = [p for p in experts.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == parameters for p in trained)
    reference = packed_experts().to(parameters).float()
    assert torch.equal(reference(x, index, gates), y)


def test_no_tokens() -> None:
    experts = packed_experts()
    x, index, gates = routed()
    assert experts(x[:0], index[:0], gates[:0]).shape == (0, HIDDEN)


def test_copies_share_nothing_and_casts_leave_the_bytes(tmp_path: Path) -> None:
    experts = packed_experts()
    bytes_before = experts.get_parameter("down_proj_blocks").clone()
    torch.save(experts.state_dict(), tmp_path / "state.pt")
    other = packed_experts()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    experts.to(torch.bfloat16)
    assert torch.equal(experts.get_parameter("down_proj_blocks"), bytes_before)
    assert experts.get_parameter("down_proj_lora_A").dtype == torch.bfloat16
    assert other.get_parameter("down_proj_lora_A").dtype == torch.float32
