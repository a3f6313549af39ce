"""MXWeights: what it accepts, what it refuses and says, and its conversions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxref.formats import SCALE_MODES, decode_blocks, encode_blocks, unpack_codes
from mxref.weights import MXLayout, MXWeights, decode_mxfp4, encode_mxfp4

E, N, K = 3, 5, 96


def buffers(*, experts: int = E, rows: int = N, columns: int = K, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    return packed, scales


def stack(**sizes: int) -> MXWeights:
    packed, scales = buffers(**sizes)
    return MXWeights(packed, scales, packed.shape[2] * 2, packed.shape[1])


class TestAccepts:
    def test_fields_and_defaults(self):
        packed, scales = buffers()
        weights = MXWeights(packed, scales, K, N)
        assert (weights.E, weights.num_experts, weights.block_size, weights.layout) == (E, E, 32, MXLayout.FWD)
        assert weights.orig_dtype == torch.bfloat16
        assert weights.device == packed.device
        assert weights.packed is packed
        assert weights.scales is scales

    def test_layout_given_as_its_number(self):
        assert MXWeights(*buffers(), K, N, layout=0).layout is MXLayout.FWD

    def test_scales_typed_as_e8m0_are_the_same_bytes(self):
        packed, scales = buffers()
        typed = MXWeights(packed, scales.view(torch.float8_e8m0fnu), K, N)
        assert typed.scales.dtype == torch.uint8
        assert torch.equal(typed.scales, scales)

    def test_one_matrix_is_one_expert(self):
        packed, scales = buffers(experts=1)
        assert MXWeights(packed[0], scales[0], K, N).E == 1


class TestRefuses:
    """Each refusal names the argument, what it got, and what it needs."""

    @pytest.mark.parametrize("name", ["packed", "scales"])
    def test_strided_bytes(self, name: str) -> None:
        given = dict(zip(("packed", "scales"), buffers(), strict=True))
        given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
        with pytest.raises(ValueError, match=rf"{name} has shape .* and strides .*; expected contiguous bytes"):
            MXWeights(given["packed"], given["scales"], K, N)

    def test_reading_another_layout(self) -> None:
        weights = MXWeights(*buffers(), K, N)
        object.__setattr__(weights, "layout", 7)
        for read in (MXWeights.codes, decode_mxfp4, MXWeights.to_gpt_oss, MXWeights.to_torchao):
            with pytest.raises(ValueError, match=r"the weights have layout 7; .* reads FWD"):
                read(weights)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"K": 64}, r"packed has shape \(3, 5, 48\); expected \[E, N, K/2\] = \(3, 5, 32\)"),
            ({"N": 4}, r"packed has shape \(3, 5, 48\); expected \[E, N, K/2\] = \(3, 4, 48\)"),
            ({"num_experts": 2}, r"packed has shape .* = \(2, 5, 48\)"),
            ({"K": 95}, "K is 95; expected a positive multiple of the block size 32"),
            ({"K": 0}, "K is 0"),
            ({"K": -32}, "K is -32"),
            ({"N": 0}, "N is 0"),
            ({"block_size": 16}, "block_size is 16; MXFP4 has blocks of 32"),
            ({"layout": 7}, "layout is 7; expected one of FWD = 0"),
        ],
    )
    def test_sizes_that_do_not_fit(self, change, message):
        arguments = {"K": K, "N": N, **change}
        with pytest.raises(ValueError, match=message):
            MXWeights(*buffers(), **arguments)

    @pytest.mark.parametrize("change", [{"K": 96.0}, {"N": True}, {"orig_dtype": torch.int8}])
    def test_sizes_of_another_type(self, change):
        with pytest.raises(TypeError, match=next(iter(change))):
            MXWeights(*buffers(), **{"K": K, "N": N, **change})

    def test_scales_of_another_shape(self):
        packed, scales = buffers()
        for wrong in (scales[:, :, :2], scales[:2], scales.transpose(1, 2), scales[..., None], scales.flatten()):
            with pytest.raises(ValueError, match="scales has shape"):
                MXWeights(packed, wrong, K, N)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn, torch.bfloat16])
    def test_scales_whose_bytes_mean_something_else(self, dtype):
        """Nothing is reinterpreted: scales as numbers, signed bytes or NVFP4's e4m3 scales are refused."""
        packed, scales = buffers()
        with pytest.raises(TypeError, match=r"scales is .*expected E8M0 bytes"):
            MXWeights(packed, scales.to(dtype), K, N)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16])
    def test_packed_of_another_dtype(self, dtype):
        packed, scales = buffers()
        with pytest.raises(TypeError, match=r"packed is .*expected torch.uint8"):
            MXWeights(packed.to(dtype), scales, K, N)

    def test_swizzled_scales_by_name(self):
        to_blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
        packed, scales = buffers()
        swizzled = torch.stack([to_blocked(expert) for expert in scales])
        assert swizzled.numel() != scales.numel()
        with pytest.raises(ValueError, match="swizzled"):
            MXWeights(packed, swizzled, K, N)
        with pytest.raises(ValueError, match="swizzled"):
            MXWeights(packed, to_blocked(scales.flatten(0, 1)), K, N)

    def test_swizzled_scales_without_padding_still_differ_in_shape(self):
        """[128, 4] scales need no padding: the element counts agree, the flat shape gives them away."""
        to_blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
        packed, scales = buffers(experts=1, rows=128, columns=128)
        with pytest.raises(ValueError, match="scales has shape"):
            MXWeights(packed, to_blocked(scales[0]).flatten(), 128, 128)

    def test_buffers_on_two_devices(self):
        packed, scales = buffers()
        with pytest.raises(ValueError, match="one device"):
            MXWeights(packed, scales.to("meta"), K, N)


