"""What planning costs one trainer rank, in time and memory, for models of hundreds of billions of parameters.

    python -m bench.plan [--out DIR] [--case NAME] [--turns N]     writes DIR/plan.json and prints a table

Each case runs in a process of its own on one core, given what a writer is given: every rank's and every engine rank's layout as
encoded records. It does what `SlotArena.lay_out` and `Writer` do: decodes them, cuts matrices into the slices that engines want,
lays out the arenas of all ranks, makes one plan for each engine layout, and works out its own writes. Seconds are those that the
process had on its core; cases take turns, and the median is told. Before a figure is shown, the writes of all ranks into one
engine rank are checked to reach each of its elements once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.about import RESULTS, about, peak_bytes, save
from bench.layouts import ONE_TRILLION, QWEN3_235B, Model, engine, fsdp, sources
from weightsync import collector
from weightsync.layout.arenas import Carrier
from weightsync.layout.forms import wanted_of
from weightsync.layout.held import Held
from weightsync.layout.packing import pack
from weightsync.layout.records import SourceLayout, TargetLayout
from weightsync.plan import make_plan

TP = 8
LIMIT_S, LIMIT_BYTES = 5.0, 1 << 30
"""What a writer of the first case may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A trainer, and a fleet of engine ranks."""

    model: Model
    ranks: int
    replicas: int = 1
    """HSDP: ranks that hold each shard."""
    engines: int
    ep: int
    """Ranks of one engine; `engines` / `ep` of them have each layout."""
    fused: bool = True


CASES = {
    "Qwen3-235B, fused experts, FSDP 64 x EP 32": Case(model=QWEN3_235B, ranks=64, engines=32, ep=32),
    "Qwen3-235B, fused experts, HSDP 2 x 32 x EP 32": Case(model=QWEN3_235B, ranks=64, replicas=2, engines=32, ep=32),
    "Qwen3-235B, a tensor an expert, FSDP 64 x EP 32": Case(model=QWEN3_235B, ranks=64, engines=32, ep=32, fused=False),
    "1T, fused experts, FSDP 256 x 4 engines of EP 32": Case(model=ONE_TRILLION, ranks=256, engines=128, ep=32),
    "1T, fused experts, FSDP 256 x EP 128": Case(model=ONE_TRILLION, ranks=256, engines=128, ep=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", choices=list(CASES), action="append", help="run only this one; may be repeated")
    parser.add_argument("--writer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if options.writer is not None:
        print(json.dumps(write(options.writer)))
        return
    report: dict[str, Any] = {"about": about(), "limit_seconds": LIMIT_S, "limit_bytes": LIMIT_BYTES}
    names = options.case or list(CASES)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.turns):
        for name in names:
            print(f"turn {turn + 1} of {options.turns}: {name} ...", file=sys.stderr, flush=True)
            taken[name].append(measure(CASES[name]))
    report["cases"] = [{"case": name, **median(taken[name])} for name in names]
    save("plan", report, options.out)
    show(report["cases"])


def median(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a case's turns, the one in the middle by what planning took."""
    ordered = sorted(turns, key=lambda turn: turn["plan_seconds"])
    return {**ordered[len(ordered) // 2], "plan_seconds_of_turns": [turn["plan_seconds"] for turn in turns]}


def measure(case: Case) -> dict[str, Any]:
    """Encode a case's layouts, check a plan of it, and let a writer of its own process take its time."""
    tensors = sources(case.model, fused=case.fused)
    held = fsdp(tensors, ranks=case.ranks, replicas=case.replicas)
    wanted = [engine(case.model, tensors, tp=TP, ep=case.ep, rank=r, fused=case.fused) for r in range(case.ep)]
    checked = check(held, wanted[case.ep // 2 + 1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layouts"
        path.write_bytes(
            pickle.dumps(([each.to_bytes() for each in held], [each.to_bytes() for each in wanted], case.engines))
        )
        del held, wanted
        command = [sys.executable, "-m", "bench.plan", "--writer", str(path)]
        taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"parameters": case.model.numel, **checked, **json.loads(taken)}


def check(held: list[SourceLayout], wanted: TargetLayout) -> dict[str, Any]:
    """Writes of all ranks into one engine rank reach every element of it once. Raises AssertionError where they do not."""
    packed = pack({wanted.digest(): wanted}, held)
    carrier = Carrier(wanted_of(packed.layouts), packed.columns, packed.rows)
    plan = make_plan([carrier.outline(layout).layout for layout in held], packed.layouts[wanted.digest()])
    writes = np.concatenate([plan.writes(layout.rank) for layout in held])
    ends = np.cumsum([0, *(target.numel for target in plan.targets)])
    start = ends[writes["target_index"]] + writes["target_offset"]
    order = np.argsort(start)
    start, stop = start[order], (start + writes["length"])[order]
    assert start[0] == 0 and stop[-1] == ends[-1] and (start[1:] == stop[:-1]).all(), "the plan has gaps or overlaps"
    return {"checked_elements": int(ends[-1])}


@collector.paused()
def write(path: Path) -> dict[str, Any]:
    """The writer: rank 0 of the trainer."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    encoded_sources, encoded_targets, engines = pickle.loads(path.read_bytes())
    seconds: dict[str, float] = {}
    with phase(seconds, "decode"):
        held = [SourceLayout.from_bytes(data) for data in encoded_sources]
        wanted = {(layout := TargetLayout.from_bytes(data)).digest(): layout for data in encoded_targets}
    before = peak_bytes()
    with phase(seconds, "slices"):
        packed = pack(wanted, held)
    with phase(seconds, "arenas"):
        carrier = Carrier(wanted_of(packed.layouts), packed.columns, packed.rows)
        mine = carrier.carry(held[0])
        arenas = [mine.layout, *(carrier.outline(other).layout for other in held[1:])]
    with phase(seconds, "cut"):
        once = Held(arenas)
    with phase(seconds, "plan"):
        plans = [make_plan(once, layout) for layout in packed.layouts.values()]
    with phase(seconds, "expand"):
        writes = [plan.writes(0) for plan in plans]
    copies = engines // len(wanted)
    return {
        "seconds": seconds,
        "plan_seconds": sum(seconds.values()) - seconds["decode"],
        "peak_bytes": peak_bytes(),
        "peak_bytes_decoded": before,
        "layouts": len(wanted),
        "records": sum(len(layout.holdings) for layout in held) + sum(len(layout.copies) for layout in wanted.values()),
        "slots_of_all_ranks": sum(len(layout.holdings) for layout in arenas),
        "writes": sum(len(each) for each in writes) * copies,
    }


@contextmanager
def phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[name] = time.process_time() - started


def show(cases: list[dict[str, Any]]) -> None:
    """One line a case, and how cost and writes grow from the first."""
    head = ("decode s", "arenas s", "plan s", "all s", "peak MB", "writes", "us/write", "cost x", "writes x")
    print(f"{'case':<52}" + "".join(f"{name:>10}" for name in head))
    first = cases[0]
    for case in cases:
        seconds = case["seconds"]
        values = (
            f"{seconds['decode']:.2f}",
            f"{seconds['slices'] + seconds['arenas']:.2f}",
            f"{seconds['cut'] + seconds['plan'] + seconds['expand']:.2f}",
            f"{case['plan_seconds']:.2f}",
            f"{case['peak_bytes'] / 1e6:.0f}",
            f"{case['writes']}",
            f"{case['plan_seconds'] / case['writes'] * 1e6:.1f}",
            f"{case['plan_seconds'] / first['plan_seconds']:.2f}",
            f"{case['writes'] / first['writes']:.2f}",
        )
        print(f"{case['case']:<52}" + "".join(f"{value:>10}" for value in values))


if __name__ == "__main__":
    main()
