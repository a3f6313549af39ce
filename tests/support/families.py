"""Every MoE family of the installed transformers, built small and tried: what the kernels cover, and what not and why.

    python tests/support/families.py                   print the table family × feature
    python tests/support/families.py docs/models.md    write it between that file's marks

A family is a package of transformers whose modelling code has a class of routed experts. Its experts, MoE blocks and
causal language model are built with random weights, packed, and compared with the same weights dequantised. Without a
GPU set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mxref.kernels.models.moe_block import HFScatterMoEGatedMLP
from mxref.kernels.models.packing import experts_modules, pack_experts
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.weights import decode_mxfp4

BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
HEADER = ("family", "experts", "target_parameters", "packed", "HFScatterMoEGatedMLP", "PEFT on the packed model")

_MODELS = Path(transformers.__file__).parent / "models"
_EXPERTS = re.compile(r"^class (\w*Experts)\(", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)\(.*\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
"""A class's name and its body."""
_TOLERANCE = 2e-5
"""Of the largest value, for fp32 sums in another order: some γ_n, n up to a few hundred, through two layers."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "hidden_size", "moe_hidden_size", "moe_latent_size"), 64),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_limited_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "pad_token_id"), 0),
    "mlp_only_layers": [],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"head_dim": None},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 32]},
    "gemma4": {"head_dim": None, "enable_moe_block": True},
    "glm5_next": {"qk_rope_head_dim": 0},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""Where a family wants other sizes; None leaves its own."""


def families() -> list[str]:
    """Packages of transformers with a class of routed experts."""
    return sorted({path.parent.name for path in _MODELS.glob("*/modeling_*.py") if _EXPERTS.search(path.read_text())})


def row(family: str) -> tuple[str, ...]:
    """A family's row of the table, under `HEADER`.

    Raises:
        AssertionError: something that is said to be covered computes other values than transformers does.
    """
    experts = {name: _build(family, name) for name in _experts_classes(family)}
    return (
        family,
        ", ".join(experts),
        _target(family),
        _summary(_try_experts, experts),
        _summary(_try_block, dict(_blocks(family))),
        _summary(_try_peft, dict(_language_models(family))),
    )


def _target(family: str) -> str:
    """What the experts are called in a layer of the causal language model, if there is one that is covered."""
    for model in dict(_language_models(family)).values():
        if isinstance(model, nn.Module) and not _refusal(lambda model=model: experts_modules(model)):
            return re.sub(r"^.*\.layers\.\d+\.", "", next(iter(experts_modules(model))))
    return "–"


def table() -> str:
    """All rows as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *(row(family) for family in families())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def small_model(family: str) -> Any:
    """A family's causal language model, small, random, frozen, in fp32.

    Raises:
        ValueError: transformers has none, or it cannot be built small.
    """
    built = [model for _, model in _language_models(family) if isinstance(model, nn.Module)]
    if not built:
        raise ValueError(f"transformers {transformers.__version__} builds no small causal language model of {family!r}")
    return built[0]


def dequantise(dense: nn.Module, packed: nn.Module) -> nn.Module:
    """Give a model's dense experts, in place, the values of the packed ones of the same names."""
    for name, module in experts_modules(dense).items():
        experts: Any = packed.get_submodule(name)
        for projection in PROJECTIONS:
            values = decode_mxfp4(experts.packed_weights(projection), torch.float32)
            getattr(module, projection).data = (
                values.mT if getattr(module, "is_transposed", False) else values
            ).contiguous()
    return dense


def _summary(attempt: Callable[[nn.Module], str], modules: dict[str, nn.Module | str]) -> str:
    """The outcome of an attempt, or why it could not be made: one for all modules, or each with its name."""
    outcomes = {name: m if isinstance(m, str) else attempt(m) for name, m in modules.items()}
    if not outcomes:
        return "none there"
    kinds = list(dict.fromkeys(outcomes.values()))
    return kinds[0] if len(kinds) == 1 else "; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items())


def _code(family: str, kind: str) -> Iterator[ModuleType]:
    for path in sorted((_MODELS / family).glob(f"{kind}_*.py")):
        yield importlib.import_module(f"transformers.models.{family}.{path.stem}")


def _classes(family: str, kind: str, base: type) -> dict[str, Any]:
    """Classes of a family's modelling or configuration code, by name."""
    return {
        name: item
        for module in _code(family, kind)
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, base) and item.__module__ == module.__name__
    }


def _experts_classes(family: str) -> dict[str, Any]:
    return {
        name: item
        for name, item in _classes(family, "modeling", nn.Module).items()
        if name.endswith("Experts") and (hasattr(item, "_apply_gate") or "Shared" not in name)
    }


def _config(family: str, config_class: Any) -> Any:
    known = inspect.signature(config_class).parameters
    sizes = {name: value for name, value in _SIZES.items() if name in known} | _OWN_SIZES.get(family, {})
    if "qk_rope_head_dim" in known:  # multi-head latent attention: a size of its own, and no groups
        sizes |= {"head_dim": None, "num_key_value_heads": 4}
    config = config_class(**{name: value for name, value in sizes.items() if value is not None})
    config._experts_implementation = "eager"
    return config


