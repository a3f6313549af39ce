"""Checks of values pass what is right and catch each kind of mistake, planted on the golden model's own results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from judging import ask, ask_about_decoding, integers, quick
from torch import Tensor

from mxref import NotCovered, parallel_linear_lora
from mxref.formats import fp4_codebook
from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import ErrorSample, Finding, Status
from mxref.verification.checks.registry import INTERVAL
from mxref.weights import MXWeights, decode_mxfp4

BF16, FP32 = torch.bfloat16, torch.float32
LEAVES = {"dX": "inputs", "dA": "lora_A", "dB": "lora_B", "dbias": "expert_biases", "dgates": "gates"}
SAMPLE = draw(Case("case", 3, 64, 64, 12, 2, 4, BF16, bias=True, gate_slots=2))
Outputs = dict[str, Tensor | None]


@dataclass
class Golden:
    """The golden model; `before` changes the problem it sees, `after` what it returns."""

    before: Callable[[Problem], Problem] = lambda problem: problem
    after: Callable[[Outputs], object] = lambda outputs: None
    decode: Callable[[MXWeights, torch.dtype], Tensor] | None = None

    def run(self, sample: Sample) -> Mapping[str, Tensor | None]:
        problem = self.before(sample.problem)
        leaves = {
            name: getattr(problem, operand).detach().clone().requires_grad_()
            for name, operand in LEAVES.items()
            if getattr(problem, operand) is not None
        }
        copies = {LEAVES[name]: leaf for name, leaf in leaves.items()}
        y = parallel_linear_lora(**replace(problem, **copies).arguments(), **sample.case.flags())
        y.backward(sample.grad_out)
        outputs: Outputs = {"Y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
        self.after(outputs)
        return outputs


def judge(candidate: Golden, sample: Sample = SAMPLE, how: str = "tensor-core-sm90") -> dict[str, Finding]:
    findings = ask("interval", candidate, sample, how=ACCUMULATIONS[how])
    assert len({f.tensor for f in findings}) == len(findings)
    return {finding.tensor: finding for finding in findings}


def failed(findings: Iterable[Finding]) -> set[str]:
    return {finding.tensor for finding in findings if finding.status is Status.FAIL}


def poke(tensor: str, value: Callable[[Tensor], Tensor], at: tuple[int, ...] = (1, 3)) -> Callable[[Outputs], None]:
    def after(outputs: Outputs) -> None:
        x = outputs[tensor]
        assert x is not None
        x[at] = value(x[at])

    return after


def put(tensor: str, value: Tensor | None) -> Callable[[Outputs], None]:
    return lambda outputs: outputs.update({tensor: value})


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_the_golden_model_passes(dtype: torch.dtype) -> None:
    assert {f.status for f in ask_about_decoding(Golden(decode=decode_mxfp4), dtype)} == {Status.PASS}
    how = "fp32-blocks-16" if dtype == FP32 else "tensor-core-sm90"
    for case in quick("cpu"):
        if case.rows * case.N <= 6000 and dtype != torch.float16:
            findings = judge(Golden(), draw(replace(case, dtype=dtype), "cpu", 1), how)
            assert {f.status for f in findings.values()} == {Status.PASS}, case.name
    for case in integers("cpu" if dtype == FP32 else "cuda"):
        if case.dtype == dtype:
            assert {f.status for f in ask("integer", Golden(), draw(case, "cpu", 1))} == {Status.PASS}, case.name


def test_a_finding_carries_the_numbers() -> None:
    finding = judge(Golden())["Y"]
    assert finding.elements == SAMPLE.grad_out.numel()
    assert finding.violations == 0
    assert 0 < finding.max_ulp <= 0.5
    assert 0 < finding.rms_ulp <= finding.max_ulp
    assert 0 < finding.bound_share <= 1
    assert finding.counterexample is None


def test_an_undeclared_accumulation_passes_weakly() -> None:
    assert {f.status for f in judge(Golden(), how="undeclared").values()} == {Status.WEAK}


@pytest.mark.parametrize("tensor", ["Y", "dX", "dA", "dB", "dbias", "dgates"])
def test_one_wrong_element_of_any_tensor_is_named(tensor: str) -> None:
    at = (1, 1)
    finding = judge(Golden(after=poke(tensor, lambda x: x * 1.05 + 0.01, at)))[tensor]
    assert finding.status is Status.FAIL
    assert finding.violations == 1
    example = finding.counterexample
    assert example.coordinate == at
    assert not example.low <= example.got <= example.high
    assert example.low <= example.expected <= example.high or abs(example.low - example.expected) < 1e-2
    assert "[1, 1]: got" in str(finding)


def test_two_bf16_numbers_further_is_caught() -> None:
    """Both neighbours of an exact value may be honest, what lies behind them cannot."""

    def two_up(x: Tensor) -> Tensor:
        top = torch.tensor(torch.inf, dtype=BF16)
        return torch.nextafter(torch.nextafter(x, top), top)

    finding = judge(Golden(after=poke("Y", two_up)))["Y"]
    assert finding.violations == 1
    assert finding.counterexample.got > finding.counterexample.high


@pytest.mark.parametrize(("value", "note"), [(torch.nan, "NaN where"), (torch.inf, ""), (-torch.inf, "")])
def test_what_is_not_finite_fails(value: float, note: str) -> None:
    finding = judge(Golden(after=poke("dX", lambda x: torch.full_like(x, value))))["dX"]
    assert finding.status is Status.FAIL
    assert note in finding.counterexample.note


@pytest.mark.parametrize(
    ("after", "tensor", "reason"),
    [
        (put("dA", None), "dA", "no gradient reached lora_A"),
        (put("Y", None), "Y", "no output"),
        (put("dB", torch.zeros(3, 3, dtype=BF16)), "dB", "has shape (3, 3)"),
        (put("dX", torch.zeros(12, 64, dtype=torch.float16)), "dX", "is torch.float16"),
        (put("dW", torch.zeros(3, 64, 64)), "dW", "nothing asks for"),
    ],
)
def test_malformed_results_fail_with_a_reason(after: Callable[[Outputs], None], tensor: str, reason: str) -> None:
    for check in ("interval", "integer"):
        (finding,) = (f for f in ask(check, Golden(after=after), SAMPLE) if f.tensor == tensor)
        assert finding.status is Status.FAIL
        assert reason in finding.reason


def test_a_gpu_s_result_is_not_wider_than_asked_for_wherever_it_is_compared() -> None:
    sample = draw(Case("small", dtype=torch.bfloat16, parameter_dtype=torch.float32))
    points = RoundingPoints.contract(sample.problem.dtype)
    here = Expectation(sample, points, ACCUMULATIONS["fp32-blocks-64"])
    answers = INTERVAL.ask(golden(), sample)
    answers = [replace(answer, outputs={**answer.outputs, "dX": answer.outputs["dX"].float()}) for answer in answers]
    assert not failed(INTERVAL.compare(answers, here))
    on_gpu = INTERVAL.compare(answers, replace(here, asked_on=torch.device("cuda")))
    assert {finding.reason for finding in on_gpu if not finding.ok} == {"is torch.float32; expected torch.bfloat16"}


def test_exceptions_are_findings() -> None:
    def refuse(problem: Problem) -> Problem:
        raise NotCovered("no gates")

    def crash(problem: Problem) -> Problem:
        raise RuntimeError("illegal memory access")

    for check in ("interval", "integer"):
        (declined,), (crashed,) = (ask(check, Golden(before=before), SAMPLE) for before in (refuse, crash))
        assert (declined.status, declined.reason) == (Status.NOT_COVERED, "no gates")
        assert (crashed.status, crashed.reason) == (Status.FAIL, "raised RuntimeError: illegal memory access")
    left_out = judge(Golden(after=lambda outputs: outputs.pop("dX")))
    assert left_out["dX"].status is Status.FAIL
    assert left_out["Y"].status is Status.PASS


def scaled(name: str, factor: float) -> Callable[[Problem], Problem]:
    return lambda problem: replace(problem, **{name: getattr(problem, name) * factor})


def other_bytes(change: Callable[[Tensor], Tensor], buffer: str) -> Callable[[Problem], Problem]:
    def before(problem: Problem) -> Problem:
        weights = problem.expert_weights
        changed = replace(weights, **{buffer: change(getattr(weights, buffer).clone())})
        return replace(problem, expert_weights=changed)

    return before


def next_expert(problem: Problem) -> Problem:
    return replace(problem, lora_B=problem.lora_B.roll(problem.rank, 1))


MISTAKES: dict[str, tuple[Callable[[Problem], Problem], set[str]]] = {
    "scale bytes one up": (other_bytes(lambda b: b + 1, "scales"), {"Y", "dX"}),
    "scales of the neighbouring block": (other_bytes(lambda b: b.roll(1, 2), "scales"), {"Y", "dX"}),
    "nibbles swapped": (other_bytes(lambda b: (b << 4) | (b >> 4), "packed"), {"Y", "dX"}),
    "scaling doubled": (lambda p: replace(p, scaling=2 * p.scaling), {"Y", "dX", "dA", "dB"}),
    "scaling one per cent off": (lambda p: replace(p, scaling=1.01 * p.scaling), {"Y", "dA", "dB"}),
    "B of the next expert": (next_expert, {"Y", "dX", "dA"}),
    "bias left out": (scaled("expert_biases", 0), {"Y"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake: str) -> None:
    before, tensors = MISTAKES[mistake]
    sample = draw(Case("balanced", 3, 64, 64, 24, 2, 4, BF16, data="balanced", bias=True))
    assert tensors <= failed(judge(Golden(before=before), sample).values())
    if mistake != "scaling one per cent off":  # bf16 rounds this away from small integers
        assert {"Y"} <= failed(ask("integer", Golden(before=before), draw(integers("cuda")[0])))


DECODE_BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "byte 0 is zero": lambda b: torch.where(b == 0, 1, b),
    "byte 255 is infinite": lambda b: torch.where(b == 255, 254, b),
    "byte 254 wraps": lambda b: torch.where(b == 254, 0, b),
    "byte 252 one off": lambda b: torch.where(b == 252, 251, b),
}


@pytest.mark.parametrize("bug", DECODE_BUGS)
def test_wrong_decoding_of_a_single_byte_is_caught(bug: str) -> None:
    def decode(weights: MXWeights, dtype: torch.dtype) -> Tensor:
        return decode_mxfp4(replace(weights, scales=DECODE_BUGS[bug](weights.scales)), dtype)

    findings = ask_about_decoding(Golden(other_bytes(DECODE_BUGS[bug], "scales"), decode=decode), BF16)
    assert failed(findings) == {"Y", "dX", "W"}
    (own,) = (f for f in findings if f.tensor == "W")
    assert own.violations <= 512


def test_an_infinite_scale_in_place_of_nan_is_caught() -> None:
    """Zeros in its block would hide it: 0·inf is NaN too."""

    def infinite(problem: Problem) -> Problem:
        weights = problem.expert_weights
        assert isinstance(weights, MXWeights)
        plain = replace(weights, scales=torch.where(weights.scales == 255, 127, weights.scales))
        W = decode_mxfp4(plain, problem.dtype)
        factor = torch.where(weights.scales == 255, torch.inf, 1.0).repeat_interleave(32, 2)
        return replace(problem, expert_weights=(W * factor).to(problem.dtype).mT)

    findings = [f for f in ask_about_decoding(Golden(before=infinite), BF16) if f.status is Status.FAIL]
    assert {(f.case, f.tensor) for f in findings} == {("byte 255 alone, bfloat16", t) for t in ("Y", "dX")}


def test_a_lost_sign_of_zero_and_a_wrong_code_are_caught_in_decode() -> None:
    def unsigned(weights: MXWeights, dtype: torch.dtype) -> Tensor:
        return decode_mxfp4(weights, dtype) + 0.0

    (own,) = (f for f in ask_about_decoding(Golden(decode=unsigned), BF16) if f.tensor == "W")
    assert own.status is Status.FAIL
    assert own.violations == 255 * 32  # code 8 under every byte but NaN's, in every place
    assert fp4_codebook("cpu")[8] == 0
    swapped = other_bytes(lambda b: torch.where(b == 0x21, 0x12, b), "packed")
    assert failed(ask_about_decoding(Golden(before=swapped), BF16)) == {"Y", "dX"}


def test_a_decode_of_the_wrong_form_or_that_raises_is_a_finding() -> None:
    def half(weights: MXWeights, dtype: torch.dtype) -> Tensor:
        return decode_mxfp4(weights, dtype)[:, :7]

    def absent(weights: MXWeights, dtype: torch.dtype) -> Tensor:
        raise NotCovered

    assert "decode returned (2, 7, 256)" in ask_about_decoding(Golden(decode=half), BF16)[-1].reason
    assert ask_about_decoding(Golden(decode=absent), BF16)[-1].status is Status.NOT_COVERED


def test_nan_weights_must_stay_nan_and_infinite_ones_keep_their_sign() -> None:
    sample = draw(Case("poisoned", 2, 64, 64, 12, 2, 4, BF16))
    weights = sample.problem.expert_weights
    scales, packed = weights.scales.clone(), weights.packed.clone()
    scales[0, 5, 0] = 255
    scales[1, 9, 1], packed[1, 9, 16:] = 254, 0
    packed[1, 9, 16] = 7  # 6·2^127, infinite in bf16, the block's only nonzero
    poisoned = replace(sample.problem, expert_weights=replace(weights, scales=scales, packed=packed))
    sample = replace(sample, problem=poisoned)
    assert {f.status for f in judge(Golden(), sample).values()} == {Status.PASS}

    def quiet(outputs: Outputs) -> None:
        outputs["Y"] = outputs["Y"].nan_to_num(nan=0.0)

    def flipped(outputs: Outputs) -> None:
        outputs["Y"] = torch.where(torch.isinf(outputs["Y"]), -outputs["Y"], outputs["Y"])

    for after in (quiet, flipped):
        finding = judge(Golden(after=after), sample)["Y"]
        assert finding.status is Status.FAIL
        assert "same class" in finding.counterexample.note


def test_error_samples_are_thinned_and_finite() -> None:
    sample = draw(Case("many", 1, 32, 512, 96, 1, 4, BF16))
    findings = judge(Golden(), sample)
    assert {tensor for tensor, f in findings.items() if isinstance(f.picture, ErrorSample)} == {"Y", "dX", "dA", "dB"}
    y = findings["Y"].picture
    assert 10_000 < len(y.error) <= 20_000
    assert len(y.magnitude) == len(y.error) == len(y.bound) == len(y.ulp_error)
    assert (abs(y.error) <= y.bound).all()
    assert (abs(y.ulp_error) <= 0.5).all()
