"""This project's own implementations as candidates: the production kernels, the golden model, plain PyTorch."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

import mxref
from mxref.verification.arithmetic.accumulation import default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.starting_point import layer
from mxref.weights import MXLayout, MXWeights, decode_mxfp4


def golden() -> Candidate:
    """The golden model judged by itself: a check of the gate, not of anything shipped."""
    return Candidate("golden", mxref.parallel_linear_lora, decode=decode_mxfp4)


def shipped(device: torch.device) -> Candidate:
    """The production kernels, imported here: on a CPU, TRITON_INTERPRET=1 must be set before.

    One fp32 accumulator: the LoRA product, times s, then the base product with k ascending, the bias last. Tensor cores
    or, interpreted, blocks of 64: the device's default is what they declare.
    """
    from mxref import kernels
    from mxref.kernels.device.launch import architecture

    def decode(weights: MXWeights, dtype: torch.dtype) -> Tensor:
        return kernels.dequantize_experts(weights, torch.arange(weights.E, device=weights.device), dtype)

    def configs(dtype: torch.dtype) -> list[kernels.Config]:
        each = (kernels.reachable_configs(architecture(device), dtype, layout) for layout in MXLayout)
        return list(dict.fromkeys(chain.from_iterable(each)))

    how, call = default_accumulation(device), kernels.parallel_linear_lora
    return Candidate("mxref.kernels", call, (), how, decode, configs=configs, operators=kernels)


def torch_composite() -> Candidate:
    """Plain PyTorch: decode, then one fp32 matrix product an expert, differentiated by autograd."""
    return Candidate("torch composite", layer)
