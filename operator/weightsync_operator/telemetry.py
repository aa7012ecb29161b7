"""Reads each resource's ledger every few seconds with a user that can only read, and never on the path of reconciling.

Imports the wire records of the runtime and redis; the operator's passwords come in as arguments.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from weightsync.wire import Keys, PushSummary, ReplicaStatus
from weightsync_operator.plan.observed import LedgerView

PERIOD_S = 5.0
JITTER = 0.2
TIMEOUT_S = 2.0
POLLS_AT_ONCE = 50
FAILURES_SHOWN_FROM = 2
"""One lost packet is no news."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where one session's ledger is, and how to read it."""

    host: str
    port: int
    username: str
    password: str = dataclasses.field(repr=False)
    session: str


class Telemetry:
    """The last view of every ledger; `on_change(key)` is called when a view differs from the one before."""

    def __init__(self, on_change: Callable[[tuple[str, str]], None]) -> None:
        self._on_change = on_change
        self._ledgers: dict[tuple[str, str], Ledger] = {}
        self._views: dict[tuple[str, str], LedgerView] = {}
        self._failures: dict[tuple[str, str], int] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(POLLS_AT_ONCE)

    def watch(self, key: tuple[str, str], ledger: Ledger) -> None:
        """Poll `ledger` for the resource `key` from now on; another session starts with an empty view."""
        known = self._ledgers.get(key)
        if known is not None and known.session != ledger.session:
            self._views.pop(key, None)
        self._ledgers[key] = ledger
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._poll_for_ever(key), name=f"telemetry {'/'.join(key)}")

    def forget(self, key: tuple[str, str]) -> None:
        """Stop polling."""
        for table in (self._ledgers, self._views, self._failures):
            table.pop(key, None)
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()

    def view(self, key: tuple[str, str]) -> LedgerView | None:
        return self._views.get(key)

    async def close(self) -> None:
        """Stop all polling and wait for its end."""
        tasks = list(self._tasks.values())
        for key in list(self._tasks):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll_for_ever(self, key: tuple[str, str]) -> None:
        while True:
            ledger = self._ledgers[key]
            async with self._slots:
                view = await self._poll(key, ledger)
            if self._ledgers.get(key) is ledger or self._ledgers[key].session == ledger.session:
                self._store(key, view)
            await asyncio.sleep(PERIOD_S * random.uniform(1 - JITTER, 1 + JITTER))

    async def _poll(self, key: tuple[str, str], ledger: Ledger) -> LedgerView:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                view = await read_ledger(ledger)
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            before = self._views.get(key) or LedgerView(session=ledger.session)
            why = str(error) or f"no answer in {TIMEOUT_S:g} s"
            message = f"{ledger.host}:{ledger.port}: {why}"[:500]
            return dataclasses.replace(before, error=message) if failures >= FAILURES_SHOWN_FROM else before
        self._failures[key] = 0
        return view

    def _store(self, key: tuple[str, str], view: LedgerView) -> None:
        if view != self._views.get(key) and (view.error or self._failures.get(key, 0) == 0):
            self._views[key] = view
            self._on_change(key)


async def read_ledger(ledger: Ledger) -> LedgerView:
    """One look at a session's ledger. Raises RedisError, OSError or ValueError (a record that is no JSON)."""
    keys = Keys(ledger.session)
    async with Redis(
        host=ledger.host,
        port=ledger.port,
        username=ledger.username,
        password=ledger.password,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),  # the next poll is the retry, and a refusal is told in its own words
    ) as redis:
        async with redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.head)
            pipe.hgetall(keys.replicas)
            pipe.lrange(keys.pushes, 0, 0)
            head, replicas, pushes = await pipe.execute()
        live = await _live(redis, keys, sorted(replicas))
    return LedgerView(
        session=ledger.session,
        epoch=int(head.get("epoch", 0)),
        version=int(head.get("version", 0)),
        published=int(head.get("published", 0)),
        replicas=tuple(_settled(ReplicaStatus.from_json(text)) for _, text in sorted(replicas.items())),
        live=live,
        last_push=PushSummary.from_json(pushes[0]) if pushes else None,
    )


async def _live(redis: Redis, keys: Keys, names: list[str]) -> frozenset[str]:
    """Replicas whose lease has not run out."""
    async with redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.exists(keys.replica_lease(name))
        found = await pipe.execute()
    return frozenset(name for name, exists in zip(names, found, strict=True) if exists)


def _settled(record: ReplicaStatus) -> ReplicaStatus:
    """Without the time of the heartbeat: a view that differs in nothing else is no news."""
    return dataclasses.replace(record, updated_at=0.0)
