"""Ahead-of-time compilation of what the dispatch can launch, in every tiling, for GPUs that this machine does not have.

    python -m mxref.verification.studies.compiled.ahead_of_time [--arch sm_90]
    python -m mxref.verification.studies.compiled.ahead_of_time --loops fragments     what a warp issues in inner loops

The layer's own host code runs forward and backward on `meta` tensors for each architecture, tiling and dtype, the
launches are recorded instead of started, and each distinct one is compiled. Reported for each: registers a thread,
stack bytes (which is where spills go), shared memory against the chip's limit. Violations are a stack, a flush-to-zero
instruction, which would break the decode of scale byte 0, and the hazards that `machine_code` finds; the exit status is
then 1.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
import triton
from torch import Tensor

from mxref.formats import MXFP4
from mxref.kernels.compiled.units import Unit, units_of
from mxref.kernels.device.activation import activate, activate_backward
from mxref.kernels.device.configs import SHARED_MEMORY, Config, reachable_configs
from mxref.kernels.device.dequant import dequantize_experts
from mxref.kernels.device.launch import INTERPRETED, Launch, recording
from mxref.kernels.layer.autograd import parallel_linear_lora
from mxref.swiglu import GPT_OSS, SILU, SwiGLU
from mxref.verification.studies.compiled.machine_code import (
    KINDS,
    Resources,
    disassemble,
    hazards,
    inner_loops,
    resources,
)
from mxref.weights import MXLayout, MXWeights

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a unit.

    Attributes:
        unit: what was compiled.
        resources: registers a thread and stack bytes.
        shared: bytes of shared memory.
        hazards: what makes results wrong, if only now and then, in words.
    """

    unit: Unit
    resources: Resources
    shared: int
    hazards: tuple[str, ...]

    @property
    def violations(self) -> list[str]:
        """What must not be, in words: the hazards, spills, and more shared memory than there is."""
        limit = SHARED_MEMORY[self.unit.architecture]
        found = []
        if self.resources.stack:
            found.append(f"{self.resources.stack} bytes of stack")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, limit {limit}")
        return [*found, *self.hazards]


_GPT_OSS = (2880, 5760)
_OTHER_SIZES = ((2048, 1024), (1056, 1056))
"""K and N: whole steps both ways, and an odd number of blocks, for which `hopper` is compiled differently."""


def units(architecture: str, sizes: tuple[int, int] = _GPT_OSS) -> Iterator[Unit]:
    """The distinct compilations of one architecture: bf16 in all reachable tilings, fp16 and fp32 in one each.

    `sizes`: K and N of most of them.
    """
    return units_of(architecture, chain(_of_products(architecture, sizes), _of_activations(architecture)))


