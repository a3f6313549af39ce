"""Judge a kernel of your own: give the gate any differentiable callable with `parallel_linear_lora`'s signature.

    python examples/judge_my_kernel.py                                      # a few cases, in seconds
    mxref gate --kernel examples/judge_my_kernel.py:my_layer                # everything that any candidate is asked
    mxref gate --kernel my_project.kernels:my_layer --device cuda --full    # your kernel on a GPU

Replace `my_layer`. What it does not support it declares, `my_layer.mxref_covers` below; the verdict then says so. The
page gate-report/gate.html shows each check, the largest errors against their bounds, and the first counterexample.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxref import MXWeights, decode_mxfp4
from mxref.verification.cli import main


def my_layer(
    inputs: Tensor,
    expert_weights: Any,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """y = x·W + s·(x·Aᵀ)·Bᵀ + bias for each routed row [P, N], in plain PyTorch, fp32 alone, autograd's backward."""
    E, positions = expert_offsets.numel(), sorted_scattered_idxs.long()
    packed = isinstance(expert_weights, MXWeights)
    W = decode_mxfp4(expert_weights, inputs.dtype).mT if packed else expert_weights  # [E, K, N]
    rows = inputs[positions // k]
    outputs = []
    for e, (begin, end) in enumerate(pairwise([0, *expert_offsets.tolist()])):
        x = rows[begin:end]
        y = x @ W[e]
        if lora_A is not None and lora_B is not None:
            r = lora_A.shape[0] // E
            own = slice(e * r, (e + 1) * r)
            y = y + scaling * (x @ lora_A[own].to(x.dtype).mT) @ lora_B[:, own].to(x.dtype).mT
        outputs.append(y if expert_biases is None else y + expert_biases[e].to(y.dtype))
    grouped = torch.cat(outputs)
    return grouped if grouped_out else torch.empty_like(grouped).index_copy(0, positions, grouped)


# What it supports, in the words of `mxref gate --covers`: rows in token order, no gates, no remote experts, and fp32
# without autocast.
my_layer.mxref_covers = (  # type: ignore[attr-defined]
    "gates=none, input order=by token, dtype=fp32, autocast=off, "
    "routing=uniform|empty experts|one takes all|an expert twice"
)

if __name__ == "__main__":
    cases = ["--case", "integer", "--case", "odd sizes", "--case", "balanced"]
    sys.exit(main(["gate", "--kernel", f"{__file__}:my_layer", "--device", "cpu", *cases, *sys.argv[1:]]))
