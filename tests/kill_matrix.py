"""`python -m tests.kill_matrix`: whoever dies or freezes, whenever: nothing torn is served, no wait is late, the next push works.

Hits each actor at each phase of a push, by kill -9 and by SIGSTOP with a later SIGCONT, on real processes
(tests/fixtures/killable.py), prints the matrix and writes it as JSON. A phase is hit exactly: a gate in a test's own process
holds it there meanwhile. tests/dataplane/test_kill_matrix.py runs some of the cells.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.fixtures.killable import REPLICAS, Body, Fleet
from tests.fixtures.killable_gate import Gate

ACTORS = ("trainer-0", "trainer-1", "receiver", "tp-rank", "modelexpress", "redis")
PHASES = ("before", "plan", "convert", "wire", "verify", "apply", "after")
SIGNALS = ("kill", "stop")
PAUSE_MODES = ("wait", "abort")
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"

TIMEOUT_S = 6.0
"""Of a push, from its first message to its decision."""
LATE_S = 2.0
"""No wait outlives the deadline by more."""
RESTART_S = 1.5
"""What has ended is started again so much later, as a cluster would."""
THAW_S = TIMEOUT_S + LATE_S + 0.5
"""What was stopped goes on when everybody else must have given the push up."""
PUSH_S = 75.0
"""A push with all its attempts; each of them is held to the deadline by itself."""
HEALTHY_S = 40.0
VICTIM = "engine-0"
VICTIM_RANK = 1
SAMPLE_S = 0.3
"""What the client's looks at a state may miss of its duration."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Who is hit, when, and how; by `hold` the gate stays shut past the deadline, as if the phase itself took so long."""

    actor: str
    phase: str
    signal: str

    def __str__(self) -> str:
        return f"{self.actor}/{self.phase}/{self.signal}"

    @property
    def gate(self) -> tuple[str, str] | None:
        """Process and point that hold the phase; None when it lies outside a push."""
        if self.phase in ("plan", "convert", "wire"):
            return ("trainer-1" if self.actor == "trainer-1" else "trainer-0", self.phase)
        if self.phase in ("measure", "verify", "apply"):
            return (f"{VICTIM}.{VICTIM_RANK}", self.phase)
        return None


