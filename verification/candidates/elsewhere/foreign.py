"""Implementations that this project did not write, as candidates of its gate. Each is imported only when asked for.

    grouped_mm   torchao's dequantize and torch._grouped_mm, differentiated by autograd: the composite to beat
    axolotl      axolotl's ScatterMoELoRA on its own MXWeights

Their authors declare nothing; what is said here about their arithmetic was read in their code. Both callables carry
it as attributes, so `mxref gate --kernel axolotl` judges one alone. See also `packed_products` and `peft_layer`.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxref.not_covered import NotCovered
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.candidates.elsewhere.row_order import RowOrder
from mxref.weights import MXWeights


def torchao_decode(weights: MXWeights, dtype: torch.dtype) -> Tensor:
    """Torchao's own decode: [E, N, K] of `dtype`.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    decoded: Tensor = weights.to_torchao().dequantize(dtype)
    return decoded


def grouped_mm(
    inputs: Tensor,
    expert_weights: Tensor | MXWeights,
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
    *,
    sentinels: bool = True,
) -> Tensor:
    """The layer as a composite of torch operations, without a host synchronisation: operands as in `Problem`.

    The base product and LoRA's two are one `torch._grouped_mm` each; so are autograd's products for dX, dA, dB. In bf16
    on sm_90 and later these are single CUTLASS launches; other dtypes and chips take torch's loop over experts. It
    writes only the activation dtype, which decides the rounding points: LoRA's term meets the base after both are
    rounded, s is folded into B, and a bias is added to the rounded sum.

    Args:
        inputs, expert_weights, k: as in `Problem`; packed weights are decoded by torchao on every call, so pass a dense
            [E, K, N] to leave that out. A transposed view of [E, N, K] is as good.
        sorted_expert_idxs, sorted_scattered_idxs, expert_offsets: as in `Problem`.
        lora_A, lora_B, scaling, expert_biases, gates, grouped_in, grouped_out: as in `Problem`.
        use_fused_dX, use_fused_gather: choose among this project's kernels; nothing here.
        sentinels: rows of other ranks may occur. False saves masking their rows, which `_grouped_mm` leaves unwritten.

    Raises:
        ModuleNotFoundError: the weights are packed and torchao is not installed.
    """
    dtype, E = inputs.dtype, expert_offsets.numel()
    dense = torchao_decode(expert_weights, dtype).mT if isinstance(expert_weights, MXWeights) else expert_weights
    ends = expert_offsets.int()
    owned = sorted_expert_idxs < E if sentinels else None  # in expert order
    rows = RowOrder.of(sorted_scattered_idxs, k, owned)
    x = rows.by_expert(inputs, grouped_in)
    y = torch._grouped_mm(x, dense, offs=ends)
    if lora_A is not None and lora_B is not None:
        A = lora_A.to(dtype).reshape(E, -1, lora_A.shape[1])
        B = (scaling * lora_B).to(dtype).reshape(lora_B.shape[0], E, -1).transpose(0, 1)  # [E, N, r]
        lacking = -A.shape[1] % (16 // dtype.itemsize)  # rows of 16 bytes, as the kernel's loads want them
        if lacking:
            A, B = F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking))
        z = torch._grouped_mm(x, A.mT, offs=ends)
        y = y + torch._grouped_mm(z, B.mT, offs=ends)
    if expert_biases is not None:
        y = y + _bias_rows(expert_biases.to(dtype), sorted_expert_idxs.long().clamp(max=E - 1), ends)
    if owned is not None:
        y = y.masked_fill(~owned[:, None], 0.0)
    if grouped_out:
        return y
    y = rows.by_position(y)
    if gates is None:
        return y
    slots = y.view(*gates.shape, y.shape[1])
    return torch.bmm(gates.to(dtype)[:, None, :], slots)[:, 0]  # one fp32 sum over the slots


grouped_mm.mxref_points = ("lora-after-output", "scaling-in-B")  # type: ignore[attr-defined]
grouped_mm.mxref_decode = torchao_decode  # type: ignore[attr-defined]


