"""Decoding against three independent implementations, on all 4096 pairs of code and scale byte, bit for bit."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.mx_tensor import to_dtype

from mxref.formats import decode_blocks, pack_codes

CODES = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
BYTES = np.arange(256, dtype=np.uint8)


def ours(dtype: torch.dtype) -> torch.Tensor:
    return decode_blocks(torch.from_numpy(CODES), torch.from_numpy(BYTES)[:, None], dtype)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal including the sign of zero; any NaN equals any NaN."""
    assert got.dtype == expected.dtype
    same = (got == expected) & (torch.signbit(got) == torch.signbit(expected)) | (got.isnan() & expected.isnan())
    wrong = [(byte, int(CODES[byte, k])) for byte, k in (~same).nonzero().tolist()]
    assert not wrong, f"(byte, code) with different bits: {wrong[:16]}"


def gfloat_decoded() -> np.ndarray:
    formats = gfloat.formats
    with np.errstate(invalid="ignore"):
        scales = gfloat.decode_ndarray(formats.format_info_ocp_e8m0, BYTES)
        return gfloat.decode_ndarray(formats.format_info_ocp_e2m1, CODES) * scales[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torchao(dtype):
    scales = torch.from_numpy(BYTES).view(torch.float8_e8m0fnu)
    theirs = to_dtype(pack_codes(torch.from_numpy(CODES)), scales, torch.float4_e2m1fn_x2, 32, dtype)
    assert_same_bits(ours(dtype), theirs)


def test_torchao_fp16_where_the_scale_itself_is_an_fp16_number():
    """torchao rounds the scale to fp16 before the product, so its fp16 holds only for scales 2^−24 .. 2^15."""
    scales = torch.from_numpy(BYTES).view(torch.float8_e8m0fnu)
    theirs = to_dtype(pack_codes(torch.from_numpy(CODES)), scales, torch.float4_e2m1fn_x2, 32, torch.float16)
    sound = slice(127 - 24, 127 + 15 + 1)
    assert_same_bits(ours(torch.float16)[sound], theirs[sound])
    outside = torch.ones(256, dtype=torch.bool)
    outside[sound] = False
    outside[255] = False
    assert (ours(torch.float16)[outside, 0] != theirs[outside, 0]).any(), "torchao's fp16 improved: widen this test"


@pytest.mark.parametrize(
    ("dtype", "info"),
    [
        (torch.float64, None),
        (torch.float32, gfloat.formats.format_info_binary32),
        (torch.bfloat16, gfloat.formats.format_info_bfloat16),
        (torch.float16, gfloat.formats.format_info_binary16),
    ],
)
def test_gfloat(dtype, info):
    exact = gfloat_decoded()
    rounded = exact if info is None else gfloat.round_ndarray(info, exact, gfloat.RoundMode.TiesToEven)
    assert_same_bits(ours(dtype).double(), torch.from_numpy(rounded))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [
        (torch.float64, np.float64),
        (torch.float32, np.float32),
        (torch.bfloat16, ml_dtypes.bfloat16),
        (torch.float16, np.float16),
    ],
)
def test_ml_dtypes(dtype, numpy_dtype):
    elements = CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        # Two significant bits times a power of two: exact in fp32 short of overflow, so this still rounds once.
        wide = np.float64 if dtype == torch.float64 else np.float32
        product = (elements.astype(wide) * scales.astype(wide)[:, None]).astype(numpy_dtype)
    assert_same_bits(ours(dtype).double(), torch.from_numpy(product.astype(np.float64)))