class TestSelect:
    @given(ids=st.lists(st.integers(0, E - 1), max_size=6))
    def test_takes_experts_in_the_given_order(self, ids):
        weights = stack()
        chosen = weights.select(torch.tensor(ids, dtype=torch.int64))
        assert chosen.E == chosen.num_experts == len(ids)
        for position, expert in enumerate(ids):
            assert torch.equal(chosen.packed[position], weights.packed[expert])
            assert torch.equal(chosen.scales[position], weights.scales[expert])

    def test_is_a_copy(self):
        weights = stack()
        before = weights.packed.clone()
        weights.select(torch.tensor([0])).packed.zero_()
        assert torch.equal(weights.packed, before)

    @pytest.mark.parametrize("ids", [[-1], [0, E]])
    def test_ids_out_of_range_are_refused(self, ids):
        with pytest.raises(ValueError, match="experts holds ids"):
            stack().select(torch.tensor(ids))

    def test_a_mask_shaped_argument_is_refused(self):
        with pytest.raises(ValueError, match="experts has shape"):
            stack().select(torch.zeros(E, 1, dtype=torch.int64))


class TestEncodeDecode:
    @pytest.mark.parametrize("mode", SCALE_MODES)
    def test_encode_is_encode_blocks_packed(self, mode):
        w = torch.randn(E, N, K, generator=torch.Generator().manual_seed(0))
        weights = encode_mxfp4(w, mode)
        codes, scales = encode_blocks(w, mode)
        assert torch.equal(weights.codes(), codes)
        assert torch.equal(weights.scales, scales)
        assert (weights.E, weights.N, weights.K, weights.orig_dtype) == (E, N, K, torch.float32)

    def test_encodes_some_rows_of_one_expert_at_a_time(self, monkeypatch):
        """Temporaries are many times the size of what they are made from."""
        import mxref.weights as module

        sizes = []
        monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 2 * K)
        monkeypatch.setattr(module, "encode_blocks", lambda w, mode: sizes.append(w.numel()) or encode_blocks(w, mode))
        w = torch.randn(K, E, N, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
        codes, scales = encode_blocks(w)
        weights = encode_mxfp4(w)
        assert max(sizes) <= 2 * K
        assert torch.equal(weights.codes(), codes)
        assert torch.equal(weights.scales, scales)

    def test_decodes_some_rows_of_one_expert_at_a_time(self, monkeypatch):
        import mxref.weights as module

        sizes = []

        def noted(codes, scales, dtype):
            sizes.append(codes.numel())
            return decode_blocks(codes, scales, dtype)

        monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 2 * K)
        monkeypatch.setattr(module, "decode_blocks", noted)
        weights = stack()
        expected = decode_blocks(unpack_codes(weights.packed), weights.scales, torch.float64)
        assert torch.equal(decode_mxfp4(weights, torch.float64).nan_to_num(7), expected.nan_to_num(7))
        assert sum(sizes) == E * N * K
        assert max(sizes) <= 2 * K

    @pytest.mark.parametrize("call", [lambda: decode_mxfp4(stack()), lambda: encode_mxfp4(torch.randn(N, K))])
    def test_subnormal_numbers_that_are_flushed_are_told(self, call):
        torch.set_flush_denormal(True)
        try:
            with pytest.warns(RuntimeWarning, match="set_flush_denormal"):
                call()
        finally:
            torch.set_flush_denormal(False)

    def test_decode_reads_blocks_along_K(self):
        weights = stack()
        decoded = decode_mxfp4(weights, torch.float64)
        assert decoded.shape == (E, N, K)
        e, n, k = 2, 3, 65
        scale = weights.scales[e, n, k // 32].item()
        code = unpack_codes(weights.packed)[e, n, k].item()
        expected = (-1) ** (code >> 3) * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7] * 2.0 ** (scale - 127)
        assert decoded[e, n, k].item() == expected

    def test_a_matrix_becomes_a_stack_of_one(self):
        assert encode_mxfp4(torch.randn(N, K)).E == 1

    def test_other_ranks_are_refused(self):
        with pytest.raises(ValueError, match="w has shape"):
            encode_mxfp4(torch.randn(K))


