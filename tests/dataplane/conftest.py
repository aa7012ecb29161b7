"""Tests of the runtime on real servers."""

from collections.abc import Callable, Iterator

import pytest

from tests.fixtures.servers import (
    RedisServer,
    modelexpress_server,
    pytest_runtest_makereport,
    redis_server,
    start_modelexpress,
    start_redis,
)
from weightsync.rendezvous.ledger import Ledger

__all__ = ["modelexpress_server", "pytest_runtest_makereport", "redis_server", "start_modelexpress", "start_redis"]


@pytest.fixture
def open_ledger(redis_server: RedisServer) -> Iterator[Callable[..., Ledger]]:
    """A factory of clients of one session's ledger, each with connections and knowledge of its own, as in a process."""
    opened: list[Ledger] = []

    def open_one(session: str = "s1", retry_s: float = 5.0) -> Ledger:
        opened.append(Ledger(session=session, host="127.0.0.1", port=redis_server.port, retry_s=retry_s))
        return opened[-1]

    yield open_one
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    """A client of session `s1`."""
    return open_ledger()
