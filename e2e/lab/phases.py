"""Runs the lab's phases two at a time in the order of their needs, shows what each is doing, and keeps their times.

Imports the standard library, rich and the lab's own modules.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths
from e2e.lab.task import Task, stop_running

WORKERS = 2
HEARTBEAT_S = 15.0


@dataclass(frozen=True)
class Phase:
    """A step of `up`. `run` returns whether what it makes was there already."""

    name: str
    budget_s: float
    run: Callable[[Task], bool]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """How long a phase took, and whether it found its work done."""

    seconds: float
    budget_s: float
    cached: bool


def record_timing(path: Path, name: str, timing: Timing) -> None:
    """Add or replace one phase in the timings file: {phase: {seconds, budget_s, cached}}."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[name] = {"seconds": round(timing.seconds, 2), "budget_s": timing.budget_s, "cached": timing.cached}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(table, indent=2) + "\n")
    fresh.replace(path)


class _Progress:
    """One line when a phase starts or ends, and one each 15 s for those that run: readable on a terminal and in a CI log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._running: dict[str, tuple[Phase, Task, float]] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lab-progress")
        self._thread.start()

    def start(self, phase: Phase, task: Task) -> None:
        with self._lock:
            self._running[phase.name] = (phase, task, time.monotonic())
        self._line(f"{phase.name:<16} started, budget {phase.budget_s:.0f} s")

    def end(self, phase: Phase, timing: Timing | None) -> None:
        with self._lock:
            del self._running[phase.name]
        if timing is None:
            self._line(f"{phase.name:<16} [red]failed[/]")
            return
        late = " [yellow](over budget)[/]" if timing.seconds > phase.budget_s else ""
        word = "already there" if timing.cached else "done"
        self._line(f"{phase.name:<16} [green]{word}[/] in {timing.seconds:.1f} s{late}")

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _line(self, text: str) -> None:
        self._console.print(f"\\[{time.monotonic() - self._started:6.1f} s] {text}", highlight=False, soft_wrap=True)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            with self._lock:
                running = list(self._running.values())
            for phase, task, started in running:
                elapsed_s = time.monotonic() - started
                detail = f": {task.detail}" if task.detail else ""
                self._line(f"{phase.name:<16} {elapsed_s:.0f} of {phase.budget_s:.0f} s{detail}")


def run_phases(phases: Sequence[Phase], paths: LabPaths, console: Console, *, workers: int = WORKERS) -> None:
    """Run every phase once those it needs are done, at most `workers` at a time, in the order given where there is a choice.

    The first failure lets the phases that run come to their end, starts no more, and raises LabError.
    """
    _check_needs(phases)
    progress = _Progress(console)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="lab") as pool:
            try:
                _schedule(phases, paths, progress, pool, workers)
            except KeyboardInterrupt:
                stop_running()
                raise
    finally:
        progress.close()


def _check_needs(phases: Sequence[Phase]) -> None:
    known: set[str] = set()
    for phase in phases:
        missing = sorted(set(phase.needs) - known)
        if missing:
            raise ValueError(f"phase {phase.name} needs {missing}, which come after it or do not exist")
        known.add(phase.name)


def _schedule(
    phases: Sequence[Phase], paths: LabPaths, progress: _Progress, pool: ThreadPoolExecutor, workers: int
) -> None:
    waiting, done = list(phases), set()
    running: dict[Future[None], Phase] = {}
    failures: list[tuple[Phase, BaseException]] = []
    while running or (waiting and not failures):
        ready = [phase for phase in waiting if done.issuperset(phase.needs)]
        for phase in ready[: 0 if failures else workers - len(running)]:
            waiting.remove(phase)
            running[pool.submit(_run_phase, phase, paths, progress)] = phase
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            phase = running.pop(future)
            error = future.exception()
            if error is not None:
                failures.append((phase, error))
            done.add(phase.name)
    _raise_first(failures)


def _raise_first(failures: Sequence[tuple[Phase, BaseException]]) -> None:
    if not failures:
        return
    phase, error = failures[0]
    if not isinstance(error, LabError):
        raise error
    others = f" (also failed: {', '.join(each.name for each, _ in failures[1:])})" if len(failures) > 1 else ""
    raise LabError(f"phase {phase.name} failed{others}: {error.message}", cure=error.cure) from error


def _run_phase(phase: Phase, paths: LabPaths, progress: _Progress) -> None:
    task = Task(phase.name, paths.logs / f"{phase.name.replace(' ', '-')}.log")
    started = time.monotonic()
    timing: Timing | None = None
    progress.start(phase, task)
    try:
        cached = phase.run(task)
        timing = Timing(time.monotonic() - started, phase.budget_s, cached)
        with _timings_lock:
            record_timing(paths.timings, phase.name, timing)
    finally:
        progress.end(phase, timing)


_timings_lock = threading.Lock()


def summary(timings: Mapping[str, Mapping[str, float | bool]]) -> str:
    """The slowest phases in one line."""
    slowest = sorted(timings.items(), key=lambda item: -float(item[1]["seconds"]))[:5]
    return ", ".join(f"{name} {float(values['seconds']):.0f} s" for name, values in slowest)
