"""Shows where the demo stands, and keeps how long each phase took. Imports rich and the lab's timings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from e2e.lab.phases import Timing

REPEAT_S = 15.0
"""A wait that says nothing new is told again so often."""


class Step:
    """The phase under way."""

    def __init__(self, console: Console, name: str, budget_s: float, demo_started: float) -> None:
        self._console = console
        self._name = name
        self._budget_s = budget_s
        self._demo_started = demo_started
        self._started = time.monotonic()
        self._said: tuple[str, float] = ("", 0.0)
        self.cached = False
        """Set by the phase when it found its work done."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Show `text` when it is new, or when nothing was shown for a while."""
        said, at = self._said
        if text != said or time.monotonic() - at >= REPEAT_S:
            self._said = (text, time.monotonic())
            self.line(f"{self.elapsed_s:.0f} of {self._budget_s:.0f} s: {text}")

    def line(self, text: str) -> None:
        """Show one line under the phase's name."""
        clock = f"[{time.monotonic() - self._demo_started:6.1f} s]"
        self._console.print(f"{clock} {self._name:<12} {text}", highlight=False, soft_wrap=True, markup=False)


class Timeline:
    """The demo's phases in their order."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.timings: dict[str, Timing] = {}
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @contextmanager
    def phase(self, name: str, *, budget_s: float) -> Iterator[Step]:
        """Show the phase's start, end and time beside its budget; what it raises passes through."""
        step = Step(self.console, name, budget_s, self._started)
        step.line(f"started, budget {budget_s:.0f} s")
        try:
            yield step
        except BaseException:
            step.line(f"failed after {step.elapsed_s:.1f} s")
            raise
        self.timings[name] = Timing(step.elapsed_s, budget_s, step.cached)
        late = " (over budget)" if step.elapsed_s > budget_s else ""
        step.line(f"{'already there' if step.cached else 'done'} in {step.elapsed_s:.1f} s{late}")
