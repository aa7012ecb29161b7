"""Members and leases: who takes part, who lives, and which of two incarnations is the replica."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable

import pytest

from tests.dataplane.ledger_makers import member
from tests.fixtures.servers import RedisServer
from weightsync.errors import FencedOut, LedgerUnavailable
from weightsync.rendezvous import members
from weightsync.rendezvous.ledger import Ledger
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import Keys, ReplicaStatus

OpenLedger = Callable[..., Ledger]


def wait_for_death(ledger: Ledger, replica: str) -> None:
    wait_until(
        lambda: replica not in ledger.live_members() or None,
        deadline=Deadline(5),
        what=f"the lease of {replica} to end",
    )


def test_member_that_joined_is_read_back_whole(ledger: Ledger, open_ledger: OpenLedger) -> None:
    before = ledger.now()
    joined = ledger.join(
        member(ranks=2, layout_digests=("a", "b"), version=3, epoch=2, seen_epoch=2, state="DIRTY", digest="f0"),
        ttl_s=30,
    )
    assert before <= joined.joined_at <= ledger.now()
    assert open_ledger().live_members() == {"engine-0": joined}
    assert ledger.head().order == (2, 3)


def test_member_is_dead_when_its_lease_has_run_out_and_known_until_it_leaves(ledger: Ledger) -> None:
    dead, live = ledger.join(member("engine-0"), ttl_s=0.1), ledger.join(member("engine-1"), ttl_s=30)
    for name in ("engine-0", "engine-1"):
        ledger.publish_replica_status(ReplicaStatus(name=name, version=1, epoch=1, state="CLEAN", serving=True))
    wait_for_death(ledger, "engine-0")
    assert ledger.members() == {"engine-0": dead, "engine-1": live}
    assert ledger.leave("engine-0", dead.incarnation)
    assert ledger.members().keys() == ledger.replica_statuses().keys() == {"engine-1"}


def test_replica_that_died_or_restarted_is_lost_to_the_push_it_takes_part_in(ledger: Ledger) -> None:
    taking_part = {
        name: ledger.join(member(name), ttl_s=30).incarnation for name in ("engine-0", "engine-1", "engine-2")
    }
    assert ledger.lost_members(taking_part) == ()
    ledger.join(member("engine-1", incarnation="second"), ttl_s=30)
    ledger.leave("engine-2", taking_part["engine-2"])
    assert ledger.lost_members(taking_part) == ("engine-1", "engine-2")


def test_member_that_renews_its_lease_lives_on(ledger: Ledger) -> None:
    joined = ledger.join(member(), ttl_s=0.5)
    ends = time.monotonic() + 1.2
    while time.monotonic() < ends:
        joined = ledger.join(joined, ttl_s=0.5)
        assert "engine-0" in ledger.live_members()
        time.sleep(0.05)


@pytest.mark.failure_mode(60)
def test_restarted_replica_takes_over_at_once_and_the_old_one_is_told(ledger: Ledger, open_ledger: OpenLedger) -> None:
    """1. An engine joins. 2. It restarts under its name. 3. The old process beats, then leaves: the new one stays."""
    zombie = open_ledger()
    old = zombie.join(member(incarnation="old"), ttl_s=30)
    new = ledger.join(member(incarnation="new"), ttl_s=30)
    assert ledger.live_members() == {"engine-0": new}
    with pytest.raises(FencedOut, match="old was replaced by new"):
        zombie.join(old, ttl_s=30)
    assert not zombie.leave("engine-0", "old")
    assert ledger.live_members() == {"engine-0": new}
    assert ledger.leave("engine-0", "new")
    assert ledger.members() == {}


@pytest.mark.failure_mode(26)
@pytest.mark.parametrize("order", list(itertools.permutations(["old", "new"])))
def test_later_incarnation_wins_also_in_a_ledger_that_came_back_empty(
    redis_server: RedisServer, open_ledger: OpenLedger, order: tuple[str, ...]
) -> None:
    ledger = open_ledger()
    joined = {name: ledger.join(member(incarnation=name), ttl_s=30) for name in ("old", "new")}
    redis_server.restart(with_data=False)
    for name in order:
        if order == ("new", "old") and name == "old":
            with pytest.raises(FencedOut):
                ledger.join(joined[name], ttl_s=30)
        else:
            ledger.join(joined[name], ttl_s=30)
    assert ledger.live_members()["engine-0"].incarnation == "new"


def test_writers_without_a_lease_are_lost(ledger: Ledger) -> None:
    ledger.hold_writer_lease(5, 0, ttl_s=30)
    ledger.hold_writer_lease(5, 2, ttl_s=0.1)
    ledger.hold_writer_lease(4, 1, ttl_s=30)
    wait_until(
        lambda: ledger.lost_writers(5, 3) == (1, 2) or None, deadline=Deadline(5), what="the lease of writer 2 to end"
    )


def test_nobody_is_called_lost_before_they_could_renew_their_leases_after_an_outage(
    redis_server: RedisServer, ledger: Ledger, open_ledger: OpenLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Redis was away for longer than all leases. 2. At once only who was replaced is lost. 3. Later the rest."""
    monkeypatch.setattr(members, "RENEWED_WITHIN_S", 1.0)
    observer = open_ledger()
    assert observer.calm_s == math.inf
    taking_part = {name: ledger.join(member(name), ttl_s=0.2).incarnation for name in ("engine-0", "engine-1")}
    ledger.hold_writer_lease(1, 0, ttl_s=0.2)
    assert (observer.lost_writers(1, 1), observer.lost_members(taking_part)) == ((), ())
    redis_server.kill()
    with pytest.raises(LedgerUnavailable):
        observer.until(time.monotonic() + 0.5).head()
    redis_server.start()
    ledger.join(member("engine-1", incarnation="second"), ttl_s=30)
    assert (observer.lost_writers(1, 1), observer.lost_members(taking_part)) == ((), ("engine-1",))
    wait_until(lambda: observer.lost_writers(1, 1) or None, deadline=Deadline(5), what="writer 0 to be called lost")
    assert observer.calm_s >= 1.0
    assert observer.lost_members(taking_part) == ("engine-0", "engine-1")


