"""Public names and commands, as data: what others import and type keeps working, or says what replaced it."""

from __future__ import annotations

import argparse
from importlib import import_module
from inspect import signature
from pkgutil import resolve_name
from types import ModuleType

import pytest
import torch

import mxref.kernels
from mxref import MXLayout, moved
from mxref.verification import cli

NAMES = {
    "mxref": (
        "MX_BLOCK_SIZE MXLayout MXWeights NotCovered Problem RoundingPoints ScatterMoELoRA decode_mxfp4 encode_mxfp4 "
        "flatten_sort_count fp4_codebook get_active_experts parallel_linear_lora remap_expert_indices"
    ),
    "mxref.kernels": (
        "Config HFScatterMoEGatedMLP PackedExperts ScatterMoELoRA dequantize_experts is_mxfp4_param pack_experts "
        "parallel_linear_lora reachable_configs scatter2scatter_lora_dX_mx scatter2scatter_lora_mx "
        "selective_expert_weights selective_lora_weights selective_mx_weights_fwd"
    ),
    "mxref.verification.cli": "main",
}

_LAYER = (
    "expert_weights k sorted_expert_idxs sorted_scattered_idxs expert_offsets lora_A lora_B scaling expert_biases "
    "gates grouped_in grouped_out use_fused_dX use_fused_gather"
)
SIGNATURES = {  # the arguments by position; keywords may follow
    "mxref:MXWeights": "packed scales K N layout block_size num_experts orig_dtype",
    "mxref:flatten_sort_count": "expert_idxs num_experts",
    "mxref:fp4_codebook": "device",
    "mxref:get_active_experts": "sorted_expert_idxs num_experts",
    "mxref:parallel_linear_lora": f"inputs {_LAYER}",
    "mxref:remap_expert_indices": "sorted_expert_idxs expert_offsets active_experts num_experts",
    "mxref.kernels:parallel_linear_lora": f"inputs {_LAYER}",
    "mxref.kernels:scatter2scatter_lora_mx": (
        "X W_mx sorted_expert_idxs sorted_scattered_idxs k lora_A lora_B scaling b x_grouped y_grouped out"
    ),
    "mxref.kernels:scatter2scatter_lora_dX_mx": (
        "DY W_mx sorted_expert_idxs sorted_scattered_idxs k lora_A lora_B scaling dy_grouped dx_grouped out"
    ),
    "mxref.kernels:selective_lora_weights": "lora_A lora_B active num_experts",
}

COMMANDS = {
    "gate": (
        "--accept-baseline --accumulation --case --covers --device --dtype --experts --fail-fast --full --kernel "
        "--layers --list --out --points --quick --record --require-gpu --rerun --seed --shape --strict --timeout "
        "--verbose --weights"
    ),
    "new-kernel": "",
    "scoreboard": "--candidates --case --device --full --out --processes --quick --record --seed",
    "mutants": (
        "--all --by-hand --compile --device --gate --gpu-only --jobs --kind --list --matrix --minutes --name --out "
        "--record --rest --sample --seed"
    ),
    "honest": "--data --device --jobs --name --out --seeds",
    "inspect": "",
    "bench": "--large --no-peers --out --quick --readme --record --shape",
    "tune": "--jobs --shape",
    "history": "--baseline --evidence --gpu --plot --verbose",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    found = import_module(module)
    names = NAMES[module].split()
    assert not [name for name in names if not hasattr(found, name)]
    assert set(names) <= set(found.__all__)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path: str) -> None:
    expected = SIGNATURES[path].split()
    assert list(signature(resolve_name(path)).parameters)[: len(expected)] == expected


@pytest.mark.parametrize("module", [mxref, mxref.kernels])
def test_the_autograd_functions_take_the_layers_arguments_by_position(module: ModuleType) -> None:
    x = torch.ones(2, 32, requires_grad=True)
    weights = mxref.encode_mxfp4(torch.ones(1, 3, 32))
    routing = mxref.flatten_sort_count(torch.zeros(2, 1, dtype=torch.int64), 1)
    y = module.ScatterMoELoRA.apply(x, weights, 1, *routing, None, None, 1.0, None, None, False, False, False, False)
    assert torch.equal(y, torch.full((2, 3), 32.0))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 32), 3.0))


def test_the_seeds_layout_keeps_its_number() -> None:
    assert MXLayout.FWD.value == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_flags(command: str) -> None:
    assert command in cli.COMMANDS
    parser = argparse.ArgumentParser()
    cli.module_of(command).add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert set(COMMANDS[command].split()) <= flags


@pytest.mark.parametrize("old", moved.MOVED)
def test_modules_that_moved_name_their_successor(old: str) -> None:
    import_module(moved.MOVED[old])
    with pytest.raises(ModuleNotFoundError, match=rf"{old} has moved: use {moved.MOVED[old]}"):
        import_module(old)
    package, _, name = old.rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=rf"{old} has moved"):
        exec(f"from {package} import {name}")


@pytest.mark.parametrize("package", moved.SPLIT)
def test_packages_that_replaced_a_module_name_where_its_contents_are(package: str) -> None:
    for name, successor in moved.moved_names(package).items():
        assert resolve_name(successor) is not None
        with pytest.raises(ImportError, match=rf"{package}\.{name} has moved: see {successor}"):
            exec(f"from {package} import {name}")
    with pytest.raises(AttributeError, match="no attribute absent"):
        import_module(package).absent  # noqa: B018


def test_other_missing_modules_are_left_to_python() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mxref\.absent'"):
        import_module("mxref.absent")
