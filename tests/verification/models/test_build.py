"""Random models of given sizes: packed without a dense weight on the way, and as large as was said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.sizes import MODELS, TINY, Model
from mxref.verification.models.build import Needs, adapted, decoder_layers, empty_model, filled, needs
from mxref.weights import decode_mxfp4

CPU = torch.device("cpu")
V4 = Model(
    "small-v4",
    "",
    "DeepseekV4Config",
    2,
    ("self_attn.q_b_proj", "self_attn.kv_proj"),
    settings={
        "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 32,
        "q_lora_rank": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "o_groups": 2, "o_lora_rank": 16,
        "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4, "sliding_window": 8,
        "mlp_layer_types": ["hash_moe", "moe"], "partial_rotary_factor": 0.25,
    },
    as_many_layers=True,
)  # fmt: skip


def octets(model: nn.Module) -> int:
    """Of weights and adapters, and of the adapters' gradients and moments to come."""
    return sum(p.nbytes + (3 * p.nbytes if p.requires_grad else 0) for p in model.parameters())


@pytest.mark.parametrize("description", [TINY, V4], ids=lambda description: description.name)
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_is_as_large_as_was_said(description: Model, packed: bool) -> None:
    empty = empty_model(description.config())
    said = needs(empty, description, 4, packed)
    model = adapted(filled(empty, CPU, packed), description, 4, CPU, packed)
    assert octets(model) == said.total
    layers = decoder_layers(model)
    assert [octets(layer) for layer in layers] == list(said.layers)
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_packed_experts_are_never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    drawn = torch.empty_like

    def watched(like: torch.Tensor, **options: Any) -> torch.Tensor:
        made.append(like.numel() if options.get("device") == CPU else 0)
        return drawn(like, **options)

    monkeypatch.setattr(torch, "empty_like", watched)
    empty = empty_model(TINY.config())
    experts = max(parameter.numel() for name, parameter in empty.named_parameters() if "experts" in name)
    model = filled(empty, CPU, packed=True)
    assert 0 < max(made) < experts
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == TINY.layers


def test_packed_weights_are_about_as_large_as_dense_ones() -> None:
    packed, dense = (filled(empty_model(TINY.config()), CPU, packed) for packed in (True, False))
    experts = [decoder_layers(model)[0].mlp.experts for model in (packed, dense)]
    decoded = decode_mxfp4(experts[0].packed_weights("down_proj"), torch.float32)
    assert float(decoded.std() / experts[1].down_proj.float().std()) == pytest.approx(1, abs=0.2)


def test_tokens_are_routed_to_different_experts_by_a_table() -> None:
    model = filled(empty_model(V4.config()), CPU, packed=True)
    table = decoder_layers(model)[0].mlp.gate.tid2eid
    assert table.shape == (64, 2)
    assert len(table.unique()) == 4
    assert (table[:, 0] != table[:, 1]).all()


def test_layers_that_fit_beside_what_is_fixed() -> None:
    model = Needs(10, (5, 5, 7))
    assert model.total == 27
    assert [model.fitting(room) for room in (9, 10, 15, 26, 27, 100)] == [0, 0, 1, 2, 3, 3]


def test_published_sizes() -> None:
    """Parameters of the whole models as their publishers count them: 20.9 and 116.8 billion."""
    for name, billions in (("gpt-oss-20b", 20.9), ("gpt-oss-120b", 116.8)):
        model = empty_model(MODELS[name].config(layers=1))
        layer = sum(p.numel() for p in decoder_layers(model).parameters())
        outside = sum(p.numel() for p in model.parameters()) - layer
        assert (outside + MODELS[name].layers * layer) / 1e9 == pytest.approx(billions, abs=0.05)


def test_a_model_that_transformers_lacks() -> None:
    with pytest.raises(ValueError, match=r"transformers \S+ has no NoSuchConfig"):
        replace(TINY, config_class="NoSuchConfig").config()
