"""Whole blocks against transformers' own modules with the same weights.

Everything runs in fp64, where both sides do the same sums in another order: at these sizes (sums of at most 128 terms,
three in a row) reordering moves a value by at most a few hundred times 2^−53, so 1e-12 of the largest value is a bound
that no missing term, wrong slot or swapped column can meet.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpt_oss_checkpoint import tiny_gpt_oss_config
from torch import Tensor, nn

from mxref.blocks import (
    DeepSeekBlock,
    ExpertLinear,
    GptOssBlock,
    SharedExpert,
    deepseek_router,
    gpt_oss_activation,
    gpt_oss_router,
    routed_experts,
    swiglu,
)
from mxref.weights import decode_mxfp4, encode_mxfp4

TOKENS, RANK, SCALING = 24, 4, 0.5
RELATIVE = 1e-12


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype == torch.float64
    assert got.shape == expected.shape
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=0, atol=RELATIVE * expected.abs().max().item())


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """fp64 parameters and buffers, all random and of ordinary size, biases included."""
    module = module.double()
    with torch.no_grad():
        for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
            tensor.copy_(draw(*tensor.shape, seed=seed + i, scale=0.3))
    return module


def adapter(experts: int, K: int, N: int, seed: int) -> dict[str, Tensor | float]:
    A = draw(experts * RANK, K, seed=seed, scale=0.2).requires_grad_()
    B = draw(N, experts * RANK, seed=seed + 1, scale=0.2).requires_grad_()
    return {"lora_A": A, "lora_B": B, "scaling": SCALING}


def merged(linear: ExpertLinear) -> Tensor:
    """W + s·(B·A)ᵀ as dense [E, K, N], differentiable: what an adapter means."""
    E, r = linear.num_experts, RANK
    A = linear.lora_A.view(E, r, -1)
    B = linear.lora_B.view(-1, E, r)
    base = linear.weight if isinstance(linear.weight, Tensor) else decode_mxfp4(linear.weight, torch.float64).mT
    return base + linear.scaling * torch.einsum("erk,ner->ekn", A, B)


def quantise(parameter: nn.Parameter, transposed: bool):
    """MXFP4 of an expert parameter, which takes on the decoded values; transposed: it is [E, K, N] in the module."""
    with torch.no_grad():
        weights = encode_mxfp4(parameter.mT.contiguous() if transposed else parameter)
        decoded = decode_mxfp4(weights, torch.float64)
        parameter.copy_(decoded.mT if transposed else decoded)
    return weights


@pytest.fixture
def gpt_oss():
    """(transformers' GptOssMLP with MXFP4-valued weights, our block over the packed weights)."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    module = randomise(GptOssMLP(tiny_gpt_oss_config(experts=4, hidden=64, intermediate=96)))
    experts = module.experts
    block = GptOssBlock(
        module.router.weight.detach(),
        module.router.bias.detach(),
        ExpertLinear(quantise(experts.gate_up_proj, transposed=True), bias=experts.gate_up_proj_bias.detach()),
        ExpertLinear(quantise(experts.down_proj, transposed=True), bias=experts.down_proj_bias.detach()),
        top_k=2,
    )
    return module, block


def deepseek_config(**changes):
    from transformers import DeepseekV4Config

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
    layers = {"num_hidden_layers": 1, "mlp_layer_types": ["moe"], "layer_types": ["sliding_attention"]}
    return DeepseekV4Config(**sizes, **layers, **changes)


def deepseek_pair(**changes):
    """(transformers' DeepseekV4SparseMoeBlock, our block)."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

    config = deepseek_config(routed_scaling_factor=1.5, **changes)
    module = randomise(DeepseekV4SparseMoeBlock(config, 0))
    shared = module.shared_experts
    block = DeepSeekBlock(
        module.gate.weight.detach(),
        module.gate.e_score_correction_bias,
        ExpertLinear(quantise(module.experts.gate_up_proj, transposed=False)),
        ExpertLinear(quantise(module.experts.down_proj, transposed=False)),
        SharedExpert(
            torch.cat([shared.gate_proj.weight, shared.up_proj.weight]).detach(), shared.down_proj.weight.detach()
        ),
        top_k=2,
        routed_scaling=1.5,
        score=config.scoring_func,
        limit=config.swiglu_limit,
    )
    return module, block


class TestGptOss:
    def test_router(self, gpt_oss):
        module, block = gpt_oss
        x = draw(TOKENS, 64, seed=50)
        experts, gates = gpt_oss_router(x, block.router_weight, block.router_bias, 2)
        _, their_gates, their_experts = module.router(x)
        assert torch.equal(experts, their_experts)
        assert_close(gates, their_gates)

    def test_activation_with_both_clamps_in_use(self, gpt_oss):
        gate_up = draw(64, 192, seed=51, scale=6.0)
        assert (gate_up.abs() > 7).any()
        assert_close(gpt_oss_activation(gate_up), gpt_oss[0].experts._apply_gate(gate_up))

    def test_block(self, gpt_oss):
        module, block = gpt_oss
        x = draw(TOKENS, 64, seed=52)
        assert_close(block(x), module(x[None])[0][0])

    def test_gradient_of_x_and_router(self, gpt_oss):
        module, block = gpt_oss
        x, grad = draw(TOKENS, 64, seed=53).requires_grad_(), draw(TOKENS, 64, seed=54)
        weight = block.router_weight.clone().requires_grad_()
        ours = torch.autograd.grad(replace(block, router_weight=weight)(x), (x, weight), grad)
        theirs = torch.autograd.grad(module(x[None])[0][0], (x, module.router.weight), grad)
        for got, expected in zip(ours, theirs, strict=True):
            assert_close(got, expected)

    def test_adapters_equal_merged_weights(self, gpt_oss):
        """The block with LoRA is transformers' block with W + s·B·A, in values and in the adapters' gradients."""
        module, block = gpt_oss
        block = replace(
            block,
            gate_up=replace(block.gate_up, **adapter(4, 64, 192, seed=60)),
            down=replace(block.down, **adapter(4, 96, 64, seed=62)),
        )
        x, grad = draw(TOKENS, 64, seed=55), draw(TOKENS, 64, seed=56)
        adapters = [getattr(p, name) for p in (block.gate_up, block.down) for name in ("lora_A", "lora_B")]
        out = block(x)
        merged_weights = {"experts.gate_up_proj": merged(block.gate_up), "experts.down_proj": merged(block.down)}
        expected = torch.func.functional_call(module, merged_weights, (x[None],))[0][0]
        assert_close(out, expected)
        ours, theirs = torch.autograd.grad(out, adapters, grad), torch.autograd.grad(expected, adapters, grad)
        for got, reference in zip(ours, theirs, strict=True):
            assert_close(got, reference)

    def test_frozen_weights_get_no_gradient(self, gpt_oss):
        _, block = gpt_oss
        dense = decode_mxfp4(block.gate_up.weight, torch.float64).mT.contiguous()
        unpacked = replace(block, gate_up=replace(block.gate_up, weight=dense, **adapter(4, 64, 192, seed=64)))
        unpacked(draw(TOKENS, 64, seed=57)).sum().backward()
        assert unpacked.gate_up.lora_A.grad is not None
        assert dense.grad is None
        with pytest.raises(ValueError, match="frozen"):
            replace(unpacked, gate_up=replace(unpacked.gate_up, weight=dense.requires_grad_()))(draw(3, 64, seed=58))

    def test_a_sentinel_slot_adds_nothing(self, gpt_oss):
        _, block = gpt_oss
        x = draw(TOKENS, 64, seed=59)
        experts, gates = gpt_oss_router(x, block.router_weight, block.router_bias, 2)
        masked = experts.clone()
        masked[:, 1] = 4
        rest = (block.gate_up, block.down, gpt_oss_activation)
        assert_close(routed_experts(x, masked, gates, *rest), routed_experts(x, experts[:, :1], gates[:, :1], *rest))

    def test_bf16_follows_the_dtype_of_x(self, gpt_oss):
        _, block = gpt_oss
        narrow = replace(block, router_weight=block.router_weight.bfloat16(), router_bias=block.router_bias.bfloat16())
        assert narrow(draw(TOKENS, 64, seed=52).bfloat16()).dtype == torch.bfloat16


class TestDeepSeek:
    @pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
    def test_router(self, score):
        module, block = deepseek_pair(scoring_func=score)
        x = draw(TOKENS, 64, seed=70)
        experts, gates = deepseek_router(x, block.router_weight, block.correction_bias, 2, 1.5, score)
        _, their_gates, their_experts = module.gate(x)
        order, their_order = experts.argsort(dim=1), their_experts.argsort(dim=1)
        assert torch.equal(experts.gather(1, order), their_experts.gather(1, their_order))
        assert_close(gates.gather(1, order), their_gates.gather(1, their_order))

    def test_the_correction_bias_chooses_and_does_not_weigh(self):
        weight, x = draw(8, 64, seed=71, scale=0.3), draw(TOKENS, 64, seed=72)
        favourite = torch.zeros(8, dtype=torch.float64)
        favourite[3] = 100.0
        experts, gates = deepseek_router(x, weight, favourite, 2)
        assert (experts == 3).any(dim=1).all()
        scores = torch.sigmoid(x @ weight.T).gather(1, experts)
        assert_close(gates, scores / scores.sum(dim=1, keepdim=True))

    @pytest.mark.parametrize("limit", [None, 1.0])
    def test_swiglu_limit(self, limit):
        gate_up = draw(16, 64, seed=73, scale=3.0)
        gate, up = gate_up[:, :32], gate_up[:, 32:]
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        assert_close(swiglu(gate_up, limit), gate * torch.sigmoid(gate) * up)

    @pytest.mark.parametrize(("score", "limit"), [("sigmoid", 10.0), ("sqrtsoftplus", 1.0)])
    def test_block_and_gradients(self, score, limit):
        module, block = deepseek_pair(scoring_func=score, swiglu_limit=limit)
        x, grad = draw(TOKENS, 64, seed=74).requires_grad_(), draw(TOKENS, 64, seed=75)
        weight = block.router_weight.clone().requires_grad_()
        out, expected = replace(block, router_weight=weight)(x), module(x[None])[0]
        assert_close(out, expected)
        ours = torch.autograd.grad(out, (x, weight), grad)
        theirs = torch.autograd.grad(expected, (x, module.gate.weight), grad)
        for got, reference in zip(ours, theirs, strict=True):
            assert_close(got, reference)

    def test_adapters_equal_merged_weights(self):
        module, block = deepseek_pair(scoring_func="sigmoid")
        block = replace(
            block,
            gate_up=replace(block.gate_up, **adapter(8, 64, 64, seed=80)),
            down=replace(block.down, **adapter(8, 32, 64, seed=82)),
        )
        x, grad = draw(TOKENS, 64, seed=76), draw(TOKENS, 64, seed=77)
        adapters = [getattr(p, name) for p in (block.gate_up, block.down) for name in ("lora_A", "lora_B")]
        out = block(x)
        weights = {"experts.gate_up_proj": merged(block.gate_up).mT, "experts.down_proj": merged(block.down).mT}
        expected = torch.func.functional_call(module, weights, (x[None],))[0]
        assert_close(out, expected)
        ours, theirs = torch.autograd.grad(out, adapters, grad), torch.autograd.grad(expected, adapters, grad)
        for got, reference in zip(ours, theirs, strict=True):
            assert_close(got, reference)

    def test_experts_of_v3_under_its_own_routing(self):
        """V3's router computes in fp32 whatever its input, so its choice and gates are handed over as they are."""
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        config = DeepseekV3Config(
            hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
            n_group=1, topk_group=1,
        )  # fmt: skip
        module = randomise(DeepseekV3MoE(config))
        x = draw(TOKENS, 64, seed=78)
        gate_up = ExpertLinear(quantise(module.experts.gate_up_proj, transposed=False))
        down = ExpertLinear(quantise(module.experts.down_proj, transposed=False))
        _, gates, experts = module.gate(x)
        assert_close(
            routed_experts(x, experts, gates.double(), gate_up, down, swiglu) + module.shared_experts(x),
            module(x[None])[0],
        )
        ours, our_gates = deepseek_router(
            x.float(), module.gate.weight.float(), module.gate.e_score_correction_bias.float(), 2,
            config.routed_scaling_factor,
        )  # fmt: skip
        order, their_order = ours.argsort(dim=1), experts.argsort(dim=1)
        assert torch.equal(ours.gather(1, order), experts.gather(1, their_order))
        torch.testing.assert_close(
            our_gates.gather(1, order), gates.float().gather(1, their_order), rtol=2**-18, atol=0
        )

    def test_an_unknown_score_is_refused(self):
        with pytest.raises(ValueError, match="score is 'softmax'"):
            deepseek_router(draw(2, 8, seed=0), draw(4, 8, seed=1), torch.zeros(4), 2, score="softmax")

    def test_the_small_shape(self):
        """E 8, hidden 512, intermediate 256, top-2, in bf16, with every adapter and the router trained."""
        E, H, intermediate = 8, 512, 256
        gate_up = ExpertLinear(
            encode_mxfp4(draw(E, 2 * intermediate, H, seed=90)), **adapter(E, H, 2 * intermediate, seed=91)
        )
        down = ExpertLinear(encode_mxfp4(draw(E, H, intermediate, seed=93)), **adapter(E, intermediate, H, seed=94))
        router = draw(E, H, seed=96, scale=0.05).bfloat16().requires_grad_()
        shared = SharedExpert(draw(2 * intermediate, H, seed=97).bfloat16(), draw(H, intermediate, seed=98).bfloat16())
        block = DeepSeekBlock(router, torch.zeros(E).bfloat16(), gate_up, down, shared, top_k=2, limit=10.0)
        out = block(draw(16, H, seed=99, scale=0.1).bfloat16())
        out.float().square().sum().backward()
        assert out.shape == (16, H)
        assert out.dtype == torch.bfloat16
        for parameter in (gate_up.lora_A, gate_up.lora_B, down.lora_A, down.lora_B, router):
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()
