"""An order to the gate as plain data, from which any process makes the same candidate and items."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import torch

from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.known import implementation
from mxref.verification.candidates.loading import declare
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.gate.plan import Item, plan, plan_checkpoint, plan_problem
from mxref.verification.gate.projections import Projections


@dataclass(frozen=True)
class Order:
    """What to judge, by what.

    Attributes:
        kernel: see `candidates.known.implementation`.
        device_type: "cpu" or "cuda".
        suite: "quick" or "full".
        seed: of every draw.
        points, accumulation, covers: declared in place of the candidate's own, where not None.
        projections: of a checkpoint, in place of the suite.
        shape: (E, K, N, M, k, r) of one problem in place of the suite.
        dtype: of its activations.
        patterns: of cases or checks; all when empty.
        rerun: identifiers of items; all when empty.
        lenient: `accumulation` is not the author's: the order-free bound is a second chance.
    """

    kernel: str
    device_type: str
    suite: Suite = "quick"
    seed: int = 0
    points: tuple[str, ...] | None = None
    accumulation: str | None = None
    covers: str | None = None
    projections: Projections | None = None
    shape: tuple[int, int, int, int, int, int] | None = None
    dtype: torch.dtype = torch.float32
    patterns: tuple[str, ...] = ()
    rerun: tuple[str, ...] = ()
    lenient: bool = False

    @property
    def device(self) -> torch.device:
        """To judge on."""
        return torch.device(self.device_type)

    @property
    def narrowed(self) -> str:
        """What it leaves of the suite, in words; empty for all."""
        parts = []
        if self.projections is not None:
            parts.append(f"weights of {self.projections.path}")
        if self.shape is not None:
            parts.append(f"shape {','.join(map(str, self.shape))} in {str(self.dtype).removeprefix('torch.')}")
        if self.patterns:
            parts.append(f"cases matching {' or '.join(self.patterns)}")
        if self.rerun:
            parts.append(f"item {', '.join(self.rerun)}" if len(self.rerun) == 1 else f"{len(self.rerun)} items")
        return ", ".join(parts)

    @property
    def command(self) -> str:
        """The command line that asks the same, but for what narrows it."""
        words = ["mxref", "gate", "--kernel", self.kernel, "--device", self.device_type, "--seed", str(self.seed)]
        words += ["--full"] if self.suite == "full" else []
        points = None if self.points is None else ",".join(self.points) or "contract"
        declared = {"--points": points, "--accumulation": self.accumulation, "--covers": self.covers}
        for option, value in declared.items():
            words += [option, value] if value is not None else []
        if self.projections is not None:
            words += ["--weights", str(self.projections.path), *self.projections.options]
        if self.shape is not None:
            words += ["--shape", ",".join(map(str, self.shape)), "--dtype", str(self.dtype).removeprefix("torch.")]
        return shlex.join(words)

    def candidate(self) -> Candidate:
        """The candidate, with its declarations.

        Raises:
            ValueError: it cannot be found or imported, or its declaration is wrong.
        """
        try:
            candidate = implementation(self.kernel).make(self.device)
        except ImportError as error:
            raise ValueError(f"--kernel {self.kernel}: {error}") from None
        return declare(candidate, self.points, self.accumulation, self.covers)

    def items(self, candidate: Candidate, interpreted: bool) -> list[Item]:
        """What the candidate is asked; `interpreted`: in Triton's interpreter.

        Raises:
            ValueError: nothing is left to ask, or `rerun` names no such item.
        """
        scope = Scope(self.suite, self.device_type, self.seed, interpreted, candidate.covers)
        if self.projections is not None:
            items = plan_checkpoint(self.projections, scope)
        elif self.shape is not None:
            items = plan_problem(self.shape, self.dtype, scope)
        else:
            items = plan(scope, own=candidate.operators is not None)
        fitting = [item for item in items if item.fits(self.patterns)]
        unknown = [identifier for identifier in self.rerun if identifier not in {item.id for item in fitting}]
        chosen = [item for item in fitting if not self.rerun or item.id in self.rerun]
        if unknown or not chosen:
            what = f"--rerun {' '.join(unknown)}" if unknown else f"--case {' '.join(self.patterns)}"
            raise ValueError(f"{what} matches nothing that this candidate is asked; --list prints what it is asked")
        return chosen
