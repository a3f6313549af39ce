"""Encoding against torchao's four scale modes: bit-equal, except in the classes of one table.

Where the two differ, ours follows the definition (`test_formats.py` proves it in rational arithmetic) and the table
says what torchao does instead (0.18, eager).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from mxref.formats import SCALE_MODES, encode_blocks, unpack_codes

BITWISE = ("floor", "ceil", "even")  # torchao reads the exponent from the bits
LOGARITHMIC = ("rceil",)  # torchao takes ceil(log2(amax / 6)) in fp32


@dataclass(frozen=True)
class Disagreement:
    """A class of blocks that torchao encodes in another way.

    Attributes:
        modes: the scale modes it concerns.
        applies: (amax fp64 [n], our scale byte [n]) -> bool [n].
        torchao_byte: our byte -> torchao's byte in this class.
        why: what torchao does.
    """

    modes: tuple[str, ...]
    applies: Callable[[Tensor, Tensor], Tensor]
    torchao_byte: Callable[[Tensor], Tensor]
    why: str


def rounds_to_a_power_of_two(amax: Tensor, _byte: Tensor) -> Tensor:
    """6·2^n < amax, by so little that log2(amax / 6) rounds to n in fp32."""
    exact = amax / 6
    below = torch.exp2(torch.floor(torch.log2(exact)))
    rounded = torch.log2(exact.float())
    return amax.isfinite() & (exact > below) & (exact <= below * (1 + 2.0**-17)) & (rounded == torch.round(rounded))


DISAGREEMENTS = {
    "NaN block": Disagreement(
        SCALE_MODES,
        lambda amax, _: amax.isnan(),
        lambda byte: byte,
        "Both write scale byte 255, so both decode to NaN. Its codes carry no value: we write 0, torchao leaves "
        "whatever NaN / inf rounds to.",
    ),
    "infinite amax": Disagreement(
        BITWISE,
        lambda amax, _: amax.isinf(),
        lambda byte: torch.full_like(byte, 253),
        "torchao takes the exponent field of inf, 128, for an exponent and saturates: inf becomes the finite 6·2^126. "
        "MXFP4 has no infinities; we write NaN.",
    ),
    "infinite amax, rceil": Disagreement(
        LOGARITHMIC,
        lambda amax, _: amax.isinf(),
        lambda byte: torch.full_like(byte, 254),
        "torchao follows cvt.rp.satfinite.ue8m0x2 and saturates the scale at 2^127: inf becomes 6·2^127. We write NaN.",
    ),
    "scale byte 0": Disagreement(
        BITWISE,
        lambda _, byte: byte == 0,
        lambda byte: byte,
        "torchao writes byte 0, 2^−127, but divides by 2^−126, the smallest normal fp32: its codes are those of half "
        "the value.",
    ),
    "scale byte 0, rceil": Disagreement(
        LOGARITHMIC,
        lambda _, byte: byte == 0,
        lambda byte: byte,
        "torchao multiplies by 1 where 2^127 is meant: every element of such a block becomes a zero.",
    ),
    "log2 rounds to an integer": Disagreement(
        LOGARITHMIC,
        lambda amax, byte: rounds_to_a_power_of_two(amax, byte) & (byte > 0),
        lambda byte: byte - 1,
        "The fp32 logarithm of a number just above a power of two is the integer itself, so torchao's ceil misses the "
        "step up and the largest element saturates.",
    ),
}


def probes() -> Tensor:
    """fp32 blocks [n, 32]: amax on and beside each threshold in every binade, subnormals, 0, inf, NaN, random fill."""
    generator = torch.Generator().manual_seed(0)
    ulp = 2.0**-23
    mantissas = [1.0, 1 + ulp, 1.25, 1.5 - ulp, 1.5, 1.5 + ulp, 1.5 + 8 * ulp, 1.75 - ulp, 1.75, 1.75 + ulp, 2 - ulp]
    tops = [m * 2.0**e for e in range(-149, 128) for m in mantissas] + [0.0, -0.0, torch.inf, -torch.inf, torch.nan]
    amax = torch.tensor(tops, dtype=torch.float64).float()
    fill = (torch.rand(len(tops), 31, generator=generator) * 2 - 1) * torch.where(amax.isfinite(), amax, 1.0)[:, None]
    signs = torch.randint(0, 2, (len(tops), 1), generator=generator) * 2.0 - 1
    position = torch.randint(0, 32, (len(tops), 1), generator=generator)
    blocks = torch.cat([fill, fill[:, :1]], dim=1).scatter(1, position, amax[:, None] * signs)
    grid = torch.randint(-24, 25, (512, 32), generator=generator) * 0.25  # every tie and every code, under one scale
    return torch.cat([blocks, grid, torch.randn(512, 32, generator=generator)])


def torchao_encode(w: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    scales, packed = to_mx(w, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode.upper()])
    return unpack_codes(packed), scales.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", SCALE_MODES)
def test_every_disagreement_is_in_exactly_one_class(mode, dtype):
    w = probes().to(dtype)
    codes, scales = (x.long() for x in encode_blocks(w, mode))
    their_codes, their_scales = (x.long() for x in torchao_encode(w, mode))
    amax, byte, their_byte = w.double().abs().amax(dim=1), scales[:, 0], their_scales[:, 0]
    differs = (codes != their_codes).any(dim=1) | (byte != their_byte)

    classes = {name: d for name, d in DISAGREEMENTS.items() if mode in d.modes}
    member = torch.stack([d.applies(amax, byte) for d in classes.values()])
    unexplained = (differs & (member.sum(dim=0) != 1)).nonzero().flatten().tolist()
    assert not unexplained, [(amax[i].item().hex(), byte[i].item(), their_byte[i].item()) for i in unexplained[:8]]

    for (name, disagreement), inside in zip(classes.items(), member, strict=True):
        rows = inside & differs
        assert torch.equal(their_byte[rows], disagreement.torchao_byte(byte[rows])), name
        if dtype == torch.float32:
            assert rows.any(), f"no probe shows {name!r} in {mode} any more: torchao changed, drop it from the table"


@pytest.mark.parametrize("mode", BITWISE)
def test_scale_byte_0_holds_the_codes_of_half_the_value(mode):
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 2.0**-129
    codes, scales = encode_blocks(w, mode)
    half_codes, half_scales = encode_blocks(w.double() / 2, mode)
    assert (scales == 0).all()
    assert (half_scales == 0).all()
    assert torch.equal(torchao_encode(w, mode)[0], half_codes)
    assert not torch.equal(codes, half_codes)


def test_scale_byte_0_under_rceil_loses_every_element():
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 2.0**-129
    codes, _ = torchao_encode(w, "rceil")
    assert (codes & 7 == 0).all()
    assert (encode_blocks(w, "rceil")[0] & 7 != 0).any()
