"""What must hold of ranks' answers; each check compares, and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.tensor_bytes import bytes_of
from mxref.verification.checks.elements import compare
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.patterns import Axis
from mxref.verification.distributed.expected import LOCAL, Expected
from mxref.verification.distributed.protocol import Saved, Trained

__all__ = ["Answers", "agree", "inside", "kept", "once", "repeated", "saved", "updated"]

_PARAMETERS = {"lora_A": "dA", "lora_B": "dB", "router": "drouter"}
"""What is trained, and its gradient."""
_BYTES = ("packed", "scales")


@dataclass(frozen=True)
class Answers:
    """What the ranks of one group answered to one case, by their rank in it.

    Attributes:
        name: of the case, and of the world.
        expected: of the fixture.
        trained: their answers.
        again: those to the same question once more; empty where it was not asked.
        saved: what each read back of what all have saved; empty where the step saves nothing.
    """

    name: str
    expected: Expected
    trained: Sequence[Trained]
    again: Sequence[Trained] = ()
    saved: Sequence[Saved] = ()


def inside(answers: Answers) -> list[Finding]:
    """Every result of every rank and step lies in its interval: in exact cases, equals the single process's."""
    how = "equal to the single process's" if answers.expected.fixture.case.exact else "inside the derived bound"
    findings = []
    for number, accepted in enumerate(answers.expected.steps):
        for tensor, interval in accepted.items():
            ends = [interval] * len(answers.trained)
            if tensor in LOCAL:
                ends = _split(interval, answers.expected.shares)
            dtypes = _dtypes(tensor, answers.expected.fixture.case.dtype)
            found = (
                _held(answers, tensor, _of_step(trained, number, tensor), own, dtypes, how)
                for trained, own in zip(answers.trained, ends, strict=True)
            )
            name = f"{answers.name}, step {number + 1}" if len(answers.expected.steps) > 1 else answers.name
            findings.append(replace(_over_ranks(found), case=name))
    return findings


def once(answers: Answers) -> list[Finding]:
    """No expert's gradient of an exact case is a whole multiple, or a whole part, of what it should be."""
    case, findings = answers.expected.fixture.case, []
    for tensor in ("dA", "dB"):
        wrong: dict[str, list[str]] = {}
        for number, accepted in enumerate(answers.expected.steps):
            right = accepted[tensor].exact
            for rank, trained in enumerate(answers.trained):
                got = _of_step(trained, number, tensor)
                if got is None or got.shape != right.shape:
                    continue
                for expert in range(case.experts):
                    own = slice(expert * case.rank, (expert + 1) * case.rank)
                    index = (own, slice(None)) if tensor == "dA" else (slice(None), own)
                    if (factor := _factor(got[index].double(), right[index])) is not None:
                        wrong.setdefault(factor, []).append(f"expert {expert} on rank {rank}")
        reason, status, patterns = "every expert's gradient counts once", Status.PASS, tuple[str, ...]()
        if wrong:
            said = "; ".join(f"{factor} ({', '.join(dict.fromkeys(places))})" for factor, places in wrong.items())
            reason, status, patterns = f"a gradient is {said}", Status.FAIL, (said,)
        count, number = case.experts * len(answers.trained), sum(map(len, wrong.values()))
        findings.append(Finding("", answers.name, tensor, status, reason, count, number, patterns=patterns))
    return findings


def agree(answers: Answers) -> list[Finding]:
    """What every rank has whole is the same on all, bit for bit: losses, gradients, and the model after the step."""

    def whole(trained: Trained) -> Iterator[tuple[str, Tensor]]:
        for name, x in _tensors(trained):
            if name not in LOCAL:
                yield name, x

    first, *others = answers.trained
    pairs = [(f"rank {rank} and rank 0", first, each) for rank, each in enumerate(others, 1)]
    return _alike(answers.name, pairs, whole)


def repeated(answers: Answers) -> list[Finding]:
    """The same question once more: every rank gives the same bits."""
    pairs = [
        (f"rank {rank} when it runs again", one, other)
        for rank, (one, other) in enumerate(zip(answers.trained, answers.again, strict=True))
    ]
    return _alike(answers.name, pairs, _tensors)


def updated(answers: Answers) -> list[Finding]:
    """A parameter is what it was, less the learning rate times each step's reported gradient: bit for bit, in fp32."""
    model, findings = answers.expected.fixture.model, []
    for name, gradient in _PARAMETERS.items():
        start: Tensor | None = getattr(model, name)
        if start is None:
            continue
        found = []
        for trained in answers.trained:
            parameter = start
            for number in range(len(trained.steps)):
                moved = _of_step(trained, number, gradient)
                if moved is not None and moved.shape == parameter.shape:
                    parameter = parameter - model.learning_rate * moved.float()
            found.append(_equal(answers, name, getattr(trained, name), parameter, "moved by the reported gradients"))
        findings.append(_over_ranks(found))
    return findings


def kept(answers: Answers) -> list[Finding]:
    """Packed weights and scales have their bytes, after the steps and in what was saved."""
    model, findings = answers.expected.fixture.model, []
    for name in _BYTES:
        held = [("after the steps", trained) for trained in answers.trained]
        held += [("read back", saved) for saved in answers.saved if getattr(saved, name) is not None]  # type: ignore[misc]
        found = (
            _equal(answers, name, getattr(state, name), getattr(model, name), f"every byte kept, {when}")
            for when, state in held
        )
        findings.append(_over_ranks(found))
    return findings


