"""Tiny checkpoints of every convention that stores MXFP4 experts, with the stacks that reading them must give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxref import MXWeights, encode_mxfp4

E, HIDDEN, INTERMEDIATE = 3, 64, 32
Tensors = dict[str, Tensor]
Stacks = dict[str, MXWeights]
Store = Callable[[Tensor, Tensor], Tensors]


def stacks(layers: list[str], seed: int = 0) -> Stacks:
    """Random experts of some MoE blocks: {block}.experts.gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"gate_up_proj": (2 * INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
    return {
        f"{layer}.experts.{projection}": encode_mxfp4(torch.randn(E, N, K, generator=generator))
        for layer in layers
        for projection, (N, K) in sizes.items()
    }


def separate(
    weights: Stacks,
    rename: Callable[[str], str],
    parts: tuple[str, str, str],
    store: Callable[[Tensor, Tensor], Tensors],
) -> Tensors:
    """One matrix an expert and part: `store` gives a matrix's tensors by their suffixes."""
    tensors: Tensors = {}
    for name, stack in weights.items():
        layer, projection = name.rsplit(".experts.", 1)
        rows = dict(zip(parts, (slice(0, INTERMEDIATE), slice(INTERMEDIATE, None), slice(None)), strict=True))
        for part in parts[:2] if projection == "gate_up_proj" else parts[2:]:
            for e in range(E):
                for suffix, tensor in store(stack.packed[e, rows[part]], stack.scales[e, rows[part]]).items():
                    tensors[f"{rename(layer)}.experts.{e}.{part}{suffix}"] = tensor.clone()
    return tensors


def gpt_oss(directory: Path) -> tuple[Tensors, Stacks]:
    expected = stacks(["model.layers.0.mlp", "model.layers.1.mlp"])
    tensors = {}
    for name, stack in expected.items():
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = stack.to_gpt_oss()
    return _write(directory, tensors, {"quant_method": "mxfp4"}), expected


def deepseek_v4(directory: Path, scale: str = ".scale") -> tuple[Tensors, Stacks]:
    """With a layer for predicting several tokens, and an FP8 matrix outside the experts."""
    expected = stacks(["model.layers.0.mlp", "mtp.0.mlp"])

    def store(codes: Tensor, scales: Tensor) -> Tensors:
        return {".weight": codes.view(torch.int8), scale: scales.view(torch.float8_e8m0fnu)}

    def rename(layer: str) -> str:
        return layer.removeprefix("model.").replace(".mlp", ".ffn")

    tensors = separate(expected, rename, ("w1", "w3", "w2"), store)
    tensors["layers.0.attn.wkv.weight"] = torch.ones(130, 64).to(torch.float8_e4m3fn)
    tensors["layers.0.attn.wkv.scale"] = torch.tensor([[128], [126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return _write(directory, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}), expected


def compressed_tensors(directory: Path) -> tuple[Tensors, Stacks]:
    expected = stacks(["model.layers.0.mlp"])
    names = ("gate_proj", "up_proj", "down_proj")
    tensors = separate(expected, str, names, lambda codes, scales: {".weight_packed": codes, ".weight_scale": scales})
    method = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return _write(directory, tensors, method), expected


def kimi_k3(directory: Path) -> tuple[Tensors, Stacks]:
    expected = stacks(["language_model.model.layers.1.mlp"])

    def rename(layer: str) -> str:
        return layer.replace(".mlp", ".block_sparse_moe")

    def store(codes: Tensor, scales: Tensor) -> Tensors:
        return {".weight_packed": codes, ".weight_scale": scales}

    tensors = separate(expected, rename, ("w1", "w3", "w2"), store)
    method = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return _write(directory, tensors, method), expected


def quark(directory: Path, method: str = "quark") -> tuple[Tensors, Stacks]:
    """With a quantised matrix and a convolution's three axes outside the experts."""
    expected = stacks(["model.layers.0.mlp"])
    names = ("gate_proj", "up_proj", "down_proj")
    tensors = separate(expected, str, names, lambda codes, scales: {".weight": codes, ".weight_scale": scales})
    attention = encode_mxfp4(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    tensors["model.layers.0.self_attn.q_proj.weight"] = attention.packed[0]
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = attention.scales[0]
    tensors["model.layers.0.self_attn.conv1d.weight"] = torch.ones(4, 1, 3, dtype=torch.bfloat16)
    return _write(directory, tensors, {"quant_method": method}), expected


def modelopt(directory: Path) -> tuple[Tensors, Stacks]:
    """Its configuration in a file of its own."""
    tensors, expected = quark(directory)
    (directory / "config.json").unlink()
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MXFP4"}}
    (directory / "hf_quant_config.json").write_text(json.dumps(said))
    return tensors, expected


def torchao(directory: Path) -> tuple[Tensors, Stacks]:
    """Written by torchao itself."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    expected = stacks(["model.layers.0.mlp"])
    state = {name: stack.to_torchao() for name, stack in expected.items()}
    tensors, metadata = flatten_tensor_state_dict({**state, "model.norm.weight": torch.ones(4)})
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata=metadata)
    return tensors, expected


MAKERS = {
    "gpt-oss": gpt_oss,
    "DeepSeek-V4": deepseek_v4,
    "compressed-tensors": compressed_tensors,
    "Kimi-K3": kimi_k3,
    "Quark": quark,
    "ModelOpt": modelopt,
    "torchao": torchao,
}
"""Writers of a checkpoint into a directory; each returns what the file holds, and the stacks that it stands for."""


def _write(directory: Path, tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return tensors