def _build(family: str, name: str) -> nn.Module | str:
    """A module of a family with random weights, or why it cannot be built small."""
    module_class = _classes(family, "modeling", nn.Module)[name]
    wanted = inspect.signature(module_class).parameters
    further = {key: value for key, value in {"layer_idx": 1, "intermediate_size": 32}.items() if key in wanted}
    reasons = []
    for config_class in _classes(family, "configuration", transformers.PreTrainedConfig).values():
        module = _made(module_class, family, config_class, **further)
        if isinstance(module, str):
            reasons.append(module)
            continue
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=0.3)
        return module
    return reasons[-1] if reasons else "not built: there is no configuration"


def _made(module_class: Any, family: str, config_class: Any, **further: Any) -> nn.Module | str:
    """A frozen module for evaluation, or whatever transformers raises: the reason why it is not built."""
    try:
        torch.manual_seed(0)
        module: nn.Module = module_class(_config(family, config_class), **further)
    except Exception as error:
        return f"not built: {type(error).__name__}: {error}".splitlines()[0]
    return module.requires_grad_(False).eval()


def _blocks(family: str) -> Iterator[tuple[str, nn.Module | str]]:
    """Modules that make experts of their own."""
    experts = _experts_classes(family)
    for path in sorted((_MODELS / family).glob("modeling_*.py")):
        for name, body in _CLASS.findall(path.read_text()):
            if name not in experts and any(f"{made}(" in body for made in experts):
                yield name, _build(family, name)


def _language_models(family: str) -> Iterator[tuple[str, nn.Module | str]]:
    for name, item in _classes(family, "modeling", nn.Module).items():
        if not name.endswith("ForCausalLM"):
            continue
        model = _made(item, family, item.config_class)
        for parameter_name, parameter in [] if isinstance(model, str) else model.named_parameters():
            if "experts" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
        yield name, model


def _try_experts(module: nn.Module) -> str:
    holder = nn.ModuleDict({"experts": module})
    packed: Any = copy.deepcopy(holder)
    if refusal := _refusal(lambda: pack_experts(packed, rank=0)):
        return refusal
    dequantise(holder, packed)
    E, K, _ = packed["experts"].shape("gate_up_proj")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, K, generator=generator, requires_grad=True)
    index = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(6)])
    gates = torch.rand(6, 2, generator=generator, requires_grad=True)
    outcomes = [_with_gradients(experts["experts"](x, index, gates), x, gates) for experts in (packed, holder)]
    _assert_near(*outcomes)
    return "yes"


def _try_block(block: nn.Module) -> str:
    hidden = next((m.shape[-1] for name, m in block.named_parameters() if name.endswith("gate_up_proj")), 64)
    x = torch.randn(2, 3, hidden, generator=torch.Generator().manual_seed(2), requires_grad=True)
    try:
        expected = block(x)
    except Exception as error:
        return f"no: its own forward fails on hidden states alone ({type(error).__name__})"
    dense = _refusal(lambda: HFScatterMoEGatedMLP.forward(block, x))
    if dense:
        return dense
    _assert_near(
        _with_gradients(_hidden(HFScatterMoEGatedMLP.forward(block, x)), x), _with_gradients(_hidden(expected), x)
    )
    packed = pack_experts(copy.deepcopy(block), rank=0)
    dequantise(block, packed)
    _assert_near(
        _with_gradients(_hidden(HFScatterMoEGatedMLP.forward(packed, x)), x), _with_gradients(_hidden(block(x)), x)
    )
    return "yes"


def _try_peft(model: nn.Module) -> str:
    import peft

    packed = copy.deepcopy(model)
    if refusal := _refusal(lambda: pack_experts(packed, rank=0)):
        return refusal
    dequantise(model, packed)
    targets = [f"{name}.{projection}" for name in experts_modules(model) for projection in PROJECTIONS]
    outcomes, states = [], []
    for base in (packed, model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
        adapted: Any = peft.get_peft_model(base, config)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        outcomes.append(_with_gradients(adapted(torch.arange(5)[None], use_cache=False).logits, *trained))
        states.append(peft.get_peft_model_state_dict(adapted))
    _assert_near(*outcomes)
    assert list(states[0]) == list(states[1]), "an adapter's names differ from plain PEFT's"
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    return "yes"


def _refusal(call: Callable[[], Any]) -> str:
    """Why this project refuses, without the names that the row has already; empty if it does not."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"no: {str(error).rpartition('is not covered: ')[2]}"
    return ""


def _hidden(out: Any) -> Tensor:
    """A block's hidden states: what it returns, or the first of that."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _with_gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())
    return [y.detach(), *gradients]


def _assert_near(got: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0, "nothing to compare"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=_TOLERANCE * scale)


def main(arguments: list[str]) -> None:
    """Print the table, or write it into the file that is named."""
    if not arguments:
        print(table())
        return
    path = Path(arguments[0])
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\ntransformers {transformers.__version__}\n\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
