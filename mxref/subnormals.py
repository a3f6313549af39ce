"""Whether this thread keeps subnormal numbers, which MXFP4's smallest scales need in fp32 and bf16."""

from __future__ import annotations

import sys
import warnings

import torch

__all__ = ["warn_if_flushed"]

_SMALLEST_NORMAL = sys.float_info.min


def warn_if_flushed(device: torch.device) -> None:
    """Warn if a CPU's subnormal numbers become zero: then weights under the scale bytes 0 and 1 decode to other values.

    The setting is a thread's own, so it is looked at where something is computed. GPUs have none.
    """
    if device.type == "cpu" and _SMALLEST_NORMAL / 2 == 0.0:
        warnings.warn(
            "subnormal numbers are flushed to zero in this thread, by torch.set_flush_denormal(True) or a library that "
            "was built with -ffast-math: MXFP4 weights under the smallest scales become zero; call "
            "torch.set_flush_denormal(False)",
            RuntimeWarning,
            stacklevel=3,
        )
