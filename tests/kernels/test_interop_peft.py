"""PEFT adapters on packed experts: PEFT's names, layouts and life cycle, and the way to and from plain PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from moe_models import assert_near, tiny_gpt_oss
from peft.utils import get_peft_model_state_dict

from mxref import decode_mxfp4
from mxref.kernels.models.adapters import LoRA
from mxref.kernels.models.packing import experts_modules, pack_experts
from mxref.kernels.models.peft import get_peft_model, load_peft_model
from mxref.kernels.models.stacks import PROJECTIONS

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(6)[None]


def lora(**options: Any) -> peft.LoraConfig:
    given = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": TARGETS, **options}
    return peft.LoraConfig(**given)


def packed_and_dense() -> tuple[Any, Any]:
    """The same model twice: packed, and with the dequantised weights."""
    dense = tiny_gpt_oss()
    packed = pack_experts(copy.deepcopy(dense), rank=0)
    for name, module in experts_modules(dense).items():
        for projection in PROJECTIONS:
            weights = packed.get_submodule(name).packed_weights(projection)
            getattr(module, projection).data = decode_mxfp4(weights, torch.float32).mT.contiguous()
    return packed, dense


def losses(model: Any, steps: int) -> list[float]:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    seen = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(loss.item())
    return seen


def test_names_shapes_and_draws_are_pefts() -> None:
    packed, dense = packed_and_dense()
    torch.manual_seed(3)
    ours = get_peft_model_state_dict(get_peft_model(packed, lora()))
    torch.manual_seed(3)
    theirs = get_peft_model_state_dict(peft.get_peft_model(dense, lora()))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any("stand_in" in name or name.endswith(PROJECTIONS) for name in packed.state_dict())


def test_train_save_and_continue_in_plain_peft(tmp_path: Path) -> None:
    packed, dense = packed_and_dense()
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    ours = get_peft_model(packed, lora(init_lora_weights=False))
    first = losses(ours, 2)
    assert first[1] < first[0]
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)
    assert_near(ours(IDS).logits, theirs(IDS).logits)
    torch.testing.assert_close(losses(ours, 3), losses(theirs, 3), rtol=1e-4, atol=0)
    for ours_p, theirs_p in zip(
        get_peft_model_state_dict(ours).values(), get_peft_model_state_dict(theirs).values(), strict=True
    ):
        assert_near(ours_p, theirs_p)
    after = ours.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_continue_from_plain_peft(tmp_path: Path) -> None:
    packed, dense = packed_and_dense()
    theirs = peft.get_peft_model(dense, lora(init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = load_peft_model(packed, tmp_path, is_trainable=True)
    assert_near(ours(IDS).logits, theirs(IDS).logits)
    assert sum(p.requires_grad for p in ours.parameters()) == 4
    assert not any(p.requires_grad for p in load_peft_model(packed_and_dense()[0], tmp_path).parameters())


def test_disable_and_switch_adapters() -> None:
    packed, dense = packed_and_dense()
    expected = dense(IDS).logits
    model = get_peft_model(packed, lora(init_lora_weights=False))
    adapted = model(IDS).logits
    with model.disable_adapter():
        assert_near(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, adapted)
    assert float((adapted - expected).detach().abs().max()) > 1e-2
    restored = model.unload()
    assert_near(restored(IDS).logits, expected)


def test_attention_adapters_beside() -> None:
    packed, dense = packed_and_dense()
    config = lora(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(4)
    ours = get_peft_model(packed, copy.deepcopy(config))
    torch.manual_seed(4)
    theirs = peft.get_peft_model(dense, config)
    assert_near(ours(IDS).logits, theirs(IDS).logits)


SECOND = {
    "r": 2,
    "lora_alpha": 8,
    "rank_pattern": {"mlp.experts.down_proj": 4},
    "alpha_pattern": {"mlp.experts.down_proj": 4},
}
"""Scalings 4 and 1 beside the first adapter's 2."""


def with_two_adapters() -> tuple[Any, Any]:
    ours, theirs = packed_and_dense()
    models = []
    for model, wrap in ((ours, get_peft_model), (theirs, peft.get_peft_model)):
        torch.manual_seed(5)
        adapted: Any = wrap(model, lora(init_lora_weights=False))
        with pytest.warns(RuntimeWarning, match="did not match any targeted module"):  # PEFT's, and untrue
            adapted.add_adapter("second", lora(init_lora_weights=False, **SECOND))
        models.append(adapted)
    return models[0], models[1]


