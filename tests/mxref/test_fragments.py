"""The layout FRAGMENTS: a permutation of every bit, undone exactly, that no decoding notices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxref.fragments import REST, SHIFTS, SPREAD, TILE, from_fragments, to_fragments
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.weights import MXLayout, MXWeights, decode_mxfp4

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 100), st.integers(1, 8).map(lambda blocks: 32 * blocks))


def stack(E: int, N: int, K: int, largest: int = 255) -> MXWeights:
    generator = torch.Generator().manual_seed(E * N * K)
    packed = torch.randint(0, 256, (E, N, K // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, largest + 1, (E, N, K // 32), generator=generator).to(torch.uint8)
    return MXWeights(packed, scales, K, N)


@given(SIZES)
@settings(max_examples=30)
def test_there_and_back_gives_the_bytes_of_before(sizes: tuple[int, int, int]) -> None:
    weights = stack(*sizes)
    again = weights.repack(MXLayout.FRAGMENTS).repack(MXLayout.FWD)
    assert again.layout == MXLayout.FWD
    assert torch.equal(again.packed, weights.packed)
    assert torch.equal(again.scales, weights.scales)
    assert torch.equal(torch.stack(again.to_gpt_oss()[1:]), torch.stack(weights.to_gpt_oss()[1:]))


@given(SIZES)
@settings(max_examples=20)
def test_any_bytes_are_fragments_of_something(sizes: tuple[int, int, int]) -> None:
    """With the other direction above: the arrangement is a bijection."""
    weights = stack(*sizes)
    packed, scales = from_fragments(weights.packed[0], weights.scales[0])
    packed, scales = to_fragments(packed, scales)
    assert torch.equal(packed, weights.packed[0])
    assert torch.equal(scales, weights.scales[0])


@given(SIZES)
@settings(max_examples=20)
def test_decoding_does_not_notice(sizes: tuple[int, int, int]) -> None:
    weights = stack(*sizes)
    fragments = weights.repack(MXLayout.FRAGMENTS)
    assert fragments.nbytes == weights.nbytes
    assert torch.equal(fragments.codes(), weights.codes())
    W = decode_mxfp4(weights)
    assert torch.equal(decode_mxfp4(fragments).nan_to_num(7.0), W.nan_to_num(7.0))
    chosen = fragments.select(torch.tensor([weights.E - 1, 0]))
    assert torch.equal(decode_mxfp4(chosen).nan_to_num(7.0), W[[-1, 0]].nan_to_num(7.0))


@pytest.mark.parametrize("bit", range(4))
def test_each_bit_of_a_code_lies_where_the_layout_says(bit: int) -> None:
    """By the formula of `mxref.fragments`, one code at a time."""
    N, K, sign_and_magnitude = 64, 96, (6, 7, 8, 15)
    for n, k in [(0, 0), (1, 1), (8, 9), (27, 30), (33, 40), (61, 95)]:
        codes = torch.zeros(N, K, dtype=torch.uint8)
        codes[n, k] = 1 << bit
        packed, _ = to_fragments(codes[:, ::2] | codes[:, 1::2] << 4, torch.zeros(N, K // 32, dtype=torch.uint8))
        (byte,) = packed.flatten().nonzero().flatten().tolist()
        at = 8 * byte + packed.flatten()[byte].item().bit_length() - 1
        G, b, i, tau, q = n // 32, n // 16 % 2, n // 8 % 2, n // 2 % 4, n % 2
        c, j, h, t, p = k // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
        word = ((((G * (K // 32) + c) * 32 + 16 * b + 4 * tau + t) * 2 + j) * 2 + (q if not i or not h else 1 - q)) * 32
        place = sign_and_magnitude[bit] + 16 * p
        if i and h:
            rotated = 1 << (at - word + 6) % 32
            assert rotated & REST
            assert rotated * SPREAD & 0x81C081C0 == 1 << place, (n, k)
        else:
            assert at == word + place - SHIFTS[2 * i + h], (n, k)


def test_rows_behind_the_last_whole_tile_stay() -> None:
    weights = stack(2, TILE + 5, 64)
    fragments = weights.repack(MXLayout.FRAGMENTS)
    assert torch.equal(fragments.packed[:, TILE:], weights.packed[:, TILE:])
    assert not torch.equal(fragments.packed[:, :TILE], weights.packed[:, :TILE])


@pytest.mark.parametrize(("largest", "small"), [(128, True), (129, False)])
def test_repacking_notes_whether_all_scales_are_small(largest: int, small: bool) -> None:
    weights = stack(2, 32, 64, largest=100)
    weights.scales[-1, -1, -1] = largest
    fragments = weights.repack(MXLayout.FRAGMENTS)
    assert not weights.scales_to_128
    assert fragments.scales_to_128 is small
    assert fragments.rebuild(fragments.packed, fragments.scales, fragments.stored).scales_to_128 is small
    assert fragments.to("cpu").layout == fragments.select(torch.tensor([0])).layout == MXLayout.FRAGMENTS
    assert fragments.repack(MXLayout.FRAGMENTS) is fragments


def test_a_layout_that_a_reader_does_not_know_is_refused_with_the_way_out() -> None:
    fragments = stack(1, 32, 32).repack(MXLayout.FRAGMENTS)
    with pytest.raises(
        ValueError, match=r"layout FRAGMENTS; a gpt-oss checkpoint reads FWD: call repack\(MXLayout.FWD\)"
    ):
        fragments.to_gpt_oss()


def test_the_golden_layer_reads_both() -> None:
    from mxref import parallel_linear_lora

    generator = torch.Generator().manual_seed(0)
    weights = stack(2, 40, 64, largest=130)
    weights.scales.clamp_(min=120)
    routing = flatten_sort_count(torch.randint(0, 2, (5, 2), generator=generator), 2)
    results = []
    for w in (weights, weights.repack(MXLayout.FRAGMENTS)):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()
        y = parallel_linear_lora(x, w, 2, *routing)
        results.append((y, *torch.autograd.grad(y.float().sum(), x)))
        assert torch.equal(
            Problem(x, w, 2, *routing).expert_weight(1), Problem(x, weights, 2, *routing).expert_weight(1)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
