"""Phases: order, two at a time, timings, and what a failure leaves."""

import io
import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths
from e2e.lab.phases import Phase, Timing, record_timing, run_phases
from e2e.lab.task import Task


@pytest.fixture
def paths(tmp_path: Path) -> LabPaths:
    return LabPaths(cache=tmp_path / "cache", lab=tmp_path / "lab")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_phase_starts_after_all_that_it_needs(paths: LabPaths) -> None:
    ended: list[str] = []

    def record(name: str):
        def run(task: Task) -> bool:
            ended.append(name)
            return False

        return run

    phases = [
        Phase("a", 1, record("a")),
        Phase("b", 1, record("b")),
        Phase("c", 1, record("c"), ("a", "b")),
        Phase("d", 1, record("d"), ("c",)),
    ]
    run_phases(phases, paths, quiet())
    assert sorted(ended[:2]) == ["a", "b"] and ended[2:] == ["c", "d"]


def test_two_phases_run_at_a_time(paths: LabPaths) -> None:
    both = threading.Barrier(2, timeout=10)
    phases = [Phase(name, 1, lambda task: both.wait() < 0) for name in ("a", "b")]
    run_phases(phases, paths, quiet())  # a third party would break the barrier, one alone would time out


def test_keeps_the_time_the_budget_and_whether_it_was_cached(paths: LabPaths) -> None:
    run_phases([Phase("fresh", 7, lambda task: False), Phase("kept", 8, lambda task: True)], paths, quiet())
    table = json.loads(paths.timings.read_text())
    assert {name: (each["budget_s"], each["cached"]) for name, each in table.items()} == {
        "fresh": (7, False),
        "kept": (8, True),
    }
    assert all(0 <= each["seconds"] < 5 for each in table.values())


def test_a_later_run_replaces_a_timing_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    record_timing(path, "kube", Timing(300.0, 420, cached=False))
    record_timing(path, "helm", Timing(100.0, 240, cached=False))
    record_timing(path, "kube", Timing(0.1, 420, cached=True))
    table = json.loads(path.read_text())
    assert table["kube"] == {"seconds": 0.1, "budget_s": 420, "cached": True}
    assert table["helm"]["seconds"] == 100.0


def test_a_failure_names_the_phase_and_the_cure_and_starts_nothing_more(paths: LabPaths) -> None:
    def fail(task: Task) -> bool:
        task.run(["sh", "-c", "echo disk full; exit 3"], cure="free some disk")
        return False

    phases = [Phase("first", 1, fail), Phase("second", 1, lambda task: pytest.fail("started"), ("first",))]
    with pytest.raises(LabError) as failed:
        run_phases(phases, paths, quiet())
    assert "phase first failed" in str(failed.value)
    assert "ended with 3" in str(failed.value) and "disk full" in str(failed.value)
    assert "next: free some disk" in str(failed.value)
    assert not paths.timings.exists()


def test_a_need_that_does_not_exist_is_refused_before_anything_runs(paths: LabPaths) -> None:
    with pytest.raises(ValueError, match="missing"):
        run_phases([Phase("a", 1, lambda task: pytest.fail("started"), ("missing",))], paths, quiet())


def test_a_command_that_is_not_there_is_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no-such-program is not on PATH; next: install it"):
        Task("t", tmp_path / "t.log").run(["no-such-program"], cure="install it")


def test_what_a_command_prints_is_returned_and_its_errors_are_logged(tmp_path: Path) -> None:
    task = Task("t", tmp_path / "t.log")
    assert task.capture(["sh", "-c", "echo out; echo err >&2"]) == "out\n"
    assert "err" in task.tail() and "\nout" not in task.log_path.read_text()
