"""The table of tilings: every row fits its chip, and what is for one chip is refused elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxref.kernels.device.configs import SHARED_MEMORY, TABLE, Config, config_for, layout_for, reachable_configs
from mxref.weights import MXLayout

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
HOPPER = Config(64, 128, 128, num_warps=8, num_stages=3, hopper=True)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("architecture", TABLE)
def test_every_reachable_tiling_fits(architecture: str, dtype: torch.dtype) -> None:
    for config in reachable_configs(architecture, dtype):
        config.check_fits(architecture, dtype)
        for rank in (1, 16, 128):
            assert config.projection(rank).shared_bytes(dtype) <= SHARED_MEMORY[architecture]
            assert config.outer().shared_bytes(dtype) <= SHARED_MEMORY[architecture]


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("architecture", TABLE)
def test_dispatch_reaches_what_is_listed(architecture: str, dtype: torch.dtype) -> None:
    chosen = {config_for(architecture, rows, 4, dtype) for rows in (0, 1, 64, 65, 384, 385, 1 << 20)}
    assert chosen == set(reachable_configs(architecture, dtype))


def test_the_hopper_kernel_is_chosen_for_bf16_on_hopper_alone() -> None:
    for architecture in TABLE:
        for dtype in ACTIVATIONS:
            hopper = [config.hopper for config in reachable_configs(architecture, dtype)]
            assert all(hopper) if (architecture, dtype) == ("sm_90", torch.bfloat16) else not any(hopper)


def test_products_beside_the_hopper_kernel_are_portable() -> None:
    for config in reachable_configs("sm_90"):
        for tiling in (config.dense(), config.projection(16), config.outer()):
            assert not tiling.hopper
    assert Config(32, 64, 64).dense() == Config(32, 64, 64)


def test_a_hopper_tiling_is_refused_where_it_cannot_run() -> None:
    HOPPER.check_fits("sm_90", torch.bfloat16)
    for architecture, dtype in (("sm_80", torch.bfloat16), ("sm_90", torch.float16), ("interpreter", torch.float32)):
        with pytest.raises(ValueError, match="is for bf16 on sm_90"):
            HOPPER.check_fits(architecture, dtype)
    for change in ({"BLOCK_M": 128}, {"BLOCK_N": 64}, {"BLOCK_K": 64}, {"num_warps": 4}, {"num_stages": 1}):
        with pytest.raises(ValueError, match="is for hopper, which has"):
            replace(HOPPER, **change)
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory"):
        replace(HOPPER, BLOCK_M=256, num_stages=4).check_fits("sm_90", torch.bfloat16)


def test_fragments_have_their_own_kernel_for_bf16_on_hopper_alone() -> None:
    for architecture in TABLE:
        for dtype in ACTIVATIONS:
            found = reachable_configs(architecture, dtype, MXLayout.FRAGMENTS)
            own = (architecture, dtype) == ("sm_90", torch.bfloat16)
            assert [config.fragments for config in found] == [own] * len(found)
            assert not any(config.hopper for config in found)
            assert layout_for(architecture, dtype, 64) == (MXLayout.FRAGMENTS if own else MXLayout.FWD)
            for config in found:
                config.check_fits(architecture, dtype)
    assert layout_for("sm_90", torch.bfloat16, 65) == MXLayout.FWD


def test_a_tiling_for_fragments_is_refused_where_it_cannot_run() -> None:
    config = Config(64, 256, 128, num_warps=8, num_stages=3, fragments=True)
    with pytest.raises(ValueError, match="is for bf16 on sm_90"):
        config.check_fits("sm_80", torch.bfloat16)
    for change in (
        {"BLOCK_M": 256},
        {"BLOCK_N": 128},
        {"num_warps": 2, "BLOCK_N": 64},
        {"num_stages": 2},
        {"hopper": True},
    ):
        with pytest.raises(ValueError, match=r"is for (fragments|hopper), which has"):
            replace(config, **change)
