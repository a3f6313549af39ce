"""Every code with every scale byte in every place of a block, and every two codes of a byte, seen through the product.

One-hot rows of x pick rows of W, one-hot rows of dOut pick its columns, so a product returns decoded weights bit for
bit (a sum of +0 products loses the sign of −0). Scale bytes that make an element infinite or NaN would spread through
0·inf; they have cases of their own, in which each such block meets no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxref.formats import E2M1_VALUES, E8M0_BIAS, MX_BLOCK_SIZE, decode_blocks, pack_codes
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.verification.cases.case import Case, Sample
from mxref.weights import MXWeights

_CODES = len(E2M1_VALUES)
_EXPERTS = 2  # among which the 16 blocks are dealt: K = N = 256 costs a kernel least
_BYTES_AT_ONCE = 4  # bounds the size of one non-finite sample; only fp16 has more bytes
_NAN_BYTE = 255
_ROWS = 17  # of an expert beside what is not finite: more than a small tile has
_LARGE = 2.0**126
"""Times the code 6 beyond fp32, and under bytes below 127 not."""


def element_cases(dtype: torch.dtype, nonfinite: bool = True) -> list[Case]:
    """All that decode to `dtype` can be asked through the products: finite bytes, then the others, a few at a time.

    In each non-finite case expert c holds code c on the diagonal of one 32 × 32 block a byte, and x and dOut are ones:
    Y and dX return the diagonals, infinities with their sign, NaN, and what is still finite. Beside zeros an infinite
    scale would look like NaN, 0·inf: last come whole blocks of one code under byte 255.
    """
    finite = finite_bytes(dtype)
    columns = -(-len(finite) // MX_BLOCK_SIZE) * MX_BLOCK_SIZE
    K = MX_BLOCK_SIZE * _CODES // _EXPERTS
    every = Case(
        f"every finite element, {_name(dtype)}", _EXPERTS, K, columns, _EXPERTS * K, 1, 0, dtype, data="elements"
    )
    return [every, *(_nonfinite_cases(dtype) if nonfinite else [])]


def element_cases_with_options(dtype: torch.dtype) -> list[Case]:
    """The same bytes for whatever decodes otherwise beside something else: each finite one with the flags, and every
    one with the flags, an adapter whose B is zero, zero biases, and gates of one.

    Last come products that are finite, and overflow where a block's scale is left until later.
    """
    every = [replace(case, use_fused_dX=True, use_fused_gather=True) for case in element_cases(dtype)]
    cases = [replace(every[0], name=f"{every[0].name}, fused")]
    for case in every:  # several rows an expert, as what decodes once for all of them has
        tokens = _ROWS * _CODES if case.data == "nonfinite" else case.tokens
        everything = replace(case, name=f"{case.name}, everything", rank=4, bias=True, gate_slots=1, tokens=tokens)
        cases.append(everything)
    for case in (every[0], every[-2]):  # the last bytes with the one that is NaN
        cases.append(replace(case, name=f"{case.name}, in expert order", grouped_in=True, grouped_out=True))
    cases.append(_by_expert(dtype))
    if dtype != torch.float16:
        large = replace(elements_to_128(dtype), scale_bytes=tuple(range(127)), special="large partners")
        cases.append(replace(large, name=f"bytes below 127 times 2^126, {_name(dtype)}"))
    return cases


def one_hot_elements(dtype: torch.dtype) -> Case:
    """One block of each finite scale byte through both products, a smaller `element_cases`."""
    N, name = len(finite_bytes(dtype)), f"one-hot, {_name(dtype)}"
    case = Case(name, 1, MX_BLOCK_SIZE, N, N, 1, 0, dtype, data="one_hot_elements")
    return replace(case, use_fused_dX=True, use_fused_gather=True)


def _by_expert(dtype: torch.dtype) -> Case:
    """One row an expert, who has one finite byte: what few rows choose reads every code under each."""
    experts, name = len(finite_bytes(dtype)), f"a finite byte an expert, {_name(dtype)}"
    return Case(name, experts, MX_BLOCK_SIZE, MX_BLOCK_SIZE, experts, 1, 0, dtype, data="elements_by_expert")


def elements_to_128(dtype: torch.dtype) -> Case:
    """`element_cases` of the bytes that one exact product decodes in 16 bits."""
    every = element_cases(dtype, nonfinite=False)[0]
    name = f"every element of bytes to 128, {_name(dtype)}"
    return replace(every, name=name, N=160, scale_bytes=tuple(range(129)))


def every_element(dtype: torch.dtype) -> Case:
    """`all_elements` as weights and no rows, for a decoder by itself."""
    K = MX_BLOCK_SIZE * _CODES // _EXPERTS
    return Case(f"every element, {_name(dtype)}", _EXPERTS, K, 256, 0, 1, 0, dtype, data="every_element")


def finite_bytes(dtype: torch.dtype) -> list[int]:
    """Scale bytes under which all 16 codes decode finitely: 0..252 in bf16 and fp32, 0..140 in fp16."""
    codes = torch.arange(_CODES, dtype=torch.uint8).repeat(2).expand(256, -1)
    decoded = decode_blocks(codes, torch.arange(256, dtype=torch.uint8)[:, None], dtype)
    return [int(byte) for byte in torch.isfinite(decoded).all(1).nonzero()[:, 0]]


def all_elements() -> MXWeights:
    """All 16 codes with all 256 scale bytes in all 32 places, and all 256 packed bytes: E = 2, N = 256, K = 256.

    Counting blocks through both experts, packed byte q of block j holds the codes j + q and j + 2q mod 16: over the 16
    blocks each place has each code, and the bytes are all different. A block's scale byte is its row's, and far from
    that in every second block: half of all bytes away, or as far from the other end.
    """
    return _weights(torch.arange(256))


def _without_rows(case: Case) -> Sample:
    none = torch.zeros(0, case.K, dtype=case.dtype), torch.zeros(0, case.N, dtype=case.dtype)
    return _sample(case, all_elements(), *none, torch.zeros(0, 1, dtype=torch.int64))


def _picks(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """One-hot rows."""
    return torch.eye(columns, dtype=dtype).repeat(-(-rows // columns), 1)[:rows]


def _nonfinite_cases(dtype: torch.dtype) -> list[Case]:
    finite = set(finite_bytes(dtype))
    others = [byte for byte in range(256) if byte not in finite]
    groups = [tuple(others[start : start + _BYTES_AT_ONCE]) for start in range(0, len(others), _BYTES_AT_ONCE)]
    named = {f"bytes {own[0]} to {own[-1]}": own for own in groups} | {"byte 255 alone": (_NAN_BYTE,)}
    sizes = {own: MX_BLOCK_SIZE * len(own) for own in named.values()}
    return [
        Case(
            f"{name}, {_name(dtype)}",
            _CODES,
            sizes[own],
            sizes[own],
            _CODES,
            1,
            0,
            dtype,
            data="nonfinite",
            scale_bytes=own,
        )
        for name, own in named.items()
    ]


def _finite(case: Case) -> Sample:
    """Each expert has K = 256 rows; x picks the rows of W, and dOut its columns (p mod N)."""
    bytes_ = list(case.scale_bytes) or finite_bytes(case.dtype)
    weights = _weights(torch.tensor(bytes_ + bytes_[: case.N - len(bytes_)]))
    E, K, N = weights.E, weights.K, weights.N
    x = torch.eye(K, dtype=case.dtype).repeat(E, 1)
    dY = _picks(K, N, case.dtype).repeat(E, 1)
    if case.special == "large partners":
        x, dY = x * _LARGE, dY * _LARGE
    return _sample(case, weights, x, dY, torch.arange(E).repeat_interleave(K)[:, None])


def _one_hot(case: Case) -> Sample:
    """One block a byte, the codes shifted by one from byte to byte."""
    bytes_ = torch.tensor(finite_bytes(case.dtype), dtype=torch.uint8)
    place = torch.arange(MX_BLOCK_SIZE, dtype=torch.uint8)
    codes = ((place + torch.arange(case.N, dtype=torch.uint8)[:, None]) % _CODES)[None]
    weights = MXWeights(pack_codes(codes), bytes_[None, :, None].clone(), case.K, case.N)
    x = _picks(case.N, case.K, case.dtype)
    return _sample(case, weights, x, torch.eye(case.N, dtype=case.dtype), torch.zeros(case.N, 1, dtype=torch.int64))


def _one_byte_an_expert(case: Case) -> Sample:
    """Each expert's row of x picks a column of W, which holds all codes, and its row of dOut a row."""
    bytes_ = torch.tensor(finite_bytes(case.dtype), dtype=torch.uint8)
    place = torch.arange(MX_BLOCK_SIZE, dtype=torch.uint8)
    codes = ((place + place[:, None]) % _CODES).expand(case.experts, -1, -1)
    scales = bytes_[:, None, None].expand(-1, case.N, 1).contiguous()
    picked = _picks(case.experts, MX_BLOCK_SIZE, case.dtype)
    weights = MXWeights(pack_codes(codes.contiguous()), scales, case.K, case.N)
    return _sample(case, weights, picked, picked.clone(), torch.arange(case.experts)[:, None])


