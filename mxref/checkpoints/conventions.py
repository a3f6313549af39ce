"""Other projects' conventions as data, with sources; gpt-oss, also this project's own, has its own module."""

from __future__ import annotations

import json

import torch

from mxref.checkpoints.convention import Convention, Pair
from mxref.checkpoints.files import Files

DEEPSEEK_V4 = Convention(
    name="DeepSeek-V4",
    checkpoints="DeepSeek-V4-Flash and -Pro",
    layout="*.weight I8 [N, K/2] and *.scale F8_E8M0 [N, K/32]",
    source="Megatron-Bridge `models/deepseek/deepseek_v4_bridge.py`, Model-Optimizer "
    "`modelopt/torch/quantization/qtensor/mxfp4_tensor.py` (`dequantize_packed`), and transformers "
    "`conversion_mapping.py` (deepseek_v4)",
    codes=".weight",
    scales=(".scale", ".weight_scale_inv"),
    code_dtypes=("I8", "U8"),
    scale_dtypes=("F8_E8M0", "U8"),
    store=lambda codes, scales: (codes.view(torch.int8), scales.view(torch.float8_e8m0fnu)),
    quantization={"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
)
"""Separate experts w1 (gate), w3 (up) and w2 (down), FP8 around them: Flash, Pro, Flash-0731. The scales multiply, in
spite of the name `weight_scale_inv` that transformers gives them. `mtp.*` layers hold experts too. The `-Base`
checkpoints have FP8 experts, which are refused."""

COMPRESSED_TENSORS = Convention(
    name="compressed-tensors",
    checkpoints="LLM Compressor's `mxfp4-pack-quantized`; Kimi-K3",
    layout="*.weight_packed U8 [N, K/2] and *.weight_scale U8 [N, K/32]",
    source="compressed-tensors `compressors/mxfp4/base.py` and `compressors/nvfp4/base.py`; for Kimi-K3 NeMo AutoModel "
    "`components/models/kimi_k3/state_dict_adapter.py`",
    codes=".weight_packed",
    scales=(".weight_scale",),
    telling=(".weight_packed",),
    store=lambda codes, scales: (codes, scales),
    quantization={
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["re:.*experts\\.\\d+\\..*"],
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": "group",
                    "group_size": 32,
                    "symmetric": True,
                    "dynamic": False,
                    "scale_dtype": "torch.uint8",
                },
            }
        },
    },
)
"""`mxfp4-pack-quantized`: separate matrices, as LLM Compressor writes them, and Kimi-K3's, which names its experts
`language_model.model.layers.1.block_sparse_moe.experts.7.w1.weight_packed`; w1 is gate, w3 up, w2 down. The same
suffixes with other dtypes are compressed-tensors' INT4 (I32 codes) and NVFP4 (F8_E4M3 scales)."""

QUARK = Convention(
    name="Quark",
    checkpoints="AMD Quark's MXFP4",
    layout="*.weight U8 [N, K/2] and *.weight_scale U8 [N, K/32]",
    source="Quark `quark/torch/utils/pack.py` (`Pack_fp4`) and `quark/torch/export/constants.py`; vLLM "
    "`model_executor/layers/quantization/quark/quark_moe.py`",
    codes=".weight",
    scales=(".weight_scale",),
    quant_method="quark",
)
"""`fp4`, groups of 32, `scale_format` e8m0: separate matrices under their own names."""

MODELOPT = Convention(
    name="ModelOpt",
    checkpoints="NVIDIA Model Optimizer's MXFP4",
    layout="*.weight U8 [N, K/2] and *.weight_scale U8 [N, K/32]",
    source="Model-Optimizer `modelopt/torch/export/quant_utils.py` and "
    "`modelopt/torch/quantization/qtensor/mxfp4_tensor.py`",
    codes=".weight",
    scales=(".weight_scale",),
    quant_method="modelopt",
)
"""`MXFP4`, `W4A8_MXFP4_FP8`: separate matrices, named as Quark names them. Only the configuration, `quant_method` or
the producer in hf_quant_config.json, tells the two apart."""


def _check_mx_tensor(files: Files, pair: Pair) -> None:
    try:
        described = json.loads(files.metadata[pair.weight])
        kind, data = described["_type"], described["_data"]
        found = data["elem_dtype"]["_data"], data["block_size"], data["is_swizzled_scales"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{files.where(pair.codes)} has no description as a torchao MXTensor in its file's metadata ({error!r})"
        ) from None
    if (kind, *found) != ("MXTensor", "float4_e2m1fn_x2", 32, False):
        raise ValueError(
            f"{files.where(pair.codes)} is a {kind} of {found[0]} in blocks of {found[1]}, its scales "
            f"{'swizzled' if found[2] else 'plain'}; "
            "expected an MXTensor of float4_e2m1fn_x2 in blocks of 32 with plain scales"
        )


TORCHAO = Convention(
    name="torchao",
    checkpoints="torchao's safetensors, `MXTensor`",
    layout="*._name_qdata U8 [E, N, K/2] or [N, K/2] and *._name_scale F8_E8M0 [.., K/32]",
    source="torchao `prototype/safetensors/safetensors_support.py` and `prototype/mx_formats/mx_tensor.py`",
    codes="_qdata",
    scales=("_scale",),
    weight="",
    check=_check_mx_tensor,
)
"""An `MXTensor` flattened to `{module}._{parameter}_qdata` and `{module}._{parameter}_scale`. What it holds is said in
the header's metadata, JSON under the parameter's name: element type, block size, and whether the scales are swizzled
for a hardware product, which is refused."""
