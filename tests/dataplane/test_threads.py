"""Threads that are kept: a piece of work finds one that is there, waits for no other work, and costs the process no exit."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from weightsync.threads import KeptThreads

PATIENCE_S = 20.0


@pytest.fixture
def threads() -> Iterator[KeptThreads]:
    made = KeptThreads("kept")
    yield made
    made.close()


def names_thread(into: list[threading.Thread]) -> Callable[[], None]:
    return lambda: into.append(threading.current_thread())


def test_work_that_follows_work_runs_on_the_same_thread(threads: KeptThreads) -> None:
    """With a thread for each piece this list has five."""
    seen: list[threading.Thread] = []
    for _ in range(5):
        assert threads.run(names_thread(seen)).wait(PATIENCE_S)
    assert len(seen) == 5 and len(set(seen)) == 1


def test_work_that_hangs_holds_up_no_other_and_its_thread_comes_back(threads: KeptThreads) -> None:
    seen: list[threading.Thread] = []
    free = threading.Event()

    def hang() -> None:
        names_thread(seen)()
        free.wait(PATIENCE_S)

    hanging = threads.run(hang)
    assert threads.run(names_thread(seen)).wait(PATIENCE_S)
    assert not hanging.is_set()
    free.set()
    assert hanging.wait(PATIENCE_S)
    before = set(seen)
    assert len(before) == 2
    assert threads.run(names_thread(seen)).wait(PATIENCE_S)
    assert set(seen) == before


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit("a library's exit")])
def test_work_that_raises_has_ended_is_logged_and_leaves_its_thread_to_the_next(
    threads: KeptThreads, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    seen: list[threading.Thread] = []

    def fail() -> None:
        names_thread(seen)()
        raise error

    assert threads.run(fail).wait(PATIENCE_S)
    assert threads.run(names_thread(seen)).wait(PATIENCE_S)
    assert len(set(seen)) == 1
    assert str(error) in caplog.text


def test_close_ends_threads_at_once_or_when_their_work_has_ended() -> None:
    threads, begun, free = KeptThreads("kept"), threading.Event(), threading.Event()
    busy, idle = list[threading.Thread](), list[threading.Thread]()

    def hang() -> None:
        names_thread(busy)()
        begun.set()
        free.wait(PATIENCE_S)

    hanging = threads.run(hang)
    assert begun.wait(PATIENCE_S)
    assert threads.run(names_thread(idle)).wait(PATIENCE_S)
    threads.close()
    idle[0].join(PATIENCE_S)
    assert not idle[0].is_alive() and not hanging.is_set()
    free.set()
    busy[0].join(PATIENCE_S)
    assert not busy[0].is_alive()


def test_a_process_ends_while_work_hangs() -> None:
    """An engine that is told to end in the middle of a push does not wait for its deadline; one of `concurrent.futures` would."""
    code = (
        "import threading, time\n"
        "from weightsync.threads import KeptThreads\n"
        "begun = threading.Event()\n"
        "KeptThreads('kept').run(lambda: (begun.set(), time.sleep(600)))\n"
        "assert begun.wait(10)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S).returncode == 0