def test_several_adapters_with_their_own_rank_and_alpha() -> None:
    ours, theirs = with_two_adapters()
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters() if "lora_A.second" in name}
    assert sorted(shapes.values()) == [(3 * 2, 64), (3 * 4, 32)]
    outcomes = []
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        outcomes.append(ours(IDS).logits)
        assert_near(outcomes[-1], theirs(IDS).logits)
        torch.testing.assert_close(losses(ours, 2), losses(theirs, 2), rtol=1e-4, atol=0)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert float((outcomes[one] - outcomes[other]).detach().abs().max()) > 1e-2


def test_several_adapters_saved_and_loaded(tmp_path: Path) -> None:
    ours, theirs = with_two_adapters()
    ours.save_pretrained(tmp_path)
    for loaded, load in ((packed_and_dense()[0], load_peft_model), (packed_and_dense()[1], peft.PeftModel)):
        again: Any = load(loaded, tmp_path) if load is load_peft_model else load.from_pretrained(loaded, tmp_path)
        with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
            again.load_adapter(tmp_path / "second", "second")
        for active in ("default", "second"):
            again.set_adapter(active)
            theirs.set_adapter(active)
            assert_near(again(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("alpha", [3.6, -6.0, 0.0, 6.0])
def test_scalings_of_any_ratio_add_up(alpha: float) -> None:
    models = []
    for model, wrap in zip(packed_and_dense(), (get_peft_model, peft.get_peft_model), strict=True):
        torch.manual_seed(5)
        adapted: Any = wrap(model, lora(init_lora_weights=False))
        adapted.add_adapter("second", lora(init_lora_weights=False, lora_alpha=alpha))
        adapted.base_model.set_adapter(["default", "second"])
        models.append(adapted)
    ours, theirs = models
    assert_near(ours(IDS).logits, theirs(IDS).logits)
    torch.testing.assert_close(losses(ours, 2), losses(theirs, 2), rtol=1e-4, atol=0)


def test_ranks_that_add_up_to_too_much_say_so() -> None:
    model = get_peft_model(packed_and_dense()[0], lora(r=100))
    model.add_adapter("second", lora(r=40))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"down_proj with default, second: .* ranks \[100, 40\].* up to 128"):
        model(IDS)


def test_joined_adapters_are_their_sum() -> None:
    """In integers: the product of the joined pair is the exact sum, whatever the ranks and the signs."""
    E, K, N = 3, 4, 5
    generator = torch.Generator().manual_seed(6)
    adapters = [
        LoRA(*(torch.randint(-4, 5, shape, generator=generator).double() for shape in ((E * r, K), (N, E * r))), s)
        for r, s in ((1, 1.5), (3, -6.0), (2, 0.75))
    ]

    def product(lora: LoRA, e: int) -> torch.Tensor:
        return lora.scaling * lora.B.unflatten(1, (E, -1))[:, e] @ lora.A.unflatten(0, (E, -1))[e]

    joined = LoRA.joined(adapters, E)
    assert joined.scaling == -6.0
    for e in range(E):
        assert torch.equal(product(joined, e), sum(product(lora, e) for lora in adapters))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_before_it_starts(merge: str) -> None:
    model = get_peft_model(packed_and_dense()[0], lora(target_modules=["q_proj"], init_lora_weights=False))
    expected, before = model(IDS).logits, {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be merged into packed MXFP4"):
        getattr(model, merge)()
    assert torch.equal(model(IDS).logits, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_is_refused() -> None:
    packed, dense = packed_and_dense()
    with pytest.raises(ValueError, match="no PackedExperts"):
        get_peft_model(dense, lora())
    with pytest.raises(ValueError, match="reaches no packed experts"):
        get_peft_model(packed, lora(target_parameters=["mlp.experts.up_proj"]))
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'"):
        get_peft_model(packed_and_dense()[0], lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="expected target_parameters"):
        get_peft_model(packed_and_dense()[0], lora(target_modules=["experts"]))
    with pytest.raises(ValueError, match="owns adapters already"):
        get_peft_model(pack_experts(tiny_gpt_oss(), rank=2), lora())
