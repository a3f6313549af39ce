"""NVIDIA Model Optimizer's MXFP4 (`MXFP4`, `W4A8_MXFP4_FP8`): separate matrices, named as Quark names them.

Only the configuration, `quant_method` or the producer in hf_quant_config.json, tells the two apart.
"""

from __future__ import annotations

from mxref.checkpoints.convention import Convention

__all__ = ["CONVENTION"]

CONVENTION = Convention(
    name="ModelOpt",
    checkpoints="NVIDIA Model Optimizer's MXFP4",
    layout="*.weight U8 [N, K/2] and *.weight_scale U8 [N, K/32]",
    source="Model-Optimizer `modelopt/torch/export/quant_utils.py` and "
    "`modelopt/torch/quantization/qtensor/mxfp4_tensor.py`",
    codes=".weight",
    scales=(".weight_scale",),
    quant_method="modelopt",
)
