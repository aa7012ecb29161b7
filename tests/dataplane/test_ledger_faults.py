"""What the ledger's client makes of a Redis that is gone, frozen, full or closed: one error, in time, with a cure."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from tests.dataplane.ledger_makers import begin, commit, member
from tests.fixtures.servers import RedisServer, free_port
from weightsync.config import Contract
from weightsync.errors import LedgerUnavailable
from weightsync.rendezvous.connection import SOCKET_TIMEOUT_S
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Vote, WriterReport
from weightsync.wire import PushSummary, ReplicaStatus

OpenLedger = Callable[..., Ledger]

ACL_COMMANDS = (
    "+ping +time +get +set +mget +del +expire +hget +hset +hsetnx +hmget +hgetall +hkeys +hvals +hdel +hexists"
    " +lindex +lpush +ltrim +lrange +xadd +xread +eval +evalsha +script|load"
)
"""What the runtime's Redis user needs on the keys ws:<session>:*; the operator's ACL is held against it."""


def test_nobody_listens_is_told_with_address_and_cure_in_time() -> None:
    port = free_port()
    with Ledger(session="s1", host="127.0.0.1", port=port, retry_s=0.3) as ledger:
        began = time.monotonic()
        with pytest.raises(LedgerUnavailable, match=rf"127.0.0.1:{port}/0: head failed for 0\.\d s .* is Redis up"):
            ledger.head()
        assert 0.3 <= time.monotonic() - began < 2.0


def test_frozen_redis_is_told_when_the_callers_deadline_has_passed(redis_server: RedisServer, ledger: Ledger) -> None:
    ledger.open_epoch(1)
    redis_server.freeze()
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable, match="Timeout"):
        ledger.until(time.monotonic() + 1.0).head()
    assert time.monotonic() - began < 1.0 + 2 * SOCKET_TIMEOUT_S
    redis_server.thaw()
    assert ledger.head().epoch == 1


def test_call_survives_a_restart_of_redis_that_ends_within_its_patience(
    redis_server: RedisServer, ledger: Ledger
) -> None:
    ledger.open_epoch(1)
    redis_server.restart(with_data=True)
    assert commit(ledger, 1).version == 1


def test_wrong_password_is_told_at_once(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.config_set("requirepass", "right")
    began = time.monotonic()
    wrong = Ledger(session="s1", host="127.0.0.1", port=redis_server.port, password="wrong", retry_s=30.0)
    with wrong, pytest.raises(LedgerUnavailable, match=r"was refused .* check redis.username and redis.passwordFile"):
        wrong.head()
    assert time.monotonic() - began < 5.0
    with Ledger(session="s1", host="127.0.0.1", port=redis_server.port, password="right") as right:
        assert right.open_epoch() == 1


def test_full_redis_is_unavailable_until_it_has_room(redis_server: RedisServer, open_ledger: OpenLedger) -> None:
    ledger = open_ledger(retry_s=0.2)
    with redis_server.client() as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(LedgerUnavailable, match="OutOfMemory"):
            ledger.open_epoch(1)
        client.config_set("maxmemory", "0")
    assert ledger.open_epoch(1) == 1


def test_contract_names_the_ledger(redis_server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    with redis_server.client() as client:
        client.config_set("requirepass", "secret")
    contract = Contract.model_validate(
        {
            "session": "s1",
            "name": "test",
            "model": {"path": "/models/test"},
            "redis": {
                "host": "127.0.0.1",
                "port": redis_server.port,
                "passwordFile": str(tmp_path / "password"),
                "database": 3,
            },
            "modelExpress": {"address": "127.0.0.1:1"},
            "endpoint": {"tokenFile": "/nowhere"},
            "fabric": {"profile": "tcp", "transports": ["tcp"]},
        }
    )
    with Ledger.from_contract(contract) as ledger:
        assert ledger.open_epoch() == 1
    with redis.Redis(port=redis_server.port, password="secret", db=3) as client:
        assert client.exists("ws:s1:head")


def test_user_that_may_touch_one_sessions_keys_can_do_all_of_it(
    redis_server: RedisServer, open_ledger: OpenLedger
) -> None:
    """1. A user with ACL_COMMANDS on ws:s1:* goes through every method. 2. On another session's keys it is refused."""
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "runtime", "on", ">secret", "~ws:s1:*", *ACL_COMMANDS.split())
    place = {"host": "127.0.0.1", "port": redis_server.port, "username": "runtime", "password": "secret"}
    with Ledger(session="s1", **place) as ledger:
        use_every_method(ledger)
    with Ledger(session="s2", **place) as other:
        with pytest.raises(LedgerUnavailable, match="was refused"):
            other.open_epoch()
        with pytest.raises(LedgerUnavailable, match="was refused"):
            other.head()


def use_every_method(ledger: Ledger) -> None:
    epoch = ledger.open_epoch()
    ledger.raise_head(0, 0)
    joined = ledger.join(member(), ttl_s=30)
    ledger.hold_writer_lease(epoch, 0, ttl_s=30)
    assert ledger.lost_writers(epoch, 1) == ()
    assert ledger.live_members() == ledger.members()
    push = begin(ledger, epoch)
    assert ledger.push(push.push_id) == push
    assert ledger.current_push(epoch) == (1, push.push_id)
    assert ledger.report_writer(push.push_id, WriterReport(rank=0, ok=True))
    assert ledger.vote(push.push_id, Vote(replica="engine-0", rank=0, ok=True))
    assert (len(ledger.writer_reports(push.push_id)), len(ledger.votes(push.push_id))) == (1, 1)
    assert ledger.decision(push.push_id) is not None
    committed = commit(ledger, epoch)
    assert committed.version == ledger.head().version
    assert ledger.await_decision(committed.push_id, 1.0) == ledger.decision(committed.push_id)
    told = PushSummary(push_id=committed.push_id, epoch=1, version=committed.version, step=1, outcome="COMMIT")
    ledger.publish_push(told)
    assert [ledger.summary(committed.push_id)] == ledger.pushes()
    assert [list(fields) for _, fields in ledger.told(push.push_id, "0", 1.0)] == [["writer:0"], ["vote:engine-0:0"]]
    assert ledger.fields_of(push.push_id).keys() >= {"record", "writer:0", "vote:engine-0:0"}
    ledger.publish_replica_status(ReplicaStatus(name="engine-0", version=0, epoch=0, state="CLEAN", serving=True))
    assert (len(ledger.pushes()), len(ledger.replica_statuses())) == (1, 1)
    assert ledger.lost_members({joined.replica: joined.incarnation}) == ()
    assert ledger.report_ready(push.push_id, 1)
    assert ledger.released(push.push_id) is None
    assert ledger.release_writers(push.push_id, ["engine-0"])
    assert (ledger.ready(push.push_id), ledger.released(push.push_id)) == (frozenset({1}), frozenset({"engine-0"}))
    assert ledger.report_applied(push.push_id, Applied(replica="engine-0", digest="0", pause_seconds=0.1))
    assert ledger.applied(push.push_id).keys() == {"engine-0"}
    assert ledger.summary(push.push_id) is None
    assert ledger.leave(joined.replica, joined.incarnation)
    assert ledger.deadline_to_monotonic(ledger.now() + 10) > time.monotonic()
