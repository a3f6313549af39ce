"""The activation between the projections: autograd, operators, what is kept, and whose function it replaces."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from moe_models import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, make, packed_experts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from uninterpreted import run_python

from mxref import activation as golden
from mxref.kernels.layer.activation import gated, gated_activation, gated_activation_backward
from mxref.kernels.models.activation import form_of
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import not_covered, pack_experts
from mxref.swiglu import GPT_OSS, SILU, SwiGLU
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.finding import Status
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import Item, plan
from mxref.verification.gate.run import judge

LIMITED = SwiGLU(limit=10.0)
FORMS = {"interleaved": GPT_OSS, "halves": SILU, "limited": LIMITED}
P, WIDTH = 5, 24


def items(device_type: str) -> list[Item]:
    """What the gate asks."""
    check = [check for check in CHECKS if check.name == "activation"]
    return plan(Scope("quick", device_type, interpreted=device_type == "cpu"), own=True, checks=check)


def operands(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up, grad = (torch.randn(P, width, generator=generator) for width in (2 * WIDTH, WIDTH))
    return (4 * gate_up).to(device, dtype).requires_grad_(), grad.to(device, dtype)


def operator(gate_up: Tensor, form: SwiGLU) -> Tensor:
    return gated_activation(gate_up, form.interleaved, form.alpha, form.limit, form.offset)


@pytest.mark.gpu
@pytest.mark.parametrize("item", items("cuda"), ids=lambda item: item.name)
def test_every_dtype_on_a_gpu(device: torch.device, item: Item) -> None:
    """The gate's own cases: bf16 and fp16, whose rounding no CPU shows, and fp32."""
    candidate = shipped(device)
    assert candidate.accumulation is not None
    findings = judge(item, candidate, candidate.accumulation)
    assert findings
    assert [str(finding) for finding in findings if finding.status is not Status.PASS] == []


