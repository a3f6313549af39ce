"""Packed products that this project did not write: x·W for rows in expert order, weights in MXFP4, no adapters.

    humming   humming's HummingLayer, forward only
    unsloth   unsloth-zoo's mxfp4_expert_grouped_mm, whose gradient is that of x

Each is called as its users do, and rows are copied into expert order and back around it, which rounds nothing but the
sum of a token's slots in dX. What is declared here was read in their code. `bench.paths` times the same calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxref.verification.candidates.elsewhere.row_order import RowOrder
from mxref.weights import MXWeights

_PRODUCT = (
    "weights=packed|packed, from fp32, layout of weights=contiguous, adapters=none, biases=none, gates=none, "
    "routing=uniform|empty experts|one takes all|an expert twice"
)
"""What a product of packed weights covers of the domain: every row is an expert's."""


def humming(
    inputs: Tensor,
    expert_weights: MXWeights,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    scaling: float = 1.0,
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """One call of humming's layer, repacked for it; operands as in `Problem`, of which `scaling` scales nothing.

    Raises:
        ImportError: humming is not installed.
    """
    rows = RowOrder.of(sorted_scattered_idxs, k)
    product = humming_layer(expert_weights, inputs.dtype)
    y = humming_product(layer=product, x=rows.by_expert(inputs, grouped_in), ends=humming_ends(expert_offsets))
    return y if grouped_out else rows.by_position(y)


# Its rows of y are written 16 bytes at a time, and it refuses rows of x that do not begin at a multiple of 16 bytes.
humming.mxref_covers = (  # type: ignore[attr-defined]
    f"forward, dtype=bf16|fp16, N%8, layout of x=contiguous|transposed|sliced|padded|expanded, {_PRODUCT}"
)


def load_humming() -> Any:
    """Humming's `HummingLayer`.

    Raises:
        ImportError: humming is not installed.
    """
    return importlib.import_module("humming.layer").HummingLayer


def humming_layer(weights: MXWeights, dtype: torch.dtype) -> Any:
    """Humming's layer of a stack, repacked once and ready for calls; it compiles at the first one."""
    layer = load_humming()(
        shape_n=weights.N,
        shape_k=weights.K,
        weight_config={"quant_method": "mxfp4"},
        pad_n_to_multiple=_TILE,
        num_experts=weights.E,
        torch_dtype=dtype,
    ).to(weights.device)
    layer.load_from_tensors({"weight": weights.packed, "weight_scale": weights.scales})
    layer.transform()
    return layer


_TILE = 64
"""Columns of humming's narrowest tile; it pads an N that is no multiple."""


def humming_ends(expert_offsets: Tensor) -> Tensor:
    """Where each expert's rows begin, and the last ones end: int64 [E + 1]."""
    return torch.nn.functional.pad(expert_offsets.long(), (1, 0))


def humming_product(*, layer: Any, x: Tensor, ends: Tensor) -> Tensor:
    """x·W by humming's layer, [P, N], rows in expert order."""
    y: Tensor = layer(x, expert_layout=ends, top_k=1, compute_config={"gemm_type": "grouped_contiguous"})
    return y


def unsloth(
    inputs: Tensor,
    expert_weights: MXWeights,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    scaling: float = 1.0,
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """One call of unsloth-zoo's packed product; operands as in `Problem`, of which `scaling` scales nothing.

    Raises:
        ImportError: see `load_unsloth`.
    """
    rows = RowOrder.of(sorted_scattered_idxs, k)
    operands = unsloth_operands(rows.by_expert(inputs, grouped_in), expert_weights, expert_offsets)
    y: Tensor = load_unsloth()(**operands)
    return y if grouped_out else rows.by_position(y)


unsloth.mxref_covers = f"dtype=bf16, {_PRODUCT}"  # type: ignore[attr-defined]  # other dtypes are not sent to it


@cache
def load_unsloth() -> Any:
    """Unsloth-zoo's `mxfp4_expert_grouped_mm`. Only its file is loaded, not the patches around it.

    Raises:
        ImportError: unsloth_zoo is not installed, or this version has no such product.
    """
    spec = importlib.util.find_spec("unsloth_zoo")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("unsloth_zoo is not installed")
    file = Path(spec.submodule_search_locations[0]) / "mxfp4_gemm.py"
    own = importlib.util.spec_from_file_location("_mxref_unsloth_mxfp4_gemm", file)
    if not file.is_file() or own is None or own.loader is None:
        raise ImportError("this unsloth_zoo has no packed MXFP4 product")
    module = importlib.util.module_from_spec(own)
    sys.modules[own.name] = module
    own.loader.exec_module(module)
    return module.mxfp4_expert_grouped_mm


def unsloth_operands(x: Tensor, weights: MXWeights, expert_offsets: Tensor) -> dict[str, Tensor]:
    """The product's keywords: rows in expert order, the bytes as in a gpt-oss checkpoint, int32 rows an expert."""
    blocks, scales = weights.to_gpt_oss()
    counts = torch.diff(expert_offsets, prepend=expert_offsets.new_zeros(1)).int()
    return {"x": x, "blocks": blocks, "scales": scales, "counts": counts}
