"""`python -m tests.kill_matrix`: whoever dies or freezes, whenever: nothing torn is served, no wait is late, the next push works.

Hits each actor at each phase of a push, by kill -9 and by SIGSTOP with a later SIGCONT, on real processes
(tests/fixtures/kill_cell.py, killable.py), prints the matrix and writes it as JSON. tests/dataplane/test_kill_matrix.py runs some
of the cells.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.fixtures.kill_cell import TIMEOUT_S, Cell, Outcome, Run
from tests.fixtures.killable import Fleet

ACTORS = ("trainer-0", "trainer-1", "receiver", "tp-rank", "modelexpress", "redis")
PHASES = ("before", "plan", "convert", "wire", "verify", "apply", "after")
SIGNALS = ("kill", "stop")
PAUSE_MODES = ("wait", "abort")
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def run_cells(cells: Iterable[Cell], folder: Path, pause_mode: str, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Run cells on one fleet; a cell that leaves it unhealthy costs a new one."""
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        fleet: Fleet | None = None
        for cell in cells:
            if fleet is None:
                fleet = stack.enter_context(make_fleet(folder / f"fleet-{len(outcomes)}", pause_mode))
            outcomes.append(Run(fleet, cell).run())
            tell(outcomes[-1])
            if outcomes[-1].faults or fleet.step > 200:
                stack.close()
                fleet = None
    return outcomes


def make_fleet(folder: Path, pause_mode: str) -> Fleet:
    (folder / "gates").mkdir(parents=True)
    return Fleet(folder, timeout_seconds=TIMEOUT_S, pause_mode=pause_mode)


def render(outcomes: Sequence[Outcome]) -> str:
    """The matrix as text: a row an actor and signal, a column a phase, then what went wrong."""
    found = {(o.actor, o.signal, o.phase): o for o in outcomes}
    width = 14
    lines = [" " * 20 + "".join(phase.ljust(width) for phase in PHASES)]
    for actor in ACTORS:
        for signal_ in SIGNALS:
            row = [found.get((actor, signal_, phase)) for phase in PHASES]
            if any(row):
                lines.append(f"{actor} {signal_}".ljust(20) + "".join(_cell_text(o).ljust(width) for o in row))
    for outcome in outcomes:
        for kind, words in (("FAIL", outcome.faults), ("note", outcome.notes)):
            lines += [f"{kind} {outcome.actor}/{outcome.phase}/{outcome.signal}: {word}" for word in words]
    return "\n".join(lines)


def _cell_text(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    return f"{'FAIL' if outcome.faults else 'ok'} {outcome.seconds:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_matrix", description=__doc__)
    parser.add_argument("--actor", action="append", choices=ACTORS, help="only these rows; all when left out")
    parser.add_argument("--phase", action="append", choices=PHASES, help="only these columns")
    parser.add_argument("--signal", action="append", choices=SIGNALS, help="only this way to be hit")
    parser.add_argument("--pause-mode", choices=PAUSE_MODES, default="wait", help="of transfer.pauseMode")
    parser.add_argument("--folder", type=Path, help="keep logs here; a temporary folder when left out")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the results; bench/results/ when left out and all is run"
    )
    options = parser.parse_args()
    cells = [
        Cell(actor, phase, signal_)
        for actor in options.actor or ACTORS
        for signal_ in options.signal or SIGNALS
        for phase in options.phase or PHASES
    ]
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = run_cells(cells, options.folder or Path(temporary), options.pause_mode, _tell)
    print(render(outcomes))
    out = options.out
    if out is None and len(cells) == len(ACTORS) * len(PHASES) * len(SIGNALS):
        out = RESULTS / f"kill-matrix-{options.pause_mode}.json"
    if out is not None:
        write_results(outcomes, out)
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def _tell(outcome: Outcome) -> None:
    words = "; ".join(outcome.faults + outcome.notes)
    cell = f"{outcome.actor}/{outcome.phase}/{outcome.signal}"
    told = f"{_cell_text(outcome):12} {outcome.answers:4} answers  push {outcome.push}"
    print(f"{cell:28} {told}  {words}", flush=True)


def write_results(outcomes: Sequence[Outcome], path: Path) -> None:
    """One JSON document: where and when it ran, and every cell."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    document = {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "timeout_s": TIMEOUT_S,
        "cells": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