def test_nobody_is_called_lost_when_redis_came_back_empty_between_two_calls(
    redis_server: RedisServer, ledger: Ledger, open_ledger: OpenLedger
) -> None:
    """The pool replaces a connection that was closed meanwhile without an error that a caller could see."""
    taking_part = {"engine-0": ledger.join(member("engine-0"), ttl_s=30).incarnation}
    ledger.hold_writer_lease(1, 0, ttl_s=30)
    observer = open_ledger()
    assert (observer.lost_writers(1, 1), observer.lost_members(taking_part)) == ((), ())
    redis_server.restart(with_data=False)
    assert (observer.lost_writers(1, 1), observer.lost_members(taking_part)) == ((), ())


def test_status_is_stamped_by_the_ledgers_clock(ledger: Ledger) -> None:
    before = ledger.now()
    ledger.publish_replica_status(ReplicaStatus(name="engine-0", version=2, epoch=1, state="OPEN", serving=True))
    status = ledger.replica_statuses()["engine-0"]
    assert before <= status.updated_at <= ledger.now()
    assert (status.version, status.state, status.serving) == (2, "OPEN", True)


def test_a_member_shows_its_status_by_the_call_that_renews_it(ledger: Ledger) -> None:
    """One round trip a beat; without a status what was shown stays."""
    before = ledger.now()
    status = ReplicaStatus(name="engine-0", version=2, epoch=1, state="CLEAN", serving=False, reason="it's {late}")
    joined = ledger.join(member(), 30, status)
    (shown,) = ledger.replica_statuses().values()
    assert before <= shown.updated_at <= ledger.now()
    assert dataclasses.replace(shown, updated_at=0.0) == status
    ledger.join(joined, 30)
    assert ledger.replica_statuses() == {"engine-0": shown}


def test_an_incarnation_that_was_replaced_shows_nothing(open_ledger: OpenLedger) -> None:
    zombie, ledger = open_ledger(), open_ledger()
    old = zombie.join(member(incarnation="old"), ttl_s=30)
    ledger.join(
        member(incarnation="new"), 30, ReplicaStatus(name="engine-0", version=2, epoch=1, state="CLEAN", serving=True)
    )
    with pytest.raises(FencedOut, match="was replaced by new"):
        zombie.join(old, 30, ReplicaStatus(name="engine-0", version=1, epoch=1, state="DIRTY", serving=False))
    assert ledger.replica_statuses()["engine-0"].version == 2


@pytest.mark.failure_mode(46)
def test_sessions_of_one_redis_see_nothing_of_each_other(redis_server: RedisServer, open_ledger: OpenLedger) -> None:
    """Also when one session's name begins with the other's."""
    here, there = open_ledger("s1"), open_ledger("s1-1")
    here.open_epoch(7)
    here.join(member(), ttl_s=30)
    here.hold_writer_lease(7, 0, ttl_s=30)
    assert there.members() == {}
    assert there.open_epoch() == 1
    assert there.lost_writers(7, 1) == (0,)
    with redis_server.client() as keys:
        assert all(str(key).startswith((Keys("s1").prefix, Keys("s1-1").prefix)) for key in keys.scan_iter())
