"""Heartbeats: they come back after every outage, say what is wrong, and end only when they must."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.dataplane.ledger_makers import begin, commit, member, replica_heartbeat
from tests.fixtures.servers import RedisServer
from weightsync.errors import FencedOut, LedgerUnavailable
from weightsync.rendezvous.heartbeat import Heartbeat, writer_heartbeat
from weightsync.rendezvous.ledger import Ledger
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import ReplicaStatus

OpenLedger = Callable[..., Ledger]
TTL_S = 0.6


def eventually(condition: Callable[[], bool], what: str) -> None:
    wait_until(lambda: condition() or None, deadline=Deadline(10), what=what)


def a_status() -> ReplicaStatus:
    return ReplicaStatus(name="engine-0", version=4, epoch=2, state="CLEAN", serving=True)


@pytest.mark.failure_mode(30)
def test_replica_is_back_in_a_ledger_that_lost_its_data(redis_server: RedisServer, open_ledger: OpenLedger) -> None:
    """1. A replica beats. 2. Redis restarts empty. 3. Member, lease, status, epoch and version are there again."""
    held = member(version=4, epoch=2, seen_epoch=3)
    reader = open_ledger()
    with replica_heartbeat(open_ledger(), lambda: held, a_status, ttl_s=TTL_S) as heartbeat:
        assert heartbeat.wait_first(5)
        joined_at = reader.live_members()["engine-0"].joined_at
        redis_server.restart(with_data=False)
        eventually(lambda: "engine-0" in reader.replica_statuses(), "the replica to be back")
        assert reader.live_members()["engine-0"].joined_at == pytest.approx(joined_at, abs=1e-5)
        head = open_ledger().head()
        assert (head.epoch, head.order) == (3, (2, 4))


def test_heartbeat_tells_an_outage_and_goes_on_after_it(
    redis_server: RedisServer, open_ledger: OpenLedger, caplog: pytest.LogCaptureFixture
) -> None:
    with replica_heartbeat(open_ledger(retry_s=0.2), ttl_s=TTL_S) as heartbeat:
        assert heartbeat.wait_first(5)
        redis_server.kill()
        eventually(lambda: isinstance(heartbeat.last_error, LedgerUnavailable), "the outage to be told")
        silent_s = heartbeat.silent_s
        redis_server.start()
        eventually(lambda: heartbeat.last_error is None, "the heartbeat to go on")
        assert heartbeat.silent_s < silent_s
    told = [record.getMessage() for record in caplog.records if record.name == "weightsync.rendezvous.heartbeat"]
    assert ["failed" in message for message in told] == [True, False]


def test_heartbeat_that_began_without_redis_joins_when_it_comes(
    redis_server: RedisServer, open_ledger: OpenLedger
) -> None:
    redis_server.kill()
    with replica_heartbeat(open_ledger(), ttl_s=TTL_S) as heartbeat:
        assert not heartbeat.wait_first(0.3)
        redis_server.start()
        assert heartbeat.wait_first(5)
        assert open_ledger().live_members().keys() == {"engine-0"}


@pytest.mark.failure_mode(31)
def test_lease_lives_through_threads_that_do_not_let_go_of_the_interpreter(open_ledger: OpenLedger) -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    spinners = [threading.Thread(target=spin) for _ in range(2)]
    ttl_s = 2.0
    with writer_heartbeat(open_ledger(), 1, 0, ttl_s=ttl_s) as heartbeat:
        assert heartbeat.wait_first(5)
        for spinner in spinners:
            spinner.start()
        try:
            reader, ends = open_ledger(), time.monotonic() + 2 * ttl_s
            while time.monotonic() < ends:
                assert reader.lost_writers(1, 1) == ()
        finally:
            stop.set()
            for spinner in spinners:
                spinner.join()


def test_lease_of_a_process_that_stops_beating_ends(open_ledger: OpenLedger) -> None:
    reader = open_ledger()
    with replica_heartbeat(open_ledger(), ttl_s=TTL_S) as heartbeat:
        assert heartbeat.wait_first(5)
        assert reader.live_members()
    eventually(lambda: not reader.live_members(), "the lease to end")


def test_change_is_told_at_once_when_poked(open_ledger: OpenLedger) -> None:
    state = ["CLEAN"]
    reader = open_ledger()
    with replica_heartbeat(open_ledger(), lambda: member(state=state[0]), ttl_s=300) as heartbeat:
        assert heartbeat.wait_first(5)
        state[0] = "DIRTY"
        heartbeat.poke()
        eventually(lambda: reader.members()["engine-0"].state == "DIRTY", "the new state")


def test_bug_in_what_is_told_does_not_silence_the_heartbeat(open_ledger: OpenLedger) -> None:
    broken = threading.Event()

    def tell() -> ReplicaStatus:
        if broken.is_set():
            raise KeyError("a bug")
        return a_status()

    with replica_heartbeat(open_ledger(), member, tell, ttl_s=TTL_S) as heartbeat:
        assert heartbeat.wait_first(5)
        broken.set()
        eventually(lambda: isinstance(heartbeat.last_error, KeyError), "the bug to be told")
        broken.clear()
        eventually(lambda: heartbeat.last_error is None, "the heartbeat to go on")


@pytest.mark.failure_mode(60)
def test_replaced_replica_hears_it_and_stops_beating(open_ledger: OpenLedger) -> None:
    told: list[FencedOut] = []
    with replica_heartbeat(
        open_ledger(), lambda: member(incarnation="old"), ttl_s=TTL_S, on_fenced=told.append
    ) as heartbeat:
        assert heartbeat.wait_first(5)
        reader = open_ledger()
        reader.join(member(incarnation="new"), ttl_s=30)
        eventually(lambda: bool(told), "the old one to be told")
        assert heartbeat.fenced is told[0]
        assert reader.live_members()["engine-0"].incarnation == "new"


@pytest.mark.failure_mode(19)
def test_writer_of_an_epoch_that_is_over_hears_it(open_ledger: OpenLedger) -> None:
    told: list[FencedOut] = []
    trainer = open_ledger()
    trainer.open_epoch(1)
    with writer_heartbeat(trainer, 1, 0, ttl_s=TTL_S, on_fenced=told.append) as heartbeat:
        assert heartbeat.wait_first(5)
        open_ledger().open_epoch(2)
        eventually(lambda: bool(told), "the writer to be told")
    assert "epoch 2 is in force" in str(told[0])


@pytest.mark.failure_mode(50)
def test_writers_heartbeat_brings_epoch_and_version_back(redis_server: RedisServer, open_ledger: OpenLedger) -> None:
    trainer, reader = open_ledger(), open_ledger()
    trainer.open_epoch(6)
    version = commit(trainer, 6).version
    begin(trainer, 6)
    with writer_heartbeat(trainer, 6, 0, ttl_s=TTL_S) as heartbeat:
        assert heartbeat.wait_first(5)
        redis_server.restart(with_data=False)
        eventually(lambda: reader.head().epoch == 6, "the epoch to be back")
    head = reader.head()
    assert (head.order, head.published) == ((6, version), version + 1)


def test_close_ends_the_thread_at_once_and_twice_is_well() -> None:
    heartbeat = Heartbeat("test", lambda: None, interval_s=300).start()
    assert heartbeat.wait_first(5)
    began = time.monotonic()
    heartbeat.close()
    heartbeat.close()
    assert time.monotonic() - began < 5
    assert not any(thread.name == "heartbeat-test" for thread in threading.enumerate())