class TestGptOss:
    @given(seed=st.integers(0, 2**31))
    @settings(max_examples=20)
    def test_round_trip_shares_the_bytes(self, seed):
        weights = stack(seed=seed)
        blocks, scales = weights.to_gpt_oss()
        assert blocks.shape == (E, N, K // 32, 16)
        again = MXWeights.from_gpt_oss(blocks, scales)
        assert again.packed.data_ptr() == weights.packed.data_ptr()
        assert torch.equal(again.packed, weights.packed)
        assert torch.equal(again.scales, weights.scales)
        assert (again.K, again.N, again.E) == (K, N, E)

    def test_low_nibble_comes_first(self):
        blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
        blocks[..., 0] = 0x52  # element 0 is code 2 (1.0), element 1 is code 5 (3.0)
        weights = MXWeights.from_gpt_oss(blocks, torch.full((1, 1, 1), 127, dtype=torch.uint8))
        assert decode_mxfp4(weights)[0, 0, :2].tolist() == [1.0, 3.0]

    def test_blocks_of_another_form_are_refused(self):
        _, scales = buffers()
        for shape in [(E, N, K // 2), (E, N, K // 32, 8), (E, N, K // 32, 32)]:
            with pytest.raises(ValueError, match="blocks has shape"):
                MXWeights.from_gpt_oss(torch.zeros(shape, dtype=torch.uint8), scales)

    def test_the_decoders_of_transformers_agree_up_to_byte_254(self):
        """transformers' loader uses ldexp, which turns scale byte 255 into a number where the format says NaN."""
        convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
        bytes_ = torch.arange(256, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        blocks = torch.randint(0, 256, (1, 256, 1, 16), dtype=torch.uint8, generator=generator)
        theirs = convert(blocks, bytes_.view(1, 256, 1), dtype=torch.bfloat16).transpose(1, 2)
        ours = decode_mxfp4(MXWeights.from_gpt_oss(blocks, bytes_.view(1, 256, 1)))
        assert torch.equal(ours[:, :255], theirs[:, :255])
        assert ours[:, 255].isnan().all()
        assert not theirs[:, 255].isnan().any()
