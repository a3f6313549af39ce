"""Makes each implementation from elsewhere on a device, by name; an ImportError says what it lacks."""

from __future__ import annotations

from importlib import import_module

import torch

from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.elsewhere import foreign, packed_products, peft_layer
from mxref.verification.candidates.loading import load


def axolotl(device: torch.device) -> Candidate:
    """Its ScatterMoELoRA."""
    foreign.load_axolotl()
    return load(f"{foreign.__name__}:axolotl")


def unsloth(device: torch.device) -> Candidate:
    """Its packed product."""
    packed_products.load_unsloth()
    return load(f"{packed_products.__name__}:unsloth")


def humming(device: torch.device) -> Candidate:
    """Its packed product."""
    packed_products.load_humming()
    return load(f"{packed_products.__name__}:humming")


def peft(device: torch.device) -> Candidate:
    """PEFT's LoRA in a dense expert parameter."""
    import_module("peft")
    return load(f"{peft_layer.__name__}:peft")


def grouped_mm(device: torch.device) -> Candidate:
    """torchao's decoding before torch._grouped_mm."""
    import_module("torchao")
    return load(f"{foreign.__name__}:grouped_mm")
