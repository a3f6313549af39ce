"""Every way into the model integration says what was wrong with its input, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from moe_models import make, tiny_gpt_oss
from torch import nn

from mxref import encode_mxfp4
from mxref.kernels.models.adapters import LoRA, expert_major
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import experts_modules, pack_experts
from mxref.kernels.models.peft import get_peft_model
from mxref.kernels.models.torchao import mxfp4_param, selective_expert_weights

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
X, INDEX, GATES = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)


def holder() -> nn.ModuleDict:
    return nn.ModuleDict({"experts": make("gpt_oss")})


def weights(E: int, N: int, K: int) -> Any:
    return encode_mxfp4(torch.randn(E, N, K))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": -1}, ValueError, "rank is -1; the kernels take ranks 1 to 128"),
        ({"rank": 129}, ValueError, "rank is 129"),
        ({"rank": 1.5}, TypeError, r"rank is 1\.5; expected an integer"),
        ({"rank": True}, TypeError, "rank is True"),
        ({"rank": 2, "alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"rank": 2, "alpha": "2"}, TypeError, "alpha is '2'"),
        ({"rank": 2, "lora_dtype": torch.int8}, TypeError, r"dtype is torch\.int8"),
        ({"rank": 2, "lora_dtype": "bfloat16"}, TypeError, "dtype is 'bfloat16'; expected torch.bfloat16"),
        ({"scale_mode": "round"}, ValueError, "scale_mode is 'round'"),
        ({"checkpoint": "/nowhere"}, FileNotFoundError, "no checkpoint at"),
    ],
)
def test_pack_experts_changes_nothing_first(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = holder()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        pack_experts(model, **options)
    assert list(model.state_dict()) == before


PACKED: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda e: e(X[None], INDEX, GATES), ValueError, r"inputs has shape \(1, 5, 64\)"),
    (lambda e: e(X[:, :32], INDEX, GATES), ValueError, "inputs has 32 columns"),
    (lambda e: e(X.double(), INDEX, GATES), TypeError, r"inputs is torch\.float64"),
    (lambda e: e(X, INDEX.float(), GATES), TypeError, r"expert_idxs is torch\.float32"),
    (lambda e: e(X, INDEX[:, 0], GATES), ValueError, r"expert_idxs has shape \(5,\)"),
    (lambda e: e(X, INDEX[:4], GATES), ValueError, "k is 2 with 5 input rows"),
    (lambda e: e(X, INDEX, GATES[:, :1]), ValueError, r"gates has shape \(5, 1\)"),
    (lambda e: e(X, INDEX, GATES, {"up_proj": None}), ValueError, "name is 'up_proj'"),
    (lambda e: e(X, INDEX, GATES, {"down_proj": 3}), TypeError, r"adapters\['down_proj'\] is int"),
    (
        lambda e: e(X, INDEX, GATES, {"down_proj": LoRA(torch.zeros(8, 64), torch.zeros(64, 8), 1.0)}),
        ValueError,
        r"lora_A has shape \(8, 64\)",
    ),
    (lambda e: e.shape("up"), ValueError, "name is 'up'"),
    (lambda e: e.add_lora(2), ValueError, "adapters of rank 2 already"),
    (lambda e: experts_modules(nn.ModuleDict({"mlp": e})), ValueError, "mlp is packed already"),
    (lambda e: selective_expert_weights(e, "down_proj", torch.tensor([9])), ValueError, r"ids 9\.\.9"),
    (lambda e: selective_expert_weights(e, "down_proj", torch.tensor([0.5])), TypeError, r"torch\.float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), PACKED)
def test_packed_experts(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(pack_experts(holder(), rank=2).get_submodule("experts"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2), weights(2, 64, 32), torch.relu), TypeError, "gate_up is Tensor"),
        ((weights(2, 64, 64), weights(3, 64, 64), torch.relu), ValueError, "gate_up holds 2 experts and down 3"),
        ((weights(2, 64, 64), weights(2, 96, 32), torch.relu), ValueError, "reads 64 columns and down gives 96"),
        ((weights(2, 64, 64), weights(2, 64, 32), 3), TypeError, "activation is int"),
        ((weights(2, 64, 64), weights(2, 64, 32), torch.relu, {"up": X}), ValueError, r"biases holds \['up'\]"),
        ((weights(2, 64, 64), weights(2, 64, 32), torch.relu, {"down_proj": X}), ValueError, r"shape \(5, 64\)"),
    ],
)
def test_making_packed_experts(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedExperts(*arguments)


PLAIN: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: pack_experts(3), TypeError, "model is int"),  # type: ignore[arg-type]
    (lambda: expert_major(torch.zeros(4, 7), 3), ValueError, r"B has shape \(4, 7\)"),
    (lambda: mxfp4_param(torch.zeros(2)), TypeError, "weights is Tensor"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), PLAIN)
def test_functions(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("active", "error", "message"),
    [
        (torch.tensor([4]), ValueError, r"ids 4\.\.4; expected 0\.\.3"),
        (torch.tensor([[1]]), ValueError, r"active has shape \(1, 1\)"),
        (torch.tensor([0.5]), TypeError, r"active is torch\.float32"),
        (torch.tensor([True]), TypeError, r"active is torch\.bool"),
    ],
)
def test_active_experts_of_dense_weights(active: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        selective_expert_weights(make("gpt_oss"), "down_proj", active)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 129}, "rank is 129"),
        ({"target_parameters": [*TARGETS, "mlp.experts.down_proj_bias"]}, "asked for down_proj_bias"),
        (
            {"target_parameters": [*TARGETS, "mlp.experts.up_proj"]},
            r"holds 'mlp\.experts\.up_proj'.*nearest names are \['mlp\.experts\.gate_up_proj'",
        ),
    ],
)
def test_peft(options: dict[str, Any], message: str) -> None:
    config = peft.LoraConfig(**{"target_modules": [], "target_parameters": TARGETS, **options})
    with pytest.raises(ValueError, match=message):
        get_peft_model(pack_experts(tiny_gpt_oss(), rank=0), config)


def test_peft_second_adapter() -> None:
    model: Any = get_peft_model(
        pack_experts(tiny_gpt_oss(), rank=0), peft.LoraConfig(target_modules=[], target_parameters=TARGETS)
    )
    for options, message in (({"r": 129}, "rank is 129"), ({"init_lora_weights": "pissa"}, "init_lora_weights")):
        config = peft.LoraConfig(**{"target_modules": [], "target_parameters": TARGETS, **options})
        with pytest.raises(ValueError, match=message):
            model.add_adapter("second", config)


def test_peft_of_another_method() -> None:
    with pytest.raises(TypeError, match="config is IA3Config"):
        get_peft_model(pack_experts(tiny_gpt_oss(), rank=0), peft.IA3Config())
