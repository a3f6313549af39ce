"""The tools, how each is started, and what its output says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

DONE = "mxref: all work done"
"""What a watched process prints last; without it, it did not come to its end."""

UNWATCHED = "mxref: not instrumented: "
"""What it prints before the name of a case that the tool cannot watch."""

_ERROR_CODE = "97"
_ADDRESS = re.compile(r"\+?0x[0-9a-fA-F]+")
_FINDING = re.compile(
    r"^=+\s+((?:Invalid|Uninitialized|Misaligned|Program hit|Address|(?:ERROR|Error|Warning): Race)\b.*)"
)
_PLACE = re.compile(r"^=+\s+at (?:0x[0-9a-fA-F]+ in )?(\S+?)(?:\(|\+0x|$| )")
_ASSERTION = re.compile(r"Assertion `(.+?)['`] failed")
_KERNEL = re.compile(r"^(?:\S+?:\d+: )?(\w[\w.]*)\b.*block: \[")
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)")


@dataclass(frozen=True)
class Tool:
    """One tool.

    Attributes:
        name: on the command line.
        planted: the planted mistake of `workload` that it must find.
        before: what its command line has in front of the program.
        environment: variables that it needs.
    """

    name: str
    planted: str
    before: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What one tool said about one program.

    Attributes:
        findings: how often each was reported, "kind, kernel" in words.
        problem: why the tool's verdict cannot be had, in words; "" where it can.
        unwatched: cases with a kernel that the tool cannot instrument.
    """

    findings: Mapping[str, int]
    problem: str = ""
    unwatched: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether the tool found nothing in all that it can watch."""
        return not self.findings and not self.problem


def _compute_sanitizer(name: str, planted: str) -> Tool:
    before = ("compute-sanitizer", "--tool", name, "--error-exitcode", _ERROR_CODE, "--print-limit", "200")
    # Every tensor is an allocation of its own, so that what lies beside it belongs to nobody.
    return Tool(name, planted, before, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        _compute_sanitizer("memcheck", "out of bounds"),
        _compute_sanitizer("racecheck", "race"),
        _compute_sanitizer("initcheck", "uninitialised"),
        Tool(
            # ptxas takes over ten minutes and 10 GB to optimise an instrumented product.
            "consan", "unfinished copy", (),
            {"TRITON_INSTRUMENTATION_MODE": "consan", "CUDA_LAUNCH_BLOCKING": "1", "DISABLE_PTXAS_OPT": "1"},
        ),
    )
}  # fmt: skip


def read_report(tool: Tool, output: str, code: int) -> Report:
    """What a tool's output, stdout and stderr together, and the exit code of its process say."""
    lines = output.splitlines()
    findings = Counter(_assertions(lines) if not tool.before else _reported(lines))
    summary = [next(filter(None, match.groups())) for match in map(_SUMMARY.search, lines) if match is not None]
    if findings:
        return Report(findings)
    if tool.before and not summary:
        return Report({}, f"{tool.name} gave no summary (exit code {code}): {_last(lines)}")
    if tool.before and int(summary[-1]):
        return Report({"not understood: see the output": int(summary[-1])})
    if DONE not in output or code:
        return Report({}, f"the program did not come to its end (exit code {code}): {_last(lines)}")
    unwatched = (line.removeprefix(UNWATCHED) for line in lines if line.startswith(UNWATCHED))
    return Report({}, unwatched=tuple(dict.fromkeys(unwatched)))


def _reported(lines: list[str]) -> list[str]:
    """Each finding of compute-sanitizer with the kernel that the following lines name."""
    found = []
    for number, line in enumerate(lines):
        if (finding := _FINDING.match(line)) is None:
            continue
        places = (_PLACE.match(other) for other in lines[number + 1 : number + 3])
        kernel = next((place[1] for place in places if place is not None), "")
        what = " ".join(_ADDRESS.sub("", finding[1]).split())
        found.append(f"{what}, {kernel}" if kernel else what)
    return found


def _assertions(lines: list[str]) -> list[str]:
    """Each failed assertion on the device with its kernel; threads that fail alike count one by one."""
    found = []
    for line in lines:
        if (said := _ASSERTION.search(line)) is not None:
            kernel = _KERNEL.match(line)
            found.append(f"{said[1]}, {kernel[1]}" if kernel is not None else said[1])
    return found


def _last(lines: list[str]) -> str:
    told = [line.strip() for line in lines if line.strip()]
    return told[-1] if told else "it printed nothing"