@pytest.mark.gpu
def test_a_training_step_on_a_gpu_waits_for_nothing(device: torch.device) -> None:
    gate_up, grad = operands(device, torch.bfloat16)
    first = [h := gated(gate_up, GPT_OSS), *torch.autograd.grad(h, gate_up, grad)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [h := gated(gate_up, GPT_OSS), *torch.autograd.grad(h, gate_up, grad)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", [GPT_OSS, SILU], ids=["interleaved", "halves"])
def test_more_than_2_31_elements(device: torch.device, form: SwiGLU) -> None:
    rows, width = 2**31 // 5760 + 100, 2880
    gate_up = torch.randn(1, 2 * width, device=device, dtype=torch.bfloat16).repeat(rows, 1).requires_grad_()
    h = gated(gate_up, form)
    (gradient,) = torch.autograd.grad(h, gate_up, h.detach()[:1].expand(h.shape))
    assert torch.equal(h[:1].expand(h.shape), h)
    assert torch.equal(gradient[:1].expand(gradient.shape), gradient)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_operators_pass_opcheck(form: SwiGLU) -> None:
    gate_up, grad = operands()
    numbers = form.interleaved, form.alpha, form.limit, form.offset
    forward = torch.library.opcheck(gated_activation, (gate_up, *numbers))
    backward = torch.library.opcheck(gated_activation_backward, (gate_up.detach(), grad, *numbers))
    assert set(forward.values()) == set(backward.values()) == {"SUCCESS"}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_compiled_and_eager_bits(form: SwiGLU) -> None:
    gate_up, grad = operands()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gated(x, form), fullgraph=True, backend="aot_eager")
    outcomes = []
    for call in (lambda x: gated(x, form), lambda x: operator(x, form), compiled):
        h = call(gate_up)
        outcomes.append((h, *torch.autograd.grad(h, gate_up, grad)))
    assert outcomes[0][0].shape == (P, WIDTH)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("call", [gated, operator], ids=["eager", "operator"])
def test_differentiable_once(call: Any) -> None:
    gate_up, grad = operands()
    (first,) = torch.autograd.grad(call(gate_up, SILU), gate_up, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("call", [gated, operator], ids=["eager", "operator"])
def test_gate_up_is_all_that_is_kept(call: Any) -> None:
    """Of gpt-oss' own function autograd keeps four times as much."""
    sizes: list[int] = []

    def kept(function: Any) -> int:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            function(gate_up)
        return sum(sizes)

    gate_up, _ = operands()
    assert kept(lambda x: call(x, GPT_OSS)) == gate_up.nbytes
    theirs = make("gpt_oss")
    assert kept(theirs._apply_gate) >= 3 * gate_up.nbytes


def test_changed_in_place_between_the_passes() -> None:
    gate_up = operands()[0].detach().clone().requires_grad_()
    inner = gate_up * 1
    h = gated(inner, SILU)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_shapes_without_data() -> None:
    gate_up = operands()[0].detach()
    assert gated(gate_up.to("meta"), GPT_OSS).shape == (P, WIDTH)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(gate_up).requires_grad_()
        h = gated(fake, GPT_OSS)
        assert torch.autograd.grad(h.sum(), fake)[0].shape == gate_up.shape


@pytest.mark.parametrize(
    ("gate_up", "error"),
    [
        (torch.ones(2, 3), ValueError),
        (torch.ones(1, 2, 4), ValueError),
        (torch.ones(2, 4, dtype=torch.float64), TypeError),
        (torch.ones(2, 4, dtype=torch.uint8), TypeError),
    ],
)
def test_what_does_not_fit_is_refused(gate_up: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="gate_up"):
        gated(gate_up, SILU)


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    code = "import torch; from mxref.kernels.layer.activation import gated; from mxref.swiglu import SILU\n"
    done = run_python("-c", code + "gated(torch.ones(2, 4), SILU)")
    assert done.returncode != 0
    assert "set TRITON_INTERPRET=1 before mxref.kernels is imported" in done.stderr


RECOGNISED = {
    "gpt_oss": GPT_OSS,
    "qwen3_experts": SILU,
    "deepseek_v4": LIMITED,
}


@pytest.mark.parametrize("family", RECOGNISED)
def test_packed_experts_use_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are right: the layer with the model's own function in between gives the same but for a few roundings."""
    packed = packed_experts(family)
    form = RECOGNISED[family]
    assert packed._activation.form == form
    generator = torch.Generator().manual_seed(1)
    x, index = torch.randn(6, HIDDEN, generator=generator), torch.randint(EXPERTS, (6, TOP_K), generator=generator)
    gates = torch.rand(6, TOP_K, generator=generator)
    own = packed._activation.experts._apply_gate
    monkeypatch.setattr(packed, "_activation", own)
    expected = packed(x, index, gates)
    monkeypatch.undo()
    monkeypatch.setattr(type(packed._activation.experts), "_apply_gate", None)
    torch.testing.assert_close(packed(x, index, gates), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_whatever_else_keeps_its_own_function() -> None:
    gelu = make("qwen3_experts")
    gelu.act_fn = nn.GELU()
    shifted = make("gpt_oss")
    shifted.alpha = torch.nan
    foreign = SimpleNamespace(_apply_gate=lambda gate_up: gate_up)
    for experts in (gelu, shifted, foreign, nn.Identity()):
        assert form_of(experts) is None
    assert small_pack(gelu)._activation.form is None


def test_a_known_name_with_other_code_keeps_its_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make("gpt_oss")
    known = type(experts)._apply_gate
    changes: dict[str, Any] = {
        "value": lambda self, gate_up: known(self, gate_up) * (1 + 2**-10),
        "bound": lambda self, gate_up: known(self, gate_up.clamp(max=6.9)),
        "gradient at the bound": lambda self, gate_up: known(self, torch.where(gate_up < 7, gate_up, 7.0)),
        "an error": lambda self, gate_up: gate_up.no_such_attribute,
    }
    assert form_of(experts) == GPT_OSS
    for change in changes.values():
        change.__qualname__, change.__module__ = known.__qualname__, known.__module__
        monkeypatch.setattr(type(experts), "_apply_gate", change)
        assert form_of(experts) is None
    known_again = lambda self, gate_up: known(self, gate_up)  # noqa: E731
    known_again.__qualname__, known_again.__module__ = known.__qualname__, "elsewhere"
    monkeypatch.setattr(type(experts), "_apply_gate", known_again)
    assert form_of(experts) is None


def test_families_have_the_forms_that_the_documentation_says() -> None:
    found: dict[str, set[SwiGLU | None]] = {}
    for family in families.families():
        for name in families._experts_classes(family):
            if not isinstance(experts := families._build(family, name), str) and not not_covered(experts):
                found.setdefault(family, set()).add(form_of(experts))
    assert all(len(forms) == 1 for forms in found.values())
    by_form = {form: {family for family, forms in found.items() if forms == {form}} for form in {GPT_OSS, SILU, None}}
    assert by_form[GPT_OSS] == {"gpt_oss"}
    assert by_form[None] == {"gemma4", "diffusion_gemma", "step3p7"}
    others = {family: form for family, (form,) in found.items() if family not in set().union(*by_form.values())}
    halves = replace(GPT_OSS, interleaved=False)
    assert others == {
        **dict.fromkeys(("deepseek_v4", "glm5_next", "hy_v4"), LIMITED),
        **dict.fromkeys(("minimax_m3_vl", "openai_privacy_filter"), halves),
    }
    assert len(by_form[SILU]) >= 50


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_recognised_wherever_it_is_packed(mode: Any) -> None:
    experts = make("deepseek_v4")
    with mode():
        assert form_of(experts) == LIMITED


def test_a_whole_model_recognises_its_activation() -> None:
    model = pack_experts(families.small_model("mixtral"), rank=2)
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert packed
    assert all(module._activation.form == SILU for module in packed)


def small_pack(experts: nn.Module) -> Any:
    holder = nn.ModuleDict({"experts": experts})
    pack_experts(holder, rank=0)
    return holder["experts"]


def test_the_golden_twin_agrees() -> None:
    gate_up, grad = operands()
    for form in FORMS.values():
        ours, theirs = gated(gate_up, form), golden.gated(gate_up, form)
        assert ours.shape[1] == INTERMEDIATE - 8
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(h, gate_up, grad)[0] for h in (ours, theirs)]
        torch.testing.assert_close(*gradients)