@dataclasses.dataclass
class Outcome:
    """What came of a cell."""

    actor: str
    phase: str
    signal: str
    pause_mode: str
    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What happened besides, within the rules: a trainer that ended itself, a push that was given up."""
    push: str = ""
    """How the push that was hit ended on the living ranks."""
    seconds: float = 0.0
    answers: int = 0
    longest_wait_s: float = 0.0
    """Of a trainer rank, within one attempt."""


class Run:
    """One cell on a healthy fleet, which it leaves healthy."""

    def __init__(self, fleet: Fleet, cell: Cell) -> None:
        self._fleet, self._cell = fleet, cell
        self._hit_at = 0.0
        self._restored = False
        self._held: Gate | None = None
        self._attempts = 0
        self.outcome = Outcome(cell.actor, cell.phase, cell.signal, fleet.contract.transfer.pause_mode)

    def run(self) -> Outcome:
        """1. a healthy fleet; 2. the hit in its phase; 3. what the living make of it; 4. the next push; 5. the client's log."""
        began = time.monotonic()
        self._log_offset = self._fleet.answers.stat().st_size if self._fleet.answers.exists() else 0
        try:
            self._wait_serving("before the cell")
            if self._cell.phase == "after":
                self._push()
            self._push_and_hit()
            self._wait_restored()
            self._wait_gang()
            self._push()
            self._wait_serving("after the next push")
        except Fault as fault:
            self.outcome.faults.append(str(fault))
        self._judge_answers()
        self.outcome.seconds = round(time.monotonic() - began, 1)
        return self.outcome

    def _push_and_hit(self) -> None:
        fleet, cell = self._fleet, self._cell
        if cell.gate is None:
            self._hit()
            self._ask_ranks()
        else:
            gate = Gate(fleet.folder / "gates", *cell.gate)
            try:
                self._ask_ranks()
                if not gate.wait_reached(TIMEOUT_S):
                    raise Fault(f"no push came to {cell.gate}: the cell tests nothing")
                self._hit()
            except BaseException:
                gate.open()
                raise
            if cell.signal == "hold":
                self._held = gate
            else:
                gate.open()
        heard = self._hear_ranks(until_first_failure=cell.signal == "kill" and cell.actor.startswith("trainer"))
        words = {"committed" if "report" in answer else answer["error"] for answer in heard}
        self.outcome.push = f"{', '.join(sorted(words)) or 'given up'}, {self._attempts} attempts"

    def _hit(self) -> None:
        self._hit_at = time.monotonic()
        if self._cell.signal == "kill":
            self._target_kill()
        elif self._cell.signal == "stop":
            self._target_signal(signal.SIGSTOP)

    def _target_kill(self) -> None:
        fleet, actor = self._fleet, self._cell.actor
        if actor == "tp-rank":
            os.kill(fleet.worker_pid(VICTIM, VICTIM_RANK), signal.SIGKILL)
        else:
            self._body().kill()

    def _target_signal(self, number: signal.Signals) -> None:
        if self._cell.actor == "tp-rank":
            os.kill(self._fleet.worker_pid(VICTIM, VICTIM_RANK), number)
        elif number is signal.SIGSTOP:
            self._body().freeze()
        else:
            self._body().thaw()

    def _body(self) -> Any:
        fleet = self._fleet
        bodies = {"receiver": fleet.engines[VICTIM], "redis": fleet.redis, "modelexpress": fleet.modelexpress}
        return bodies.get(self._cell.actor) or fleet.ranks[int(self._cell.actor[-1])]

    def _ask_ranks(self) -> None:
        self._fleet.step += 1
        for rank in self._fleet.ranks:
            with contextlib.suppress(BrokenPipeError):
                rank.pipe.send(self._fleet.step)

    def _hear_ranks(self, *, until_first_failure: bool = False) -> list[dict[str, Any]]:
        """What the living ranks say of the push that they were asked for; the supervisor's work goes on meanwhile."""
        waiting = {rank.name: rank for rank in self._fleet.ranks if rank.alive}
        ends = time.monotonic() + PUSH_S
        heard = []
        while waiting:
            if time.monotonic() > ends:
                raise Fault(f"push() has not returned on {sorted(waiting)} after {PUSH_S:.0f} s")
            self._supervise()
            for name, rank in list(waiting.items()):
                answer = _hear(rank)
                if answer is None and not rank.alive:
                    self._note_end(rank)
                    del waiting[name]
                elif answer is not None and "waited_s" in answer:
                    self._note_wait(name, answer["waited_s"])
                elif answer is not None and "attempt_s" in answer:
                    self._attempts += 1
                    self._note_wait(name, answer["attempt_s"])
                    if until_first_failure:
                        del waiting[name]  # the other rank is dead: the cluster ends this one, too
                elif answer is not None:
                    heard.append(answer)
                    del waiting[name]
            time.sleep(0.01)
        return heard

    def _note_wait(self, name: str, seconds: float) -> None:
        if self._cell.signal == "stop" and self._cell.actor == name:
            return
        self.outcome.longest_wait_s = max(self.outcome.longest_wait_s, round(seconds, 2))
        if seconds > TIMEOUT_S + LATE_S:
            self.outcome.faults.append(f"{name} waited {seconds:.1f} s in a push of {TIMEOUT_S:.0f} s")

    def _note_end(self, rank: Body) -> None:
        killed = self._cell.signal == "kill" and self._cell.actor == rank.name
        if not killed:
            self.outcome.notes.append(f"{rank.name} ended itself ({rank.process.exitcode})")

    def _supervise(self) -> None:
        """Start again what has ended, as a cluster does; let go on what was stopped."""
        now = time.monotonic()
        if self._hit_at and now > self._hit_at + THAW_S:
            self._restore()
        if self._hit_at and self._cell.signal == "kill" and now > self._hit_at + RESTART_S:
            self._restore()
        for name, engine in list(self._fleet.engines.items()):
            if engine.alive:
                continue
            engine.ended_at = engine.ended_at or now
            if now > engine.ended_at + RESTART_S:
                engine.kill()
                self._fleet.start_engine(name)
        server = self._fleet.modelexpress
        if self._restored and server.process is not None and server.process.poll() is not None:
            with contextlib.suppress(RuntimeError):  # it ends when its Redis is not there yet
                server.start()

    def _wait_restored(self) -> None:
        """Until what was hit runs again: a push may have ended long before."""
        while not self._restored:
            self._supervise()
            time.sleep(0.01)

    def _restore(self) -> None:
        """Undo the hit, once."""
        if self._restored:
            return
        self._restored = True
        if self._held is not None:
            self._held.open()
        if self._cell.signal == "stop":
            with contextlib.suppress(ProcessLookupError, RuntimeError):
                self._target_signal(signal.SIGCONT)
        elif self._cell.actor == "redis":
            self._fleet.redis.restart(with_data=True)
        if self._cell.actor == "redis":
            # As its liveness probe does in a cluster, sooner: without its Redis it may hang for 120 s (docs/decisions/0004).
            self._fleet.modelexpress.restart()
        elif self._cell.actor == "modelexpress" and self._cell.signal == "kill":
            self._fleet.modelexpress.restart()

    def _wait_gang(self) -> None:
        """A gang of which a rank has ended is ended and begun anew."""
        if not all(rank.alive for rank in self._fleet.ranks):
            for rank in self._fleet.ranks:
                rank.kill()
            self._fleet.start_gang()

    def _push(self) -> None:
        """A push that must work."""
        self._ask_ranks()
        answers = self._hear_ranks()
        failed = [answer for answer in answers if "report" not in answer]
        if len(answers) != len(self._fleet.ranks) or failed:
            raise Fault(f"the next push failed: {failed or 'a rank ended'}")

    def _wait_serving(self, when: str) -> None:
        """Until every replica serves the last step."""
        ends = time.monotonic() + HEALTHY_S
        while True:
            self._supervise()
            states = {name: self._fleet.state(name) for name in REPLICAS}
            if all(state.get("serving") and state["version"] == state["committed"] for state in states.values()):
                return
            if time.monotonic() > ends:
                raise Fault(f"not all serve {when}, within {HEALTHY_S:.0f} s: {states}")
            time.sleep(0.05)

    def _judge_answers(self) -> None:
        entries = self._fleet.log_since(self._log_offset)
        answers = [entry for entry in entries if "tokens" in entry]
        self.outcome.answers = sum(answer["status"] == 200 for answer in answers)
        self.outcome.faults += judge_answers(answers, self._fleet.committed_steps())
        self.outcome.faults += judge_waits(
            [entry for entry in answers if entry["replica"] != VICTIM or not self._victim_is_stopped()],
            [entry for entry in entries if "state" in entry and not self._victim_is_stopped()],
        )

    def _victim_is_stopped(self) -> bool:
        return self._cell.signal in ("stop", "hold") and self._cell.actor in ("receiver", "tp-rank")


