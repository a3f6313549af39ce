"""compressed-tensors' `mxfp4-pack-quantized`: separate matrices, as LLM Compressor writes them, and Kimi-K3's.

Kimi-K3 names its experts `language_model.model.layers.1.block_sparse_moe.experts.7.w1.weight_packed`; w1 is gate, w3
up, w2 down. The same suffixes with other dtypes are compressed-tensors' INT4 (I32 codes) and NVFP4 (F8_E4M3 scales).
"""

from __future__ import annotations

from mxref.checkpoints.convention import Convention

__all__ = ["CONVENTION"]

CONVENTION = Convention(
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
