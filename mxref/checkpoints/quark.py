"""AMD Quark's MXFP4 (`fp4`, groups of 32, `scale_format` e8m0): separate matrices under their own names."""

from __future__ import annotations

from mxref.checkpoints.convention import Convention

__all__ = ["CONVENTION"]

CONVENTION = Convention(
    name="Quark",
    checkpoints="AMD Quark's MXFP4",
    layout="*.weight U8 [N, K/2] and *.weight_scale U8 [N, K/32]",
    source="Quark `quark/torch/utils/pack.py` (`Pack_fp4`) and `quark/torch/export/constants.py`; vLLM "
    "`model_executor/layers/quantization/quark/quark_moe.py`",
    codes=".weight",
    scales=(".weight_scale",),
    quant_method="quark",
)
