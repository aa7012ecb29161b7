"""Who did what in a push, when and for how long: spans that ranks and replicas report, and the trace file made of them.

Spans are noted by each process's monotonic clock and told by the ledger's, so that one picture holds all processes. The trace is
in Chrome's trace event format, which chrome://tracing and Perfetto open. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

TRACES_KEPT = 32
"""Trace files in a folder; older ones are removed."""
_TRACE_NAME = re.compile(r"push-\d+\.\d+\.\d+\.json")


class Span(NamedTuple):
    """One phase of a push in one process."""

    phase: str
    """plan, pause, open, convert, wire, verify, apply or resume."""
    at: float
    """Beginning; seconds since the Unix epoch by the ledger's clock once it is told, of time.monotonic() before."""
    seconds: float
    peer: str = ""
    """Whom it concerns, where it is one of several: the agent that bytes went to."""
    bytes: int = 0
    """Payload that moved in it."""


class Stopwatch:
    """Notes the phases of one push in this process; one thread."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note what happens within, also when it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.note(name, began)

    def note(self, name: str, began: float) -> None:
        """Note a phase that began then and ends now."""
        self.spans.append(Span(name, began, time.monotonic() - began))

    @property
    def seconds(self) -> dict[str, float]:
        return seconds_of(self.spans)

    def told(self, to_ledger_clock: Callable[[float], float]) -> tuple[Span, ...]:
        """The spans as others can read them."""
        return tuple(span._replace(at=to_ledger_clock(span.at)) for span in self.spans)


def trace_events(push_id: str, facts: Mapping[str, Any], spans: Mapping[str, Iterable[Span]]) -> dict[str, Any]:
    """One push as a trace document. `spans` are by the name of the process that told them; `facts` become its metadata."""
    events: list[dict[str, Any]] = []
    for number, (process, told) in enumerate(sorted(spans.items()), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": process}})
        lanes = {"": 0}
        for span in sorted(told, key=lambda span: (span.at, -span.seconds)):
            lane = lanes.setdefault(span.peer, len(lanes))
            events.append(
                {
                    "ph": "X",
                    "name": span.phase,
                    "cat": "push",
                    "pid": number,
                    "tid": lane,
                    "ts": span.at * 1e6,
                    "dur": span.seconds * 1e6,
                    "args": {"peer": span.peer, "bytes": span.bytes} if span.peer else {},
                }
            )
        for peer, lane in lanes.items():
            name = f"to {peer}" if peer else "phases"
            events.append({"ph": "M", "name": "thread_name", "pid": number, "tid": lane, "args": {"name": name}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"push": push_id, **facts}}


def write_trace(folder: Path, push_id: str, document: Mapping[str, Any]) -> Path:
    """Write the trace of a push beside the last TRACES_KEPT - 1; a reader never sees half of one. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"push-{push_id}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document))
    os.replace(partial, path)
    kept = sorted((file for file in folder.iterdir() if _TRACE_NAME.fullmatch(file.name)), key=_age)
    for old in kept[:-TRACES_KEPT]:
        old.unlink(missing_ok=True)
    return path


def _age(file: Path) -> tuple[int, ...]:
    """Epoch, version, attempt: file times are too coarse."""
    return tuple(map(int, re.findall(r"\d+", file.name)))


def longest_phase(spans_of: Iterable[Iterable[Span]], phase: str) -> float:
    """Seconds of the one whose spans of this phase are the longest together; 0 of nobody."""
    return max((seconds_of(spans).get(phase, 0.0) for spans in spans_of), default=0.0)


def seconds_of(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds by phase; those of one name add up, peers left out: they are parts."""
    totals: dict[str, float] = {}
    for span in spans:
        if not span.peer:
            totals[span.phase] = totals.get(span.phase, 0.0) + span.seconds
    return totals


def spans_of(told: Iterable[Iterable[Any]]) -> tuple[Span, ...]:
    """Spans out of a record's JSON."""
    return tuple(Span(*span) for span in told)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transports:
    """What moved the bytes, and how that is known."""

    names: tuple[str, ...]
    """UCX transports, as `tcp`, `cma`, `rc_mlx5`; empty when nothing is known."""
    proof: str
    """`ucx`: UCX's own choice of protocol for remote writes; `exclusion`: UCX_TLS leaves one; empty: not proved."""


def agree_on_transports(told: Iterable[Transports]) -> Transports:
    """What several ranks moved bytes with, all together; as well proved as the least of them."""
    known = list(told)
    proofs = {one.proof for one in known}
    if not known or "" in proofs:
        return Transports(names=(), proof="")
    names = tuple(sorted({name for one in known for name in one.names}))
    return Transports(names=names, proof="ucx" if proofs == {"ucx"} else "exclusion")
