"""Every code with every scale byte in every place of a block, seen through the matrix product itself.

One-hot rows of x pick rows of W, one-hot rows of dOut pick its columns, so a product returns decoded weights bit for
bit (a sum of +0 products loses the sign of −0). Scale bytes that make an element infinite or NaN would spread through
0·inf; they have samples of their own, in which each such block meets no other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxref.formats import E2M1_VALUES, E8M0_BIAS, MX_BLOCK_SIZE, decode_blocks, pack_codes
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.verification.cases.case import Case, Sample
from mxref.weights import MXWeights

__all__ = ["all_elements", "finite_bytes", "finite_sample", "nonfinite_samples"]

_CODES = len(E2M1_VALUES)
_EXPERTS = 2  # among which the 16 blocks are dealt: K = N = 256 costs a kernel least
_BYTES_AT_ONCE = 4  # bounds the size of one non-finite sample; only fp16 has more bytes


def finite_bytes(dtype: torch.dtype) -> list[int]:
    """Scale bytes under which all 16 codes decode finitely: 0..252 in bf16 and fp32, 0..140 in fp16."""
    codes = torch.arange(_CODES, dtype=torch.uint8).repeat(2).expand(256, -1)
    decoded = decode_blocks(codes, torch.arange(256, dtype=torch.uint8)[:, None], dtype)
    return [int(byte) for byte in torch.isfinite(decoded).all(1).nonzero()[:, 0]]


def all_elements() -> MXWeights:
    """All 16 codes with all 256 bytes in all 32 places: E = 2, N = 256 (the byte), K = 256.

    Counting blocks through both experts, element i of block j has code (i + j) mod 16, so over the 16 blocks each place
    holds each code.
    """
    return _weights(torch.arange(256))


def finite_sample(dtype: torch.dtype, device: torch.device | str) -> Sample:
    """All finite bytes: each expert has K = 256 rows; x picks the rows of W, and dOut its columns (p mod N)."""
    bytes_ = finite_bytes(dtype)
    bytes_ += bytes_[: -len(bytes_) % MX_BLOCK_SIZE]
    weights = _weights(torch.tensor(bytes_))
    E, K, N = weights.E, weights.K, weights.N
    case = Case(f"every finite element, {_name(dtype)}", E, K, N, E * K, 1, 0, dtype)
    x = torch.eye(K, dtype=dtype).repeat(E, 1)
    dY = torch.eye(N, dtype=dtype).repeat(-(-K // N), 1)[:K].repeat(E, 1)
    return _sample(case, weights, x, dY, torch.arange(E).repeat_interleave(K)[:, None], device)


def nonfinite_samples(dtype: torch.dtype, device: torch.device | str) -> Iterator[Sample]:
    """The other bytes, a few at a time: expert c holds code c, on the diagonal of one 32 × 32 block a byte.

    x and dOut are ones, so Y and dX return the diagonals: infinities with their sign, NaN, and what is still finite.
    Beside zeros an infinite scale would look like NaN, 0·inf: last come whole blocks of one code under byte 255.
    """
    finite = set(finite_bytes(dtype))
    others = [byte for byte in range(256) if byte not in finite]
    for start in range(0, len(others), _BYTES_AT_ONCE):
        own = others[start : start + _BYTES_AT_ONCE]
        size = MX_BLOCK_SIZE * len(own)
        codes = torch.arange(_CODES, dtype=torch.uint8)[:, None, None] * torch.eye(size, dtype=torch.uint8)
        scales = torch.full((len(own), len(own)), E8M0_BIAS, dtype=torch.uint8)
        scales.diagonal().copy_(torch.tensor(own, dtype=torch.uint8))
        scales = scales.repeat_interleave(MX_BLOCK_SIZE, 0).expand(_CODES, -1, -1)
        weights = MXWeights(pack_codes(codes), scales.contiguous(), size, size)
        case = Case(f"bytes {own[0]} to {own[-1]}, {_name(dtype)}", _CODES, size, size, _CODES, 1, 0, dtype)
        yield _ones(case, weights, device)
    size = MX_BLOCK_SIZE
    codes = torch.arange(_CODES, dtype=torch.uint8)[:, None, None].expand(-1, size, size)
    scales = torch.full((_CODES, size, 1), 255, dtype=torch.uint8)
    case = Case(f"byte 255 alone, {_name(dtype)}", _CODES, size, size, _CODES, 1, 0, dtype)
    yield _ones(case, MXWeights(pack_codes(codes), scales, size, size), device)


def _weights(bytes_: Tensor) -> MXWeights:
    N, blocks = bytes_.numel(), _CODES // _EXPERTS
    codes = (torch.arange(_CODES)[:, None] + torch.arange(MX_BLOCK_SIZE)) % _CODES  # [16 blocks, 32 places]
    codes = codes.to(torch.uint8).view(_EXPERTS, 1, blocks * MX_BLOCK_SIZE).expand(-1, N, -1)
    scales = bytes_.to(torch.uint8)[None, :, None].expand(_EXPERTS, -1, blocks)
    return MXWeights(pack_codes(codes), scales.contiguous(), blocks * MX_BLOCK_SIZE, N)


def _ones(case: Case, weights: MXWeights, device: torch.device | str) -> Sample:
    """A row of ones for each expert, both ways."""
    ones = torch.ones(_CODES, weights.K, dtype=case.dtype)
    return _sample(case, weights, ones, ones.clone(), torch.arange(_CODES)[:, None], device)


def _sample(
    case: Case, weights: MXWeights, x: Tensor, dY: Tensor, experts: Tensor, device: torch.device | str
) -> Sample:
    idxs, positions, offsets = (index.to(device) for index in flatten_sort_count(experts, case.experts))
    problem = Problem(x.to(device), weights.to(device), 1, idxs, positions, offsets)
    problem.validate(check_values=True)
    return Sample(case, problem, dY.to(device))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
