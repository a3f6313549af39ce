"""A small, real gpt-oss checkpoint: a transformers model whose expert weights went through our own encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from mxref.weights import encode_mxfp4

PROJECTIONS = ("gate_up_proj", "down_proj")


def tiny_gpt_oss_config(*, layers: int = 2, experts: int = 4, hidden: int = 64, intermediate: int = 96) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_local_experts=experts,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )


def make_gpt_oss_checkpoint(
    directory: Path, *, sharded: bool = False, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """Write a checkpoint that both transformers and mxref can read; returns every tensor it holds.

    Args:
        directory: made if need be; receives config.json and one file, or two shards with an index.
        sharded: split so that blocks and scales of one projection lie in different shards.
        seed: of the weights and the (otherwise zero) biases.
        sizes: keyword arguments of `tiny_gpt_oss_config`.
    """
    torch.manual_seed(seed)
    config = tiny_gpt_oss_config(**sizes)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(PROJECTIONS):  # [E, K, N] in the model, [E, N, K] in blocks
            pair = encode_mxfp4(tensor.transpose(1, 2).contiguous()).to_gpt_oss()
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pair
        else:
            tensors[name] = torch.randn_like(tensor) * 0.1 if name.endswith("bias") else tensor.contiguous()

    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = ["GptOssForCausalLM"]
    config.dtype = torch.bfloat16
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    config.save_pretrained(directory)
    if sharded:
        _save_shards(directory, tensors)
    else:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _save_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = {name: f"model-{1 + name.endswith('_scales'):05d}-of-00002.safetensors" for name in tensors}
    for shard in set(weight_map.values()):
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(held, directory / shard, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
