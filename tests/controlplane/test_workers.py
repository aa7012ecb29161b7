"""One task a resource: bursts are one pass, passes never overlap, failures wait longer, and one bug stops nobody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from weightsync_operator.cluster import ApiError, ApiUnavailable
from weightsync_operator.workers import Workers

A, B = ("ns", "a"), ("ns", "b")


class _Passes:
    """A reconcile that counts, and answers from a script; the last answer repeats."""

    def __init__(self, *answers: float | Exception | None, takes_s: float = 0.0) -> None:
        self.seen: list[tuple[str, str]] = []
        self.at_once = 0
        self.most_at_once = 0
        self._answers, self._takes_s = list(answers), takes_s

    async def __call__(self, key: tuple[str, str]) -> float | None:
        self.seen.append(key)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self._takes_s)
        self.at_once -= 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def count(self, number: int, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while len(self.seen) < number:  # noqa: ASYNC110 - the number of passes is no event
                await asyncio.sleep(0.01)


def _run(passes: _Passes, play: Callable[[Workers], Awaitable[None]]) -> None:
    async def scenario() -> None:
        workers = Workers(passes)
        await play(workers)
        await workers.close()

    asyncio.run(scenario())


def test_a_burst_of_events_is_one_pass() -> None:
    passes = _Passes(60.0)

    async def play(workers: Workers) -> None:
        for _ in range(100):
            workers.poke(A)
        await passes.count(1)
        await asyncio.sleep(0.3)

    _run(passes, play)
    assert len(passes.seen) == 1


def test_an_event_during_a_pass_leads_to_another_and_never_to_two_at_once() -> None:
    passes = _Passes(60.0, takes_s=0.1)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        await passes.count(1)
        workers.poke(A)
        await passes.count(2)

    _run(passes, play)
    assert passes.most_at_once == 1


def test_two_resources_do_not_wait_for_each_other() -> None:
    passes = _Passes(60.0, takes_s=0.2)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        workers.poke(B)
        await passes.count(2)
        await asyncio.sleep(0)
        assert passes.at_once == 2

    _run(passes, play)


def test_a_pass_that_asks_for_it_is_followed_by_another() -> None:
    passes = _Passes(0.0, 0.05, 60.0)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        await passes.count(3)

    _run(passes, play)


def test_a_resource_that_is_gone_is_forgotten_and_may_come_back() -> None:
    passes = _Passes(None)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        await passes.count(1)
        await asyncio.sleep(0.1)
        workers.poke(A)
        await passes.count(2)

    _run(passes, play)


@pytest.mark.failure_mode(65)
def test_failures_are_tried_again_later_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weightsync_operator.workers.FIRST_RETRY_S", 0.02)
    passes = _Passes(ApiError(500, "broken", {}), ApiUnavailable("away"), ApiError(403, "no", {}), 60.0)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        await passes.count(4)

    with caplog.at_level(logging.WARNING):
        _run(passes, play)
    assert [record.message.split("(")[0] for record in caplog.records] == [
        "ns/a: the API server refused ",
        "ns/a: no answer ",
        "ns/a: the API server refused ",
    ]


def test_a_conflict_is_tried_again_at_once_and_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    passes = _Passes(ApiError(409, "changed", {}), 60.0)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        await passes.count(2, timeout_s=1.0)

    _run(passes, play)
    assert caplog.records == []


def test_a_resource_that_goes_during_its_pass_is_no_error_and_one_that_stays_refused_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weightsync_operator.workers.FIRST_RETRY_S", 0.02)
    gone, refused = _Passes(ApiError(404, "gone", {}), None), _Passes(*2 * [ApiError(404, "no such kind", {})], 60.0)

    async def play(workers: Workers, passes: _Passes, count: int) -> None:
        workers.poke(A)
        await passes.count(count, timeout_s=5.0)

    _run(gone, lambda workers: play(workers, gone, 2))
    assert caplog.records == []
    _run(refused, lambda workers: play(workers, refused, 3))
    assert [record.message.split("(")[1] for record in caplog.records] == ["404: no such kind); next try in 0 s"]


def test_a_bug_is_visible_and_stops_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weightsync_operator.workers.FIRST_RETRY_S", 0.02)
    passes = _Passes(KeyError("bug"), 60.0)

    async def play(workers: Workers) -> None:
        workers.poke(A)
        await passes.count(2)
        workers.poke(B)
        await passes.count(3)

    _run(passes, play)
    assert "this is a bug of the operator" in caplog.text