class Fault(Exception):
    """A cell cannot go on."""


def _hear(rank: Body) -> dict[str, Any] | None:
    try:
        return rank.pipe.recv() if rank.pipe.poll() else None
    except (EOFError, ConnectionError):
        return None


def judge_answers(answers: Iterable[dict[str, Any]], committed: set[int]) -> list[str]:
    """What is wrong with what a client got: answers of two versions or of none that was committed, or an older one again."""
    faults, newest = [], dict.fromkeys(REPLICAS, 0.0)
    for answer in answers:
        steps = {step for token in answer["tokens"] for step in token}
        if len(steps) > 1:
            faults.append(f"{answer['replica']} served a mixed answer: {answer['tokens']}")
        elif steps and not steps <= committed:
            faults.append(f"{answer['replica']} served step {steps}, which was not committed")
        elif steps and min(steps) < newest[answer["replica"]]:
            faults.append(f"{answer['replica']} served step {steps} after step {newest[answer['replica']]}")
        newest[answer["replica"]] = max([newest[answer["replica"]], *steps])
    return _first(faults)


def judge_waits(answers: Iterable[dict[str, Any]], states: Iterable[dict[str, Any]]) -> list[str]:
    """Requests that hung, and replicas that were open, for longer than a push may take."""
    faults = [
        f"{answer['replica']} let a request wait {answer['until'] - answer['at']:.1f} s"
        for answer in answers
        if answer["until"] - answer["at"] > TIMEOUT_S + LATE_S + SAMPLE_S
    ]
    opened: dict[str, float] = {}
    for look in states:
        if look["state"] in ("OPEN", "VERIFIED"):
            since = opened.setdefault(look["replica"], look["at"])
            if look["at"] - since > TIMEOUT_S + LATE_S + SAMPLE_S:
                faults.append(f"{look['replica']} was {look['state']} for {look['at'] - since:.1f} s")
        else:
            opened.pop(look["replica"], None)
    return _first(faults)


def _first(faults: Sequence[str]) -> list[str]:
    """One example tells it; how many there were says how bad it is."""
    return [f"{faults[0]} ({len(faults)} in all)" if len(faults) > 1 else faults[0]] if faults else []


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