def _of_products(architecture: str, sizes: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """Labels and launches of the layer, forward and backward."""
    for dtype, config, rank, steps, own in _settings(architecture, sizes):
        for step in steps:
            for launch in _launches(architecture, dtype, config, rank, step, own):
                yield f"{step} {_plain(dtype)} r{rank}", launch


def _of_activations(architecture: str) -> Iterator[tuple[str, Launch]]:
    """Labels and launches of what lies between two projections, forward and backward."""
    kinds = [(GPT_OSS, torch.bfloat16), (SILU, torch.bfloat16), (SwiGLU(limit=10.0), torch.bfloat16)]
    for form, dtype in (*kinds, (GPT_OSS, torch.float16), (GPT_OSS, torch.float32)):
        with recording(architecture) as recorder:
            gate_up, h = (torch.empty(512, width, dtype=dtype, device="meta") for width in (_GPT_OSS[1], _GPT_OSS[0]))
            activate(gate_up, form, h)
            activate_backward(gate_up, h, form, gate_up)
        for launch in recorder.launches:
            yield f"{'interleaved' if form.interleaved else 'halves'} {_plain(dtype)}", launch


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settings(
    architecture: str, most: tuple[int, int]
) -> Iterator[tuple[torch.dtype, Config, int, tuple[str, ...], tuple[int, int]]]:
    """dtype, tiling, rank, steps and sizes: what holds the most in every tiling, everything else in the largest.

    Weights in the layout FRAGMENTS by their own kernel, and by the portable one in its smallest tiling.
    """
    own, tilings = reachable_configs(architecture, layout=MXLayout.FRAGMENTS), reachable_configs(architecture)
    own = own if own[0].fragments else own[:1]
    for config in own:
        yield torch.bfloat16, config, 16, ("fragments", "fragments ordered"), most
    for config in tilings:
        yield torch.bfloat16, config, 16, ("fused",), most
    yield torch.bfloat16, tilings[-1], 16, ("unfused", "dense"), most
    for sizes in _OTHER_SIZES:
        yield torch.bfloat16, own[-1], 16, ("fragments", "fragments ordered"), sizes
        yield torch.bfloat16, tilings[-1], 16, ("fused",), sizes
    yield torch.bfloat16, own[-1], 128, ("fragments",), most
    yield torch.bfloat16, tilings[-1], 128, ("fused", "dense"), most
    yield torch.float16, reachable_configs(architecture, torch.float16)[-1], 16, ("fused",), most
    for rank in (16, 128):
        yield torch.float32, reachable_configs(architecture, torch.float32)[0], rank, ("fused",), most


def _launches(
    architecture: str, dtype: torch.dtype, config: Config, rank: int, step: str, sizes: tuple[int, int]
) -> list[Launch]:
    """The launches of one training step of 32 experts, 512 tokens.

    `fused` and `unfused` read packed weights and take the flag combination of that name: with gates on rows of tokens,
    and without on rows in expert order. `dense` reads dense weights. `fragments` and `fragments ordered` are the same
    on the layout of that name; of the two only the first has scales up to 128 alone.
    """
    E, (K, N), M, k = 32, sizes, 512, 4
    with recording(architecture) as recorder:
        weights: Tensor | MXWeights = torch.empty(E, N, K, dtype=dtype, device="meta").mT
        if step != "dense":
            shapes = MXFP4.packed_shape(E, N, K), MXFP4.scales_shape(E, N, K)
            codes, scales = (torch.empty(shape, dtype=torch.uint8, device="meta") for shape in shapes)
            if step.startswith("fragments"):
                weights = MXWeights(codes, scales, K, N, MXLayout.FRAGMENTS, scales_to_128=step == "fragments")
            else:
                weights = MXWeights(codes, scales, K, N)
                dequantize_experts(weights, torch.empty(E, dtype=torch.int64, device="meta"), dtype)
        ids = torch.empty(M * k, dtype=torch.int64, device="meta")
        ordered, gated = step in ("unfused", "fragments ordered"), step in ("fused", "fragments")
        x, A, B, bias, gates = (
            torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            for shape in ((M * k if ordered else M, K), (E * rank, K), (N, E * rank), (E, N), (M, k))
        )
        y = parallel_linear_lora(
            x, weights, 1 if ordered else k, ids, ids, ids[:E], A, B, 0.5, bias, gates if gated else None,
            grouped_in=ordered, use_fused_dX=gated, use_fused_gather=not ordered, config=config,
        )  # fmt: skip
        torch.autograd.backward(y, torch.empty_like(y))
    return recorder.launches


def compile_unit(unit: Unit) -> Compiled:
    """Compile one unit for its architecture and read the compiler's own resource account."""
    compiled, by_hand = unit.build(), unit.function.is_gluon()
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    found = list[str]()
    # Without them there is no hazard to look for, and the disassembler takes longer than most compilations.
    if by_hand or "wgmma" in ptx or "mbarrier" in ptx:
        found += hazards(disassemble(cubin), waits_by_hand=by_hand)
    if ".ftz" in ptx:
        found.append("flushes subnormals to zero")
    return Compiled(unit, resources(cubin), compiled.metadata.shared, tuple(found))


def main() -> int:
    """Compile everything, print the table, and return the exit status."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="one architecture; may be repeated")
    parser.add_argument(
        "--loops", metavar="TEXT", help="instructions of inner loops on sm_90, kernels whose name holds it"
    )
    arguments = parser.parse_args()
    chosen = arguments.arch or ARCHITECTURES
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set; unset it, interpreted kernels cannot be compiled")
    if arguments.loops:
        _print_loops(arguments.loops)
        return 0
    work = [unit for architecture in chosen for unit in units(architecture)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_unit, work))
    columns = ("arch", "kernel", "for", "tile", "warps", "stages", "registers", "stack", "shared", "verdict")
    table = Table(*columns, title=f"triton {triton.__version__}: {len(results)} compilations")
    for result in results:
        unit = result.unit
        tile = " ".join(f"{n[6:]}{v}" for n, v in unit.arguments if n.startswith("BLOCK_"))
        options = dict(unit.options)
        cells = (unit.architecture, unit.kernel, unit.label, tile, options["num_warps"], options["num_stages"])
        account = (result.resources.registers, result.resources.stack, result.shared)
        verdict = "; ".join(result.violations)
        table.add_row(*map(str, cells + account), verdict or "ok", style="red" if verdict else None)
    console = Console(width=160)
    console.print(table)
    violations = sum(bool(result.violations) for result in results)
    console.print(f"{violations} violations")
    return 1 if violations else 0


def _print_loops(kernels: str) -> None:
    """A line for each loop with products, K 2048 and N 1024: the kernel's choices, and its instructions by kind."""
    print("| kernel | instruction |", " | ".join([*KINDS, "else", "all"]), "|")
    print("|---|---" + "|--:" * (len(KINDS) + 2) + "|")
    for unit in units("sm_90", _OTHER_SIZES[0]):
        if kernels in unit.kernel:
            chosen = " ".join(f"{name}={value}" for name, value in unit.arguments if name.isupper())
            for shape, counts in inner_loops(disassemble(unit.build().asm["cubin"])):
                cells = [counts[kind] for kind in (*KINDS, "else")]
                print(f"| {unit.label} {chosen} | {shape} |", " | ".join(map(str, [*cells, counts.total()])), "|")


if __name__ == "__main__":
    raise SystemExit(main())
