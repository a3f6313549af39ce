"""The command on a checkpoint's weights: which it takes, what it sees there, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gate_command import gate, verdict

from mxref import MXWeights, encode_mxfp4
from mxref.checkpoints.gpt_oss import write_expert_weights

pytestmark = pytest.mark.usefixtures("sandbox")


def expert_stack(experts: int, n: int, k: int) -> MXWeights:
    draw = torch.Generator().manual_seed(experts * n + k)
    return encode_mxfp4(torch.randn(experts, n, k, generator=draw) / 16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    stacks = {}
    for layer in (0, 1, 10):
        name = f"model.layers.{layer}.mlp.experts"
        stacks[f"{name}.gate_up_proj"] = expert_stack(6, 96, 64)
        stacks[f"{name}.down_proj"] = expert_stack(6, 64, 96)
    write_expert_weights(file, stacks)
    return file


@pytest.mark.usefixtures("checkpoint")
class TestWeights:
    def judged(self) -> set[str]:
        return {finding["case"] for finding in verdict()["findings"] if finding["check"] == "interval"}

    def test_the_first_layer_and_four_experts_by_default(self) -> None:
        assert gate("--kernel", "composite", "--weights", "model.safetensors") == 0
        names = ("gate_up_proj", "down_proj")
        assert self.judged() == {f"model.layers.0.mlp.experts.{n}, experts 0–3 of 6" for n in names}
        assert "layer 0 of 3" in verdict()["run"]["suite"]
        assert "up to 4 experts each" in verdict()["run"]["suite"]

    def test_layers_and_experts_are_chosen(self) -> None:
        choice = ("--layers", "1,10", "--experts", "all", "--case", "*down_proj*")
        assert gate("--kernel", "composite", "--weights", ".", *choice) == 0
        assert self.judged() == {f"model.layers.{n}.mlp.experts.down_proj, experts 0–5 of 6" for n in (1, 10)}

    def test_a_planted_mistake_is_seen_on_real_weights(self) -> None:
        options = ("--weights", "model.safetensors", "--case", "*_proj*")
        assert gate("--kernel", "planted:scale_off_by_one", *options) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--layers", "2-9"), "layers 0, 1, 10; not 2"),
            (("--layers", "x"), "numbers and ranges"),
            (("--layers", "3-1"), "numbers and ranges"),
            (("--experts", "0"), "positive number"),
        ],
    )
    def test_wrong_choices(self, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert gate("--weights", "model.safetensors", *options) == 2
        assert message in capsys.readouterr().err


def broken(kind: str, checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    target = Path("broken.safetensors")
    if kind == "empty":
        target.write_bytes(b"")
    elif kind == "truncated":
        target.write_bytes(whole[: len(whole) // 2])
    elif kind == "pickle":
        torch.save({"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2)}, target)
    elif kind == "text":
        target.write_text("<html>404 not found</html>")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no checkpoint at"),
        ("empty", "is empty"),
        ("truncated", "is truncated"),
        ("pickle", "is a pickle"),
        ("text", "no safetensors file"),
    ],
)
def test_files_that_are_no_checkpoint(
    kind: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(kind, checkpoint)
    assert gate("--weights", "broken.safetensors") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
