"""gpt-oss checkpoints: read, checked, written back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from gpt_oss_checkpoint import PROJECTIONS, make_gpt_oss_checkpoint
from safetensors.torch import load_file, save_file

from mxref.checkpoints import (
    ExpertTensor,
    list_expert_tensors,
    list_other_tensors,
    read_expert_biases,
    read_expert_weights,
    read_other_tensors,
    write_expert_weights,
)
from mxref.checkpoints.files import INDEX_NAME, Files
from mxref.weights import decode_mxfp4

SIZES = {"layers": 2, "experts": 4, "hidden": 64, "intermediate": 96}
NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module", params=[False, True], ids=["one file", "sharded"])
def checkpoint(request, tmp_path_factory):
    """(directory, every tensor it holds)."""
    directory = tmp_path_factory.mktemp("gpt-oss")
    return directory, make_gpt_oss_checkpoint(directory, sharded=request.param, **SIZES)


@pytest.fixture
def pair():
    """One valid projection of a small checkpoint, to be damaged: E 2, N 3, K 64."""
    return {
        f"{NAME}_blocks": torch.zeros(2, 3, 2, 16, dtype=torch.uint8),
        f"{NAME}_scales": torch.full((2, 3, 2), 127, dtype=torch.uint8),
        f"{NAME}_bias": torch.zeros(2, 3, dtype=torch.bfloat16),
    }


class TestRead:
    def test_lists_projections_with_their_logical_sizes(self, checkpoint):
        directory, _ = checkpoint
        assert list_expert_tensors(directory) == [
            ExpertTensor(f"model.layers.{layer}.mlp.experts.{name}", 4, N, K)
            for layer in range(2)
            for name, N, K in (("down_proj", 64, 96), ("gate_up_proj", 192, 64))
        ]

    def test_layers_are_in_numeric_order(self, pair, tmp_path):
        blocks, scales = pair[f"{NAME}_blocks"], pair[f"{NAME}_scales"]
        tensors = {}
        for layer in (10, 2, 0):
            tensors |= {f"layers.{layer}.down_proj_blocks": blocks, f"layers.{layer}.down_proj_scales": scales}
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
        assert [entry.name.split(".")[1] for entry in list_expert_tensors(tmp_path)] == ["0", "2", "10"]

    def test_packed_buffers_are_the_file_s_bytes(self, checkpoint):
        directory, tensors = checkpoint
        weights = dict(read_expert_weights(directory))
        assert len(weights) == 4
        for name, stack in weights.items():
            blocks, scales = stack.to_gpt_oss()
            assert torch.equal(blocks, tensors[f"{name}_blocks"])
            assert torch.equal(scales, tensors[f"{name}_scales"])

    def test_one_projection_is_read_at_a_time(self, checkpoint, monkeypatch):
        read: list[str] = []
        original = Files.read
        monkeypatch.setattr(Files, "read", lambda self, names: read.extend(names) or original(self, names))
        iterator = read_expert_weights(checkpoint[0])
        assert read == []
        name, _ = next(iterator)
        assert read == [f"{name}_blocks", f"{name}_scales"]

    def test_names_choose_and_order(self, checkpoint):
        names = [f"model.layers.1.mlp.experts.{projection}" for projection in PROJECTIONS]
        assert [name for name, _ in read_expert_weights(checkpoint[0], names)] == names

    def test_biases(self, checkpoint):
        directory, tensors = checkpoint
        biases = dict(read_expert_biases(directory))
        assert len(biases) == 4
        for name, bias in biases.items():
            assert bias.any()
            assert torch.equal(bias, tensors[f"{name}_bias"])

    def test_every_tensor_is_an_experts_or_another(self, checkpoint):
        directory, tensors = checkpoint
        others = list_other_tensors(directory)
        owned = {
            entry.name + end for entry in list_expert_tensors(directory) for end in ("_blocks", "_scales", "_bias")
        }
        assert sorted([*others, *owned]) == sorted(tensors)
        router = "model.layers.{}.mlp.router.weight"
        assert others.index(router.format(0)) < others.index(router.format(1))
        read = dict(read_other_tensors(directory))
        assert list(read) == others
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())
        with pytest.raises(ValueError, match="down_proj_scales"):
            read_other_tensors(directory, ["model.layers.0.mlp.experts.down_proj_scales"])

    def test_transformers_dequantises_to_the_same_bf16(self, checkpoint):
        """The other reader of this format, transformers' own loader, gets our decode bit for bit."""
        from transformers import GptOssForCausalLM, Mxfp4Config

        directory, tensors = checkpoint
        model = GptOssForCausalLM.from_pretrained(
            directory, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
        )
        state = model.state_dict()
        for name, stack in read_expert_weights(directory):
            assert torch.equal(state[name], decode_mxfp4(stack, torch.bfloat16).transpose(1, 2)), name
            assert torch.equal(state[f"{name}_bias"], tensors[f"{name}_bias"])


