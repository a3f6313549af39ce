"""mxref: the golden model of MXFP4 ScatterMoE-LoRA.

The data's way: packed weights (`weights`), routing (`routing`), one call's operands (`problem`), the layer
(`scattermoe`, and `autograd` for callers), whole blocks (`blocks`). Production kernels live in `mxref.kernels`, the
gate that judges them in `mxref.verification`.

A name is imported when it is first asked for: pytest loads this package's plugin on every start, and must not wait for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mxref import moved

if TYPE_CHECKING:
    from mxref.autograd import ScatterMoELoRA, parallel_linear_lora
    from mxref.formats import MX_BLOCK_SIZE, fp4_codebook
    from mxref.not_covered import NotCovered
    from mxref.problem import Problem
    from mxref.routing import flatten_sort_count, get_active_experts, remap_expert_indices
    from mxref.scattermoe import RoundingPoints
    from mxref.weights import MXLayout, MXWeights, decode_mxfp4, encode_mxfp4

__all__ = [
    "MX_BLOCK_SIZE",
    "MXLayout",
    "MXWeights",
    "NotCovered",
    "Problem",
    "RoundingPoints",
    "ScatterMoELoRA",
    "decode_mxfp4",
    "encode_mxfp4",
    "flatten_sort_count",
    "fp4_codebook",
    "get_active_experts",
    "parallel_linear_lora",
    "remap_expert_indices",
]

_MODULES = ("autograd", "formats", "not_covered", "problem", "routing", "scattermoe", "weights")

moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        modules = (import_module(f"{__name__}.{module}") for module in _MODULES)
        return globals().setdefault(name, next(vars(module)[name] for module in modules if name in vars(module)))
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
