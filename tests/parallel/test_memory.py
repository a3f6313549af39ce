"""Memory on paper: the page shows what the formulas say, and they count what modules hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_models import HIDDEN, INTERMEDIATE, integer_experts

from mxref.kernels.parallel import memory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"


def test_the_page_shows_the_tables(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    memory.main([str(copy)])
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), "run memory.py on docs/parallel.md"


def test_a_page_without_a_place_for_them_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("A page.\n")
    with pytest.raises(ValueError, match=r"page\.md has no lines"):
        memory.main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == "A page.\n"


def test_state_is_what_a_layer_holds() -> None:
    """Packed bytes, biases left out, and an adapter with its gradient and two moments in fp32."""
    experts = integer_experts(4, rank=2)
    sizes = {"packed": 0, "adapter": 0}
    for name, parameter in experts.named_parameters():
        if parameter.dtype == torch.uint8:
            sizes["packed"] += parameter.nbytes
        elif "_lora_" in name:
            sizes["adapter"] += 4 * parameter.nbytes
    model = memory.Model("tiny", 1, 1, HIDDEN, INTERMEDIATE, 4, 2, others=0, vocabulary=0)
    assert memory.per_rank(model, memory.Layout(1), rank=2).state == sum(sizes.values())
    assert memory.per_rank(model, memory.Layout(2, 2), rank=2).state == sum(sizes.values()) / 4


@pytest.mark.parametrize("model", memory.MODELS, ids=lambda model: model.name)
def test_known_sizes(model: memory.Model) -> None:
    """All parameters together are what the makers publish, in billions."""
    published = {
        "gpt-oss-20b": 20.91, "gpt-oss-120b": 116.8, "Qwen3-30B-A3B": 30.53, "Qwen3-235B-A22B": 235.1,
        "DeepSeek-V3": 671,
    }  # fmt: skip
    total = model.expert_weights * model.moe_layers + model.others
    assert total / 1e9 == pytest.approx(published[model.name], rel=1e-3)


def test_one_rank_gathers_and_receives_nothing() -> None:
    for model in memory.MODELS:
        assert memory.per_rank(model, memory.Layout(1)).gathered == memory.traffic(model, memory.Layout(1)) == 0
        assert memory.per_rank(model, memory.Layout(1, 8)).gathered < memory.per_rank(model, memory.Layout(8)).gathered