class TestWrite:
    def test_what_was_read_is_written_back_bit_for_bit(self, checkpoint, tmp_path):
        directory, tensors = checkpoint
        file = tmp_path / "experts.safetensors"
        write_expert_weights(file, dict(read_expert_weights(directory)), dict(read_expert_biases(directory)))
        written = load_file(file)
        assert set(written) == {name for name in tensors if ".experts." in name}
        for name, tensor in written.items():
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])
        assert list_expert_tensors(file) == list_expert_tensors(directory)

    def test_a_bias_that_fits_no_projection_is_refused(self, checkpoint, tmp_path):
        name, stack = next(read_expert_weights(checkpoint[0]))
        with pytest.raises(ValueError, match="no projection of that name"):
            write_expert_weights(tmp_path / "x", {name: stack}, {"other": torch.zeros(4, 64)})
        with pytest.raises(ValueError, match=r"has shape \(4, 1\)"):
            write_expert_weights(tmp_path / "x", {name: stack}, {name: torch.zeros(4, 1)})
        with pytest.raises(ValueError, match="weights is empty"):
            write_expert_weights(tmp_path / "x", {})


class TestRefuses:
    """Every way a checkpoint is broken has its own sentence."""

    @staticmethod
    def check(path: Path, message: str) -> None:
        for reader in (list_expert_tensors, read_expert_weights, read_expert_biases):
            with pytest.raises(ValueError, match=message):
                reader(path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            list_expert_tensors(tmp_path / "absent")

    def test_an_empty_directory(self, tmp_path):
        self.check(tmp_path, r"holds no \.safetensors file")

    def test_an_empty_file(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.touch()
        self.check(file, "model.safetensors is empty")

    @pytest.mark.parametrize("keep", [4, 40, -1])
    def test_a_truncated_file(self, keep, pair, tmp_path):
        file = tmp_path / "model.safetensors"
        save_file(pair, file)
        file.write_bytes(file.read_bytes()[:keep])
        self.check(file, "is truncated or no safetensors file")

    def test_a_torch_save_file(self, pair, tmp_path):
        file = tmp_path / "model.safetensors"
        torch.save(pair, file)
        self.check(file, "is a pickle")

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_a_plain_pickle(self, protocol, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(pickle.dumps({"weight": [0.0] * 64}, protocol))
        self.check(file, "is a pickle")

    def test_some_other_file(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_text("once upon a time")
        self.check(file, "is truncated or no safetensors file")

    def test_a_git_lfs_pointer(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        self.check(file, "is a Git LFS pointer, not the file itself; fetch it with git lfs pull")

    def test_a_directory_under_a_file_s_name(self, tmp_path):
        (tmp_path / "model.safetensors").mkdir()
        self.check(tmp_path, "is a directory; expected a safetensors file")

    def test_a_directory_of_another_format(self, tmp_path):
        (tmp_path / "pytorch_model.bin").touch()
        self.check(tmp_path, r"no \.safetensors file \(but pytorch_model\.bin, which is not read\)")

    def test_two_files_without_an_index(self, pair, tmp_path):
        for name in ("a.safetensors", "b.safetensors"):
            save_file(pair, tmp_path / name)
        self.check(tmp_path, r"holds 2 \.safetensors files and no model\.safetensors\.index\.json")

    def test_a_missing_shard(self, tmp_path):
        make_gpt_oss_checkpoint(tmp_path, sharded=True, layers=1)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        self.check(tmp_path, "model-00002-of-00002.safetensors, which is missing")

    def test_a_shard_without_its_tensor(self, pair, tmp_path):
        save_file(pair, tmp_path / "a.safetensors")
        weight_map = dict.fromkeys([*pair, "other"], "a.safetensors")
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        self.check(tmp_path, "places other in a.safetensors, which does not hold it")

    def test_an_index_that_points_elsewhere(self, tmp_path):
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
        self.check(tmp_path, "expected the name of a file beside the index")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is not JSON"),
            ("[]", "holds a list; expected a JSON object"),
            ("{}", "is not a safetensors index"),
            ('{"weight_map": 3}', "is not a safetensors index"),
            ('{"weight_map": {"x": 3}}', "is not a safetensors index"),
            ("[" * 10_000 + "]" * 10_000, "is nested too deeply"),
        ],
    )
    def test_an_index_that_is_none(self, text, message, tmp_path):
        (tmp_path / INDEX_NAME).write_text(text)
        self.check(tmp_path, message)

    def test_a_configuration_that_is_none(self, pair, tmp_path):
        save_file(pair, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("[" * 10_000 + "]" * 10_000)
        self.check(tmp_path, "config.json is nested too deeply")

    def test_a_link_to_nowhere(self, pair, tmp_path):
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
        self.check(tmp_path, "model.safetensors is a link to nowhere")

    @pytest.mark.parametrize("suffix", ["_blocks", "_scales"])
    def test_half_a_pair(self, suffix, pair, tmp_path):
        del pair[NAME + suffix]
        save_file(pair, tmp_path / "model.safetensors")
        self.check(tmp_path, f"has no partner {NAME}{suffix}")

    @pytest.mark.parametrize(
        ("suffix", "tensor", "message"),
        [
            ("_blocks", torch.zeros(2, 3, 2, 16, dtype=torch.int8), "dtype I8; expected U8"),
            ("_scales", torch.zeros(2, 3, 2), "dtype F32; expected U8"),
            ("_blocks", torch.zeros(2, 3, 32, dtype=torch.uint8), r"expected \*_blocks U8 \[E, N, K/32, 16\]"),
            ("_blocks", torch.zeros(2, 3, 4, 8, dtype=torch.uint8), r"expected \*_blocks U8 \[E, N, K/32, 16\]"),
            ("_blocks", torch.zeros(0, 3, 2, 16, dtype=torch.uint8), r"expected \*_blocks U8 \[E, N, K/32, 16\]"),
            ("_scales", torch.zeros(2, 2, 3, dtype=torch.uint8), r"its scales \(2, 2, 3\); expected"),
        ],
    )
    def test_another_dtype_or_shape(self, suffix, tensor, message, pair, tmp_path):
        save_file({**pair, NAME + suffix: tensor}, tmp_path / "model.safetensors")
        self.check(tmp_path, message)

    def test_a_bias_of_another_shape(self, pair, tmp_path):
        save_file({**pair, f"{NAME}_bias": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
        self.check(tmp_path, r"has shape \(3, 2\); expected \[E, N\] = \(2, 3\)")

    def test_a_name_that_is_not_there(self, pair, tmp_path):
        save_file(pair, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"names holds \['layers.9'\]"):
            read_expert_weights(tmp_path, ["layers.9"])
