"""Tiny causal language models of several MoE families, random in everything that a checkpoint has to keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
    },
}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A frozen model of a family of transformers, fp32, its buffers that are stored drawn too."""
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(
        family, **{k: v for k, v in _SIZES.items() if hasattr(known, k)} | _OWN.get(family, {})
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    stored = model.state_dict()
    for name, tensor in stored.items():
        if tensor.ndim == 3 or "correction" in name:
            nn.init.normal_(tensor, std=0.3)
    return model.requires_grad_(False)
