"""Small MoE blocks and models of transformers, with random weights, and how far fp32 results may lie apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GptOssConfig, GptOssForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import pack_experts

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 64, 32, 2

_SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": INTERMEDIATE,
    },
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": INTERMEDIATE,
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v4": {"n_routed_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE},
}
_BLOCKS = {
    "qwen2_moe": Qwen2MoeSparseMoeBlock,
    "qwen3_moe": Qwen3MoeSparseMoeBlock,
    "mixtral": MixtralSparseMoeBlock,
    "deepseek_v3": DeepseekV3MoE,
    "gpt_oss": GptOssExperts,
    "deepseek_v4": DeepseekV4Experts,
    "qwen3_experts": Qwen3MoeExperts,
}


def config_of(family: str) -> Any:
    config = AutoConfig.for_model(family, hidden_size=HIDDEN, num_experts_per_tok=TOP_K, **_SIZES[family])
    config._experts_implementation = "eager"
    return config


def make(family: str, seed: int = 0) -> nn.Module:
    """A block or an experts module by its key in `_BLOCKS`, fp32, frozen, every parameter and buffer random."""
    torch.manual_seed(seed)
    module: nn.Module = _BLOCKS[family](config_of("qwen3_moe" if family == "qwen3_experts" else family))
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor, std=0.3)
    return module.requires_grad_(False)


def packed_experts(family: str = "gpt_oss", rank: int = 2) -> PackedExperts:
    """A block's experts with packed weights, the adapters' B drawn so that A has a gradient from the start."""
    holder = nn.ModuleDict({"experts": make(family)})
    torch.manual_seed(1)
    pack_experts(holder, rank=rank)
    experts = holder["experts"]
    assert isinstance(experts, PackedExperts)
    for name, parameter in experts.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return experts


def tiny_gpt_oss(seed: int = 0, **sizes: int) -> Any:
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        **sizes,
    )
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Equal but for the order of fp32 sums: a few γ_n of the tensor's scale, n below a hundred or so."""
    assert got.dtype == expected.dtype
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale)


def loss_of(model: Any, rank: int) -> Tensor:
    """Of the tiny gpt-oss on six tokens of a rank's own."""
    ids = torch.randint(32, (1, 6), generator=torch.Generator().manual_seed(rank)).to(model.device)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss
