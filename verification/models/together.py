"""A whole model trained by several ranks, by FSDP2 or with its experts in parallel, or by one, to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import init_device_mesh

from mxref.kernels.models.sizes import Batch, Model
from mxref.kernels.parallel.sharding import shard_model
from mxref.verification.candidates.processes import Limits
from mxref.verification.distributed.questions import Place
from mxref.verification.distributed.ranks import Raised
from mxref.verification.distributed.world import Lost, World
from mxref.verification.models.build import adapted, decoder_layers, empty_model, filled
from mxref.verification.models.profile import KINDS, Kind, Shares, profiled
from mxref.verification.models.training import Steps, is_out_of_memory, time_steps
from mxref.verification.report.own.markdown import markdown_table

__all__ = ["WAYS", "Row", "Together", "table", "trained"]

Way = Literal["one rank", "fsdp", "experts"]
WAYS = {"fsdp": "fsdp", "experts": "ep"}
"""How several ranks share a model, and the dimension of their mesh."""

_ALL_TO_ALL = Kind("all-to-all", r"(?i)sendrecv|all_?to_?all")
_OTHER_EXCHANGE = Kind("gathers and sums over ranks", r"(?i)nccl|gloo|c10d|all_?gather|all_?reduce|reduce_?scatter")
_PRODUCTS = ("our products", "others' products of the experts")
_GIB = 2**30


@dataclass(frozen=True)
class Row:
    """What was seen of one way. Times in seconds, memory in bytes; of the ranks, the most that any of them has.

    Attributes:
        side: "packed" or "dense" experts.
        way: see `WAYS`; or "one rank".
        ranks: how many.
        batch: of each rank, as text.
        layers: that were trained.
        status: "ok", "out of memory" or "failed: …"; only "ok" has numbers.
        first: the first step, compilation included.
        median, spread: of the further steps, see `Steps`.
        tokens_per_second: of all ranks together.
        model: what the model's parts with its adapters take on a rank.
        peak: the most that was allocated on a rank's device while it trained.
        all_to_all, gathers, products, total: device time of one step: rows that travel; everything else that ranks
            exchange; products of the experts; all of it. Exchanges include waiting for the other ranks, and may run
            beside products.
        loss: rank 0's last.
    """

    side: str
    way: str
    ranks: int
    batch: str
    layers: int
    status: str = "ok"
    first: float = 0.0
    median: float = 0.0
    spread: float = 0.0
    tokens_per_second: float = 0.0
    model: int = 0
    peak: int = 0
    all_to_all: float = 0.0
    gathers: float = 0.0
    products: float = 0.0
    total: float = 0.0
    loss: float = 0.0

    def __str__(self) -> str:
        seen = f"{self.median * 1e3:,.0f} ms a step" if self.status == "ok" else self.status
        return f"{self.side}, {self.way}, {self.batch}: {seen}"


@dataclass(frozen=True)
class Together:
    """What each rank of a world is to do: `distributed.world` asks it.

    Attributes:
        model: its sizes.
        side: how experts are held.
        way: how ranks share the model.
        layers: that are made.
        batch: of each rank.
        count: measured steps.
        rank: of the adapters.
    """

    model: Model
    side: Literal["packed", "dense"]
    way: Way
    layers: int
    batch: Batch
    count: int
    rank: int

    def __call__(self, place: Place) -> tuple[Steps, Shares]:
        """Make the model, the same on every rank, share it, and train it on tokens of this rank's own."""
        torch.manual_seed(0)
        model = self._made(place.device)
        torch.manual_seed(1 + place.rank)
        about = Steps(self.side, "eager", "", self.layers)
        steps = time_steps(model, self.batch, self.count, place.device, about)
        if not steps.ok:  # an answer for one process; here others wait for this one
            raise RuntimeError(steps.status)
        kinds = (_ALL_TO_ALL, _OTHER_EXCHANGE, *KINDS)
        return steps, profiled(model, self.side, "eager", self.batch, place.device, kinds)

    def _made(self, device: torch.device) -> Any:
        packed = self.side == "packed"
        model = filled(empty_model(self.model.config(self.layers)), device, packed)
        if not packed:
            model.set_experts_implementation("grouped_mm")
        model = adapted(model, self.model, self.rank, device, packed)
        if self.way == "one rank":
            return model
        ranks = torch.distributed.get_world_size()
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=(WAYS[self.way],))
        return shard_model(model, mesh, decoder_layers(model))


def trained(question: Together, ranks: int, device_type: str, seconds: float) -> Row:
    """Train in a world of its own; `seconds`: that its ranks may stay silent."""
    with World(ranks, device_type, Limits(processor=2 * seconds, silence=seconds)) as world:
        answers = world.ask([question] * ranks)
    row = Row(question.side, question.way, ranks, str(question.batch), question.layers)
    told = [each.what if isinstance(each, Raised) else each.how for each in answers if isinstance(each, Raised | Lost)]
    if told:
        full = any(is_out_of_memory(RuntimeError(what)) for what in told)
        return _with(row, status="out of memory" if full else f"failed: {told[0][:200]}")
    steps, shares = ([each[part] for each in answers] for part in (0, 1))

    def most(*kinds: str) -> float:
        return float(max(sum(each.seconds[kind] for kind in kinds) for each in shares))

    slowest = max(steps, key=lambda each: each.median)
    return _with(
        row,
        first=max(each.first for each in steps),
        median=slowest.median,
        spread=slowest.spread,
        tokens_per_second=ranks * question.batch.size / slowest.median,
        model=max(each.model for each in steps),
        peak=max(each.peak for each in steps),
        all_to_all=most(_ALL_TO_ALL.name),
        gathers=most(_OTHER_EXCHANGE.name),
        products=most(*_PRODUCTS),
        total=most("total"),
        loss=steps[0].loss,
    )


def _with(row: Row, **seen: Any) -> Row:
    return Row(**(vars(row) | seen))


def table(rows: Sequence[Any]) -> Iterator[str]:
    """Markdown, by lines, of `Row`s as plain data."""
    columns = ["experts", "way", "batch × tokens a rank", "ranks", "step, ms", "tokens/s", "÷ one rank"]
    columns += ["peak a rank, GiB", "model a rank, GiB", "all-to-all, ms", "gathers and sums, ms", "products, ms"]
    yield from markdown_table(
        [*columns, "all of the device's, ms", "first step, s"], map(_cells, rows, [rows] * len(rows)), left=3
    )


def _cells(row: Any, rows: Sequence[Any]) -> list[str]:
    named = [row["side"], row["way"], row["batch"], str(row["ranks"])]
    if row["status"] != "ok":
        return [*named, row["status"].partition(":")[0], *[""] * 9]
    alike = ("side", "batch", "layers", "status")
    alone = [r for r in rows if r["way"] == "one rank" and all(r[name] == row[name] for name in alike)]
    ratio = f"{row['tokens_per_second'] / alone[0]['tokens_per_second']:.2f}" if alone and row["ranks"] > 1 else ""
    return [
        *named,
        f"{row['median'] * 1e3:,.0f} ± {row['spread']:.1%}",
        f"{row['tokens_per_second']:,.0f}",
        ratio,
        f"{row['peak'] / _GIB:.1f}",
        f"{row['model'] / _GIB:.1f}" if row["model"] else "",
        *(f"{row[name] * 1e3:,.1f}" for name in ("all_to_all", "gathers", "products", "total")),
        f"{row['first']:.1f}",
    ]