def _nonfinite(case: Case) -> Sample:
    """Non-finite bytes on a diagonal of codes, or byte 255 alone with one code everywhere; rows of ones."""
    code = torch.arange(_CODES, dtype=torch.uint8)[:, None, None]
    if len(case.scale_bytes) == 1:
        codes = code.expand(-1, case.N, case.K)
        scales = torch.full((_CODES, case.N, 1), case.scale_bytes[0], dtype=torch.uint8)
    else:
        codes = code * torch.eye(case.N, dtype=torch.uint8)
        blocks = torch.full((len(case.scale_bytes),) * 2, E8M0_BIAS, dtype=torch.uint8)
        blocks.diagonal().copy_(torch.tensor(case.scale_bytes, dtype=torch.uint8))
        scales = blocks.repeat_interleave(MX_BLOCK_SIZE, 0).expand(_CODES, -1, -1).contiguous()
    ones = torch.ones(case.tokens, case.K, dtype=case.dtype)
    weights = MXWeights(pack_codes(codes), scales, case.K, case.N)
    experts = torch.arange(_CODES).repeat_interleave(case.tokens // _CODES)
    return _sample(case, weights, ones, ones.clone(), experts[:, None])


def _weights(bytes_: Tensor) -> MXWeights:
    N, blocks = bytes_.numel(), _CODES // _EXPERTS
    place = torch.arange(MX_BLOCK_SIZE)
    codes = (torch.arange(_CODES)[:, None] + place // 2 * (1 + place % 2)) % _CODES  # [16 blocks, 32 places]
    codes = codes.to(torch.uint8).view(_EXPERTS, 1, blocks * MX_BLOCK_SIZE).expand(-1, N, -1)
    rows = torch.stack((bytes_, bytes_.roll(N // 2), bytes_, bytes_.flip(0)), 1)
    scales = rows.to(torch.uint8).repeat(_EXPERTS, 1, blocks // 4).view(_EXPERTS, N, blocks)
    return MXWeights(pack_codes(codes), scales.contiguous(), blocks * MX_BLOCK_SIZE, N)


def _sample(case: Case, weights: MXWeights, x: Tensor, dY: Tensor, experts: Tensor) -> Sample:
    E, K, N, r = case.experts, case.K, case.N, case.rank
    problem = Problem(
        x,
        weights,
        1,
        *flatten_sort_count(experts, E),
        lora_A=torch.ones(E * r, K, dtype=x.dtype) if r else None,
        lora_B=torch.zeros(N, E * r, dtype=x.dtype) if r else None,
        scaling=case.scaling,
        expert_biases=torch.zeros(E, N, dtype=x.dtype) if case.bias else None,
        gates=torch.ones(len(x) // case.gate_slots, case.gate_slots, dtype=x.dtype) if case.gate_slots else None,
        grouped_in=case.grouped_in,
        grouped_out=case.grouped_out,
    )
    return Sample(case, problem, dY)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DRAWN: dict[str, Callable[[Case], Sample]] = {
    "elements": _finite,
    "one_hot_elements": _one_hot,
    "elements_by_expert": _one_byte_an_expert,
    "every_element": _without_rows,
    "nonfinite": _nonfinite,
}
"""By a case's data: its sample on the CPU; nothing is random."""