def saved(answers: Answers) -> list[Finding]:
    """What was saved is what was trained, every expert's, in the layout of the model."""
    findings = []
    for name in _PARAMETERS:
        right = getattr(answers.trained[0], name)
        if right is not None:
            found = (_equal(answers, name, getattr(each, name), right, "as trained") for each in answers.saved)
            findings.append(_over_ranks(found))
    return findings


def _of_step(trained: Trained, number: int, tensor: str) -> Tensor | None:
    x: Tensor | None = getattr(trained.steps[number], tensor) if number < len(trained.steps) else None
    return x


def _tensors(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an answer by its name; several steps' by one name."""
    for part in (*trained.steps, trained):
        for name, x in vars(part).items():
            if isinstance(x, Tensor):
                yield name, x


def _alike(
    case: str,
    pairs: Sequence[tuple[str, Trained, Trained]],
    tensors: Callable[[Trained], Iterator[tuple[str, Tensor]]],
) -> list[Finding]:
    """One finding a tensor: whether both answers of every pair have the same bits."""
    findings: dict[str, Finding] = {}
    for who, one, other in pairs:
        for (name, x), (_, y) in zip(tensors(one), tensors(other), strict=False):
            differing = int((bytes_of(x) != bytes_of(y)).any(-1).sum()) if _form(x) == _form(y) else x.numel()
            status, reason = Status.PASS, "the same bits"
            if differing or len(one.steps) != len(other.steps):
                status, reason = Status.FAIL, f"other bits: {who}, {differing} of {x.numel()} elements"
            if name not in findings or findings[name].ok:
                findings[name] = Finding("", case, name, status, reason, x.numel(), differing)
    return list(findings.values())


def _form(x: Tensor) -> tuple[object, ...]:
    return tuple(x.shape), x.dtype


def _dtypes(tensor: str, activation: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a result may be stored in, the regular one first."""
    return (activation, torch.float32) if tensor in LOCAL else (torch.float32,)


def _equal(answers: Answers, tensor: str, got: Tensor | None, right: Tensor, reason: str) -> Finding:
    """Whether a whole tensor is the right one."""
    value = right.double()
    return _held(answers, tensor, got, Interval(value, value, value), (right.dtype,), reason)


def _held(
    answers: Answers, tensor: str, got: Tensor | None, interval: Interval, dtypes: Sequence[torch.dtype], reason: str
) -> Finding:
    """One rank's tensor held against what is accepted for it."""
    shape, elements = tuple(interval.exact.shape), interval.exact.numel()
    said = ""
    if got is None:
        said = "the step gives none"
    elif tuple(got.shape) != shape:
        said = f"has shape {tuple(got.shape)}; expected {shape}"
    elif got.dtype not in dtypes:
        said = f"is {got.dtype}; expected {dtypes[0]}"
    if got is None or said:
        return Finding("", answers.name, tensor, Status.FAIL, said, elements, elements)
    got = got.float() if got.dtype == torch.uint8 else got
    return compare(got, interval).finding(answers.name, tensor, Status.PASS, reason, _axes(answers, tensor))


def _over_ranks(found: Iterator[Finding] | Sequence[Finding]) -> Finding:
    """One finding of every rank's: the first that failed, with its rank, or all added up."""
    findings = list(found)
    for rank, finding in enumerate(findings):
        if not finding.ok:
            return replace(finding, reason=f"rank {rank}: {finding.reason}")
    shares = [f.bound_share for f in findings if f.bound_share is not None]
    ulps = [f.max_ulp for f in findings if f.max_ulp is not None]
    elements = sum(f.elements for f in findings)
    return replace(
        findings[0], elements=elements, bound_share=max(shares, default=None), max_ulp=max(ulps, default=None)
    )


def _split(interval: Interval, shares: Sequence[int]) -> list[Interval]:
    """The interval of every rank's tokens."""
    parts = (torch.split(x, list(shares)) for x in (interval.low, interval.high, interval.exact))
    return [Interval(low, high, exact) for low, high, exact in zip(*parts, strict=True)]


def _factor(got: Tensor, right: Tensor) -> str | None:
    """By what whole number an expert's gradient is multiplied or divided, in words; None where it is right, or else."""
    size, product = float((right * right).sum()), float((got * right).sum())
    if not size or not product or torch.equal(got, right):
        return None
    factor = product / size
    if not torch.equal(got, factor * right):
        return None
    if factor == round(factor):
        return f"{round(factor)} times what it should be"
    return f"1/{round(1 / factor)} of what it should be" if 1 / factor == round(1 / factor) else None


def _axes(answers: Answers, tensor: str) -> list[Axis]:
    """The axes of a tensor, for what its wrong elements have in common."""
    case = answers.expected.fixture.case
    own = torch.arange(case.experts * case.rank) // case.rank
    column, k_column = Axis("column"), Axis("column", block=MX_BLOCK_SIZE)
    of_A, of_B = [Axis("row", (("expert", own),)), k_column], [Axis("row"), Axis("column", (("expert", own),))]
    return {
        "Y": [Axis("token"), column],
        "dX": [Axis("token"), k_column],
        "dgates": [Axis("token"), Axis("slot")],
        "dA": of_A,
        "lora_A": of_A,
        "dB": of_B,
        "lora_B": of_B,
        "drouter": [Axis("expert"), k_column],
        "router": [Axis("expert"), k_column],
    }.get(tensor, [Axis("expert"), Axis("row"), column] if tensor in _BYTES else [])
