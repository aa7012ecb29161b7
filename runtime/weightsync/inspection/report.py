"""One inspection, as a document for programs and as text for people. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from weightsync.inspection.figures import Figures, Spread
from weightsync.inspection.tracing import Refusal

FORMAT = 1
"""Version of the document."""
SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was asked, and what was found: figures, or why there are none."""

    model: str
    """Path as asked."""
    architecture: str
    elements: int
    tensors: int
    learnt_from: str
    format: str
    trainer: str
    trainer_ranks: int
    engine: str
    engine_ranks: int
    fabric_gbps: float
    traced_with: Mapping[str, str]
    """vLLM's version, platform and model class."""
    figures: Figures | None = None
    refusal: Refusal | None = None
    no_plan: str = ""
    """Why there is no plan, though every rank was traced."""

    @property
    def ok(self) -> bool:
        return self.figures is not None

    def document(self) -> dict[str, Any]:
        """Plain values; see docs/inspect.md."""
        values = dataclasses.asdict(self)
        seconds = None if self.figures is None else self.figures.seconds(self.fabric_gbps)
        return {"format_version": FORMAT, "ok": self.ok, "expected_seconds": seconds, **values}

    def text(self) -> str:
        """A few lines."""
        size = f"{self.elements / 1e9:.2f} billion elements in {self.tensors} tensors"
        lines = [
            f"model      {self.architecture}, {size} ({self.learnt_from})",
            f"push       {self.trainer} ({self.trainer_ranks} ranks) -> {self.engine} ({self.engine_ranks} ranks), {self.format}",
        ]
        if self.figures is not None:
            return "\n".join([*lines, *_figures(self.figures, self.trainer_ranks, self.fabric_gbps, self.traced_with)])
        if self.refusal is not None:
            who = "vLLM refuses" if self.refusal.kind == "refused" else "vLLM's loader cannot be followed"
            return "\n".join([*lines, f"no plan    {who} (rank {self.refusal.rank}): {self.refusal.message}"])
        return "\n".join([*lines, f"no plan    {self.no_plan}"])


def _figures(figures: Figures, trainer_ranks: int, fabric_gbps: float, traced_with: Mapping[str, str]) -> list[str]:
    traced, ranks = len(figures.engine_ranks_traced), figures.engine_ranks
    some = "" if traced == ranks else f" (estimated from {traced} of {ranks} engine ranks)"
    received = _size(figures.engine_bytes_received)
    about = "about " * (len(figures.trainer_ranks_counted) < trainer_ranks)
    arena = _size(figures.trainer_arena_bytes)
    each = _bytes(figures.mean_write_bytes)
    lines = [
        f"coverage   proved: {figures.covered_elements} elements of {traced} of {ranks} engine ranks, each written once "
        f"({figures.padding_elements} of them padding)",
        f"trainer    a rank sends {_size(figures.trainer_bytes_sent)}{some} and needs {arena} of arena",
        f"engine     a rank receives {received} in {about}{_count(figures.writes_an_engine_rank)} writes",
        f"writes     {_count(figures.writes_a_peer)} from a trainer rank to an engine rank, {each} each on average",
    ]
    lines += [
        f"converts   {c.tensors} tensors from {c.stored} to {c.wanted}, {_bytes(c.bytes)}"
        for c in figures.conversions
        if c.stored != c.wanted
    ]
    same = [c for c in figures.conversions if c.stored == c.wanted]
    lines += [f"passes     {c.tensors} tensors as {c.wanted}, {_bytes(c.bytes)}" for c in same]
    lines.append(f"expected   {figures.seconds(fabric_gbps):.3f} s on the wire at {fabric_gbps:g} Gbit/s a rank")
    if figures.fallbacks:
        lines.append(
            f"falls back {len(figures.fallbacks)} parameters, {_bytes(figures.replayed_bytes)} a rank with their modules:"
        )
        lines += [f"           {f.parameter}: {f.reason}" for f in figures.fallbacks[:SHOWN]]
        lines += [f"           and {len(figures.fallbacks) - SHOWN} more"] * (len(figures.fallbacks) > SHOWN)
    else:
        lines.append("falls back nothing")
    lines.append(
        f"traced     vLLM {traced_with.get('vllm')}, {traced_with.get('model')} on {traced_with.get('platform')}: "
        "another platform may choose another class; a live engine's own trace decides"
    )
    return lines


def _size(spread: Spread) -> str:
    least, most = _bytes(spread.least), _bytes(spread.most)
    return most if least == most else f"{least} to {most}"


def _count(spread: Spread) -> str:
    return str(spread.most) if spread.least == spread.most else f"{spread.least} to {spread.most}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
