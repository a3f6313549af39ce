"""Production Triton kernels: ScatterMoE-LoRA on packed MXFP4 (or dense) weights, forward and backward.

They compute what `mxref` defines, in its vocabulary. The data's way: a call's operands become one `Problem`; `layer`
validates it and starts the kernels of `device`, forward and backward; `models` puts the layer into models of other
libraries; `parallel` divides those among ranks; `compiled` compiles the kernels ahead of time. Set TRITON_INTERPRET=1
before the import to run on CPU tensors.
"""

from mxref.kernels.device.configs import Config, reachable_configs
from mxref.kernels.device.dequant import dequantize_experts, selective_lora_weights
from mxref.kernels.device.schedule import Routing
from mxref.kernels.layer.autograd import ScatterMoELoRA, parallel_linear_lora
from mxref.kernels.layer.scatter2scatter import scatter2scatter_lora_dX_mx, scatter2scatter_lora_mx
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.moe_block import HFScatterMoEGatedMLP
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.torchao import is_mxfp4_param, selective_expert_weights, selective_mx_weights_fwd

__all__ = [
    "Config",
    "HFScatterMoEGatedMLP",
    "PackedExperts",
    "Routing",
    "ScatterMoELoRA",
    "dequantize_experts",
    "is_mxfp4_param",
    "pack_experts",
    "parallel_linear_lora",
    "reachable_configs",
    "scatter2scatter_lora_dX_mx",
    "scatter2scatter_lora_mx",
    "selective_expert_weights",
    "selective_lora_weights",
    "selective_mx_weights_fwd",
]