class _BiasRows(torch.autograd.Function):
    """biases[experts]; the gradient sums each expert's rows, as a grouped product with ones: fp32, no atomics."""

    @staticmethod
    def forward(ctx: Any, biases: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return biases[experts]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ends,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        ones = gradient.new_ones(gradient.shape[0], 16 // gradient.itemsize)
        return torch._grouped_mm(ones.mT, gradient, offs=ends)[:, 0], None, None


_bias_rows: Callable[..., Tensor] = _BiasRows.apply


def axolotl(
    inputs: Tensor,
    expert_weights: Tensor | MXWeights,
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
    """One call of axolotl's `ScatterMoELoRA`, which has our operands and our order of arguments.

    Its kernels for packed weights need an adapter; where the call has none, zeros of rank 16 stand in.

    Raises:
        ImportError: see `load_axolotl`.
        NotCovered: the routing holds rows of other ranks, which axolotl drops before this call.
    """
    layer, container = load_axolotl()
    E = expert_offsets.numel()
    if int(expert_offsets[-1]) < sorted_expert_idxs.numel():
        raise NotCovered("sentinels: axolotl drops rows of other ranks before this call")
    weights: Any = expert_weights
    if isinstance(expert_weights, MXWeights):
        weights = container(expert_weights.packed, expert_weights.scales, expert_weights.K, expert_weights.N)
        if lora_A is None or lora_B is None:
            lora_A = inputs.new_zeros(16 * E, expert_weights.K)
            lora_B = inputs.new_zeros(expert_weights.N, 16 * E)
    y: Tensor = layer(
        inputs, weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, lora_A, lora_B, scaling,
        expert_biases, gates, grouped_in, grouped_out, use_fused_dX, use_fused_gather,
    )  # fmt: skip
    return y


axolotl.mxref_accumulation = Accumulation("tensor_core", lora="apart")  # type: ignore[attr-defined]

_AXOLOTL_KERNELS = "axolotl.integrations.kernels"
_AXOLOTL_TILING = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


@cache
def load_axolotl(tuning: float = 0.0) -> tuple[Any, Any]:
    """Axolotl's `parallel_linear_lora` and `MXWeights`, without the training framework around them.

    Its kernels tune themselves for each new shape. Here each may do so for `tuning` seconds, and at least until one
    tiling has run; with 0 it takes one tiling of its list, which decides no rounding. A process keeps to one of both.

    A bare package stands in for `axolotl.integrations.kernels`, whose own `__init__` imports the plugin system; so only
    torch and triton load, and axolotl's plugins cannot be imported in this process any more.

    Raises:
        ImportError: axolotl is not installed, or this version has no such layer.
    """
    integrations: Any = importlib.import_module("axolotl.integrations")
    if _AXOLOTL_KERNELS not in sys.modules:
        stand_in = ModuleType(_AXOLOTL_KERNELS)
        stand_in.__path__ = [str(Path(folder) / "kernels") for folder in integrations.__path__]
        sys.modules[_AXOLOTL_KERNELS] = integrations.kernels = stand_in
    library = f"{_AXOLOTL_KERNELS}.libs.scattermoe_lora"
    layer = importlib.import_module(f"{library}.parallel_linear_lora").parallel_linear_lora
    container = importlib.import_module(f"{library}.mx_weights").MXWeights
    operations = importlib.import_module(f"{library}.kernels.lora_ops")
    if not tuning:
        _pin(operations)
    for name, module in list(sys.modules.items()) if tuning else ():
        for kernel in vars(module).values() if name.startswith(library) else ():
            if hasattr(kernel, "prune_configs") and not isinstance(kernel, type):
                _bound(kernel, tuning)
    return layer, container


def _pin(module: ModuleType) -> None:
    """Leave each autotuned kernel one tiling of its own list.

    The tiling is the one that axolotl's `AXOLOTL_MX_DX_SAFE_CONFIG` names.
    """
    for kernel in vars(module).values():
        if hasattr(kernel, "configs"):
            safe = [config for config in kernel.configs if _AXOLOTL_TILING.items() <= config.all_kwargs().items()]
            kernel.configs = (safe or kernel.configs)[:1]


def _bound(tuner: Any, seconds: float) -> None:
    """Let one of Triton's autotuners try tilings of its list for so long, and at least until one of them has run."""
    if getattr(tuner, "is_bound", False):  # several modules may import one kernel
        return
    prune, time_one = tuner.prune_configs, tuner._bench
    begun, ran = 0.0, False

    def pruned(arguments: Any) -> Any:
        nonlocal begun, ran
        begun, ran = time.monotonic(), False  # a new shape is about to be tuned for
        return prune(arguments)

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal ran
        if ran and time.monotonic() - begun > seconds:
            return [math.inf] * 3  # its median and quantiles, as for a tiling that does not fit
        times = time_one(*arguments, **options)
        ran = ran or math.isfinite(times[0])
        return times

    tuner.prune_configs, tuner._bench, tuner.is_bound = pruned, timed, True
