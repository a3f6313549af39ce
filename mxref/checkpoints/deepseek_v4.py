"""DeepSeek-V4 (Flash, Pro, Flash-0731): separate experts w1 (gate), w3 (up) and w2 (down), FP8 around them.

The scales multiply, in spite of the name `weight_scale_inv` that transformers gives them. `mtp.*` layers hold experts
too. The `-Base` checkpoints have FP8 experts, which are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.checkpoints.convention import Convention

__all__ = ["CONVENTION"]


def _store(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes.view(torch.int8), scales.view(torch.float8_e8m0fnu)


CONVENTION = Convention(
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
    store=_store,
    quantization={"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
)
