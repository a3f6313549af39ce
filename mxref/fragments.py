"""The layout FRAGMENTS: codes in the order in which tensor cores take them, a bit-exact permutation of a checkpoint's.

A matrix instruction takes its left operand in fragments of 16 rows and 16 columns: a thread holds, of two rows and of
two pairs of columns, neighbours of one row together in 32 bits. Here 32 rows n and 32 columns k, one scale a row, are
one tile: 512 bytes of codes, 16 for each of a warp's 32 threads, and 32 bytes of scales.

    n = 32·G + 16·b + 8·i + 2·τ + q        k = 32·c + 16·j + 8·h + 2·t + p

    codes   [G, c, thread (b, τ, t), j, word q, 8 codes (i, h, p)]        scales  [G, c, τ, b, i, q]

Forward a thread's two fragments i are rows (b, τ) of two instructions, with q, h and p as the instruction wants them.
For dX the same 8 bytes (one j) are two fragments h of the transposed matrix: the two rows q of a column are neighbours
along that product's contraction.

The 32 bits of 8 codes lie where decoding needs the fewest instructions. In bf16 a code's sign is bit 15 and its
magnitude bits 8 to 6 (value · 2^−126). A word holds three pairs p with a code in each half of it, 0, 3 and 6 bits below
these places: one shift and one mask decode a pair. Four bits of each half are left, for the other word's fourth pair, p
= 0 in the upper half. The word rotated by 6 to the left and masked, a product with 2^2 + 2^7 + 2^12 brings them to
their places; no two of its terms meet. Every code lies within one half: for dX two words exchange halves before
anything is decoded, and have both q of one p.

Rows behind the last whole tile, N mod 32 of them, stay as they were.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE, pack_codes, unpack_codes

__all__ = ["REST", "SHIFTS", "SPREAD", "TILE", "from_fragments", "to_fragments"]

TILE = 32
"""Rows, and columns, of a tile."""

SHIFTS = (0, 3, 6)
"""By how many bits each pair of codes (i, h) but the last lies below bf16's places."""

REST, SPREAD = 0x001B001B, 1 << 2 | 1 << 7 | 1 << 12
"""The last pair's bits after a rotation by 6 to the left, and by what they are multiplied to come to bf16's places."""

_IN_BF16 = (6, 7, 8, 15)
"""Where bf16 has a code's bits, the lowest first."""

_LAST = (14, 10, 11, 13)
"""Where half a word has those of the last pair."""


def _places() -> list[int]:
    """For each bit of two words, which of 16 codes' 64 bits lies there; the codes are (i, h, q, p)."""
    found = {}
    for pair, q, p, bit in product(range(4), range(2), range(2), range(4)):
        word, half, at = (q, p, _IN_BF16[bit] - SHIFTS[pair]) if pair < 3 else (1 - q, 1 - p, _LAST[bit])
        found[32 * word + 16 * half + at] = 16 * pair + 8 * q + 4 * p + bit
    return [found[at] for at in range(64)]


_PLACES = torch.tensor(_places())


def to_fragments(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's bytes in the layout FWD, uint8 [N, K/2] and [N, K/32], as fragments; the same shapes."""
    whole, blocks = _whole(packed), scales.shape[1]
    new_packed, new_scales = packed.clone(), scales.clone()
    codes = unpack_codes(packed[:whole]).view(-1, 2, 2, 4, 2, blocks, 2, 2, 4, 2)
    sixteen = codes.permute(0, 5, 1, 3, 8, 6, 2, 7, 4, 9).reshape(-1, 16)
    new_packed[:whole] = _reorder(sixteen, _PLACES).view(whole, packed.shape[1])
    new_scales[:whole] = scales[:whole].view(-1, 2, 2, 4, 2, blocks).permute(0, 5, 3, 1, 2, 4).reshape(whole, blocks)
    return new_packed, new_scales


def from_fragments(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_fragments`."""
    whole, blocks = _whole(packed), scales.shape[1]
    old_packed, old_scales = packed.clone(), scales.clone()
    sixteen = unpack_codes(_reorder(unpack_codes(packed[:whole].view(-1, 8)), torch.argsort(_PLACES)))
    codes = sixteen.view(-1, blocks, 2, 4, 4, 2, 2, 2, 2, 2).permute(0, 2, 6, 3, 8, 1, 5, 7, 4, 9)
    old_packed[:whole] = pack_codes(codes.reshape(whole, MX_BLOCK_SIZE * blocks))
    old_scales[:whole] = scales[:whole].view(-1, blocks, 4, 2, 2, 2).permute(0, 3, 4, 2, 5, 1).reshape(whole, blocks)
    return old_packed, old_scales


def _whole(packed: Tensor) -> int:
    return packed.shape[0] // TILE * TILE


def _reorder(codes: Tensor, places: Tensor) -> Tensor:
    """[*, 16] codes of four bits -> [*, 8] bytes, whose bits are the codes' in the order of `places`."""
    bits = torch.stack([codes >> bit & 1 for bit in range(4)], -1).flatten(-2)
    octets = bits[:, places.to(codes.device)].view(-1, 8, 8)
    packed = octets[..., 0].clone()
    for bit in range(1, 8):
        packed |= octets[..., bit] << bit
    return packed
