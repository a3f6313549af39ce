"""gpt-oss: all experts of a projection in one pair, `{name}_blocks` and `{name}_scales`, its bias beside it.

The blocks' bytes are `MXWeights.packed`. Rows are in the order of the model's parameter, gate and up interleaved in
gpt-oss. This project's packed modules use these names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mxref.checkpoints.convention import Convention
from mxref.formats import MX_BLOCK_SIZE
from mxref.weights import MXWeights

BIAS = "_bias"
"""Suffix of a projection's bias [E, N]."""


def _store(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes.view(*codes.shape[:-1], -1, MX_BLOCK_SIZE // 2), scales


CONVENTION = Convention(
    name="gpt-oss",
    checkpoints="gpt-oss-20b and -120b; this project's own",
    layout="*_blocks U8 [E, N, K/32, 16] and *_scales U8 [E, N, K/32]",
    source="the openai/gpt-oss-20b checkpoint, and transformers `integrations/mxfp4.py`",
    codes="_blocks",
    scales=("_scales",),
    telling=("_blocks", "_scales"),
    weight="",
    blocked=True,
    scale_dtypes=("U8",),
    store=_store,
    quantization={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]},
)


def write_expert_weights(
    file: str | Path, weights: Mapping[str, MXWeights], biases: Mapping[str, Tensor] | None = None
) -> None:
    """Save projections under gpt-oss names in one safetensors file, bit for bit as read.

    Raises:
        ValueError: `weights` is empty, or a bias's shape is not its projection's [E, N].
    """
    if not weights:
        raise ValueError("weights is empty; expected at least one projection")
    tensors: dict[str, Tensor] = {}
    for name, stack in weights.items():
        tensors[name + CONVENTION.codes], tensors[name + CONVENTION.scales[0]] = stack.to_gpt_oss()
    for name, bias in (biases or {}).items():
        if name not in weights or tuple(bias.shape) != (weights[name].E, weights[name].N):
            expected = (weights[name].E, weights[name].N) if name in weights else "no projection of that name"
            raise ValueError(f"biases[{name!r}] has shape {tuple(bias.shape)}; weights has {expected}")
        tensors[name + BIAS] = bias.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
