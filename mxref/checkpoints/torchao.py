"""torchao's safetensors: an `MXTensor` flattened to `{module}._{parameter}_qdata` and `{module}._{parameter}_scale`.

What it holds is said in the header's metadata, JSON under the parameter's name: element type, block size, and whether
the scales are swizzled for a hardware product, which is refused.
"""

from __future__ import annotations

import json

from mxref.checkpoints.convention import Convention, Pair
from mxref.checkpoints.files import Files

__all__ = ["CONVENTION"]


def _check(files: Files, pair: Pair) -> None:
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


CONVENTION = Convention(
    name="torchao",
    checkpoints="torchao's safetensors, `MXTensor`",
    layout="*._name_qdata U8 [E, N, K/2] or [N, K/2] and *._name_scale F8_E8M0 [.., K/32]",
    source="torchao `prototype/safetensors/safetensors_support.py` and `prototype/mx_formats/mx_tensor.py`",
    codes="_qdata",
    scales=("_scale",),
    weight="",
    check=_check,
)
