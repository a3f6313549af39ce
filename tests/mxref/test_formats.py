"""E2M1, E8M0, packing and encoding against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mxref import formats
from mxref.formats import (
    E2M1_VALUES,
    MX_BLOCK_SIZE,
    MXFP4,
    SCALE_MODES,
    decode_blocks,
    decode_scales,
    encode_blocks,
    fp4_codebook,
    pack_codes,
    unpack_codes,
)

MAGNITUDES = [Fraction(m) for m in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
# Codes 0..15, twice, under each of the 256 scale bytes.
ALL_CODES = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
ALL_SCALES = ALL_BYTES[:, None]
E2M1_HALF = torch.tensor([float(m) for m in MAGNITUDES])

finite_fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
blocks_fp32 = st.lists(finite_fp32, min_size=MX_BLOCK_SIZE, max_size=MX_BLOCK_SIZE)
code_rows = st.integers(0, 8).flatmap(lambda half: st.lists(st.integers(0, 15), min_size=2 * half, max_size=2 * half))


class TestE2M1:
    def test_codebook_is_the_specification_s_table(self):
        assert [Fraction(v) for v in E2M1_VALUES[:8]] == MAGNITUDES
        assert [Fraction(-v) for v in E2M1_VALUES[8:]] == MAGNITUDES

    def test_code_8_is_minus_zero(self):
        book = fp4_codebook("cpu")
        assert book[8] == 0
        assert torch.signbit(book).tolist() == [False] * 8 + [True] * 8

    def test_names_and_numbers(self):
        assert (MXFP4.name, MXFP4.element.name, MXFP4.scale.name) == ("MXFP4", "E2M1", "E8M0")
        assert len(MXFP4.element.values) == 2**MXFP4.element.bits
        assert MXFP4.element.values[MXFP4.element.sign] == 0
        assert MXFP4.element.magnitudes[-1] == 1.5 * 2**MXFP4.element.max_exponent
        assert MXFP4.packed_shape(3, 5, 96) == (3, 5, 48)
        assert MXFP4.scales_shape(3, 5, 96) == (3, 5, 3)

    @pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
    def test_modes_leave_nothing_behind(self, monkeypatch, mode):
        """What a mode makes must not serve later calls, and what there is already must not disturb the mode."""
        monkeypatch.setattr(formats, "_codebooks", {})
        for _ in range(2):
            with mode():
                codes, scales = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
                assert decode_blocks(codes, scales, torch.float32).shape == (2, 32)
                encode_blocks(torch.ones(2, 32))
                assert fp4_codebook("cpu").double().shape == (16,)
            assert torch.equal(decode_blocks(ALL_CODES, ALL_SCALES, torch.float64)[127, :8].float(), E2M1_HALF)
            book = fp4_codebook("cpu")
            assert type(book) is torch.Tensor
            assert not book.is_inference()
            assert book.tolist() == list(E2M1_VALUES)

    def test_codebook_is_cached_per_device(self):
        assert fp4_codebook("cpu") is fp4_codebook(torch.device("cpu"))
        assert fp4_codebook("cpu").dtype == torch.float32


class TestE8M0:
    def test_every_byte_is_its_power_of_two(self):
        values = decode_scales(ALL_BYTES)
        for byte in range(255):
            assert Fraction(values[byte].item()) == Fraction(2) ** (byte - 127)
        assert values[255].isnan()

    def test_byte_0_is_not_zero(self):
        assert decode_scales(torch.zeros(1, dtype=torch.uint8)).item() == 2.0**-127


class TestPacking:
    @given(code_rows)
    def test_round_trip_from_codes(self, codes):
        row = torch.tensor(codes, dtype=torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(row)), row)

    def test_round_trip_from_every_byte(self):
        assert torch.equal(pack_codes(unpack_codes(ALL_BYTES)), ALL_BYTES)

    def test_even_element_lies_in_the_low_nibble(self):
        assert pack_codes(torch.tensor([0x3, 0xA], dtype=torch.uint8)).tolist() == [0xA3]

    def test_odd_length_is_refused(self):
        with pytest.raises(ValueError, match="codes has 3 elements"):
            pack_codes(torch.zeros(3, dtype=torch.uint8))

    def test_a_code_above_15_is_refused(self):
        with pytest.raises(ValueError, match="codes holds 16"):
            pack_codes(torch.tensor([1, 16], dtype=torch.uint8))

    @pytest.mark.parametrize("verb", [pack_codes, unpack_codes, decode_scales])
    def test_only_raw_bytes_are_taken(self, verb):
        with pytest.raises(TypeError, match="uint8"):
            verb(torch.zeros(4, dtype=torch.int8))


def nearest(exact: Fraction, dtype: torch.dtype) -> float:
    """Round half to even to `dtype`, by integer arithmetic alone."""
    precision, lowest, largest = {
        torch.float64: (53, -1022, 1023),
        torch.float32: (24, -126, 127),
        torch.bfloat16: (8, -126, 127),
        torch.float16: (11, -14, 15),
    }[dtype]
    if exact == 0:
        return 0.0
    exponent = max(floor_log2(abs(exact)), lowest)
    quantum = Fraction(2) ** (exponent - precision + 1)
    rounded = round(exact / quantum) * quantum  # round() of a Fraction ties to even
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return float("inf") if exact > 0 else -float("inf")
    return float(rounded)


def floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


class TestDecode:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_all_4096_cases_are_the_exact_product_rounded_once(self, dtype):
        decoded = decode_blocks(ALL_CODES, ALL_SCALES, dtype)
        assert decoded.dtype == dtype
        assert torch.equal(torch.signbit(decoded[:255]), (ALL_CODES[:255] >> 3).bool())
        for byte in range(255):
            scale = Fraction(2) ** (byte - 127)
            expected = [nearest(Fraction(v) * scale, dtype) for v in E2M1_VALUES]
            assert decoded[byte, :16].double().tolist() == expected, f"scale byte {byte}"
            assert torch.equal(decoded[byte, :16], decoded[byte, 16:])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_byte_255_makes_the_whole_block_nan(self, dtype):
        scales = torch.tensor([127, 255, 127], dtype=torch.uint8)
        codes = torch.arange(96, dtype=torch.uint8) % 16
        decoded = decode_blocks(codes, scales, dtype).view(3, 32)
        assert decoded.isnan().all(dim=1).tolist() == [False, True, False]
        assert not decoded[[0, 2]].isnan().any()

    def test_where_bf16_stops_being_exact(self):
        exact = decode_blocks(ALL_CODES, ALL_SCALES, torch.float64)
        decoded = decode_blocks(ALL_CODES, ALL_SCALES, torch.bfloat16).double()
        inexact = (decoded != exact) & ~exact.isnan()
        assert inexact.any(dim=1).nonzero().flatten().tolist() == [253, 254]
        overflows = {byte: (decoded[byte, :8] == torch.inf).nonzero().flatten().tolist() for byte in (253, 254)}
        assert overflows == {253: [6, 7], 254: [4, 5, 6, 7]}

    def test_where_fp16_is_exact(self):
        exact = decode_blocks(ALL_CODES, ALL_SCALES, torch.float64)
        decoded = decode_blocks(ALL_CODES, ALL_SCALES, torch.float16).double()
        assert (decoded == exact).all(dim=1).nonzero().flatten().tolist() == list(range(104, 141))

    def test_scales_of_another_shape_are_refused(self):
        with pytest.raises(ValueError, match="scales has shape"):
            decode_blocks(ALL_CODES, ALL_BYTES, torch.float32)
        with pytest.raises(ValueError, match="block size 32"):
            decode_blocks(ALL_CODES[:, :16], ALL_SCALES, torch.float32)

    def test_signed_codes_and_other_dtypes_are_refused(self):
        with pytest.raises(TypeError, match="codes is"):
            decode_blocks(ALL_CODES.to(torch.int8), ALL_SCALES, torch.float32)
        with pytest.raises(TypeError, match="float8"):
            decode_blocks(ALL_CODES, ALL_SCALES, torch.float8_e4m3fn)


def reference_scale(amax: Fraction, mode: str) -> int:
    """The scale byte, straight from the definition of each mode."""
    if amax == 0:
        return 0
    if mode == "rceil":
        ratio = amax / 6
        exponent = floor_log2(ratio) + (Fraction(2) ** floor_log2(ratio) < ratio)
    elif mode == "ceil":
        exponent = floor_log2(amax) + (Fraction(2) ** floor_log2(amax) < amax) - 2
    elif mode == "even":
        exponent = floor_log2(amax) + (amax >= Fraction(7, 4) * Fraction(2) ** floor_log2(amax)) - 2
    else:
        exponent = floor_log2(amax) - 2
    return min(max(exponent, -127), 127) + 127


def reference_code(x: float, scale: Fraction) -> int:
    """The nearest magnitude by search, ties to the even code; the sign from `x`, even of −0."""
    target = abs(Fraction(x)) / scale
    code = min(range(8), key=lambda c: (abs(MAGNITUDES[c] - target), c % 2))
    return code | (8 if str(x).startswith("-") else 0)


@pytest.mark.parametrize("mode", SCALE_MODES)
class TestEncode:
    @given(values=blocks_fp32)
    @settings(max_examples=60)
    def test_agrees_with_rational_arithmetic(self, mode, values):
        codes, scales = encode_blocks(torch.tensor(values, dtype=torch.float64), mode)
        byte = reference_scale(max(abs(Fraction(v)) for v in values), mode)
        assert scales.tolist() == [byte]
        assert codes.tolist() == [reference_code(v, Fraction(2) ** (byte - 127)) for v in values]

    def test_powers_of_two_and_their_neighbours(self, mode):
        """amax = m·2^e for every fp32 exponent, m on and one fp32 ulp beside each mode's threshold."""
        ulp = 2.0**-23
        mantissas = [m + d for m in (1.0, 1.5, 1.75) for d in (-ulp / 2 if m == 1 else -ulp, 0.0, ulp)]
        amax = torch.tensor([[m * 2.0**e for m in mantissas] for e in range(-126, 127)], dtype=torch.float64)
        _, scales = encode_blocks(amax.reshape(-1, 1).repeat(1, MX_BLOCK_SIZE), mode)
        assert scales.flatten().tolist() == [reference_scale(Fraction(a), mode) for a in amax.flatten().tolist()]

    @given(codes=st.lists(st.integers(0, 15), min_size=32, max_size=32), byte=st.integers(0, 254))
    @settings(max_examples=60)
    def test_encoding_again_changes_no_value(self, mode, codes, byte):
        """encode(decode(.)) may pick another scale, but a second pass keeps every value that the first one left."""
        block = torch.tensor(codes, dtype=torch.uint8), torch.tensor([byte], dtype=torch.uint8)
        once = encode_blocks(decode_blocks(*block, torch.float64), mode)
        value = decode_blocks(*once, torch.float64)
        twice = encode_blocks(value, mode)
        assert torch.equal(decode_blocks(*twice, torch.float64), value)

    @given(values=blocks_fp32)
    @settings(max_examples=60)
    def test_only_floor_and_even_saturate(self, mode, values):
        w = torch.tensor(values, dtype=torch.float64)
        codes, scales = encode_blocks(w, mode)
        beyond = w.abs() > 6 * decode_scales(scales)
        assert (codes[beyond] & 7).tolist() == [7] * int(beyond.sum())
        if mode in ("rceil", "ceil"):
            assert not beyond.any()

    def test_zeros_keep_their_signs_under_scale_byte_0(self, mode):
        w = torch.zeros(MX_BLOCK_SIZE)
        w[1::2] = -0.0
        codes, scales = encode_blocks(w, mode)
        assert scales.tolist() == [0]
        assert codes.tolist() == [0, 8] * 16

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_block_with_nan_or_infinity_becomes_nan(self, mode, bad):
        w = torch.ones(3, MX_BLOCK_SIZE)
        w[1, 7] = bad
        codes, scales = encode_blocks(w, mode)
        assert (scales.flatten() == 255).tolist() == [False, True, False]
        assert codes[1].tolist() == [0] * MX_BLOCK_SIZE
        assert torch.equal(codes[0], codes[2])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_the_largest_and_smallest_numbers_of_a_dtype(self, mode, dtype):
        info = torch.finfo(dtype)
        for amax in (info.max, info.tiny, info.smallest_normal, 2.0**-149 if dtype == torch.float32 else info.tiny):
            w = torch.full((MX_BLOCK_SIZE,), amax, dtype=dtype)
            codes, scales = encode_blocks(w, mode)
            byte = reference_scale(Fraction(w[0].item()), mode)
            assert scales.tolist() == [byte]
            assert codes[0] == reference_code(w[0].item(), Fraction(2) ** (byte - 127))

    def test_dtype_of_the_input_does_not_matter(self, mode):
        w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        for dtype in (torch.float32, torch.float64):
            for ours, theirs in zip(encode_blocks(w, mode), encode_blocks(w.to(dtype), mode), strict=True):
                assert torch.equal(ours, theirs)


def test_floor_of_a_decoded_block_is_idempotent_in_bits():
    """floor finds the scale again whenever the block uses the top binade, codes ±4 and ±6: then the bits survive."""
    codes = torch.randint(0, 16, (255, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[:, 5] = 6
    scales = ALL_BYTES[:255, None]
    again = encode_blocks(decode_blocks(codes, scales, torch.float64), "floor")
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_integers_unknown_modes_and_ragged_rows_are_refused():
    with pytest.raises(TypeError, match=r"w is torch\.int64"):
        encode_blocks(torch.ones(32, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale_mode is 'nearest'"):
        encode_blocks(torch.ones(32), "nearest")
    with pytest.raises(ValueError, match="w has shape"):
        encode_blocks(torch.ones(4, 48))
