"""Who is dropped from a push, and when too few are left."""

from __future__ import annotations

import pytest

from tests.dataplane.ledger_makers import member
from weightsync.errors import PushAborted
from weightsync.participants import STRAGGLER_SHARE, Participants
from weightsync.waiting import Deadline

FLEET = {name: member(name) for name in ("engine-0", "engine-1", "engine-2")}


@pytest.mark.failure_mode(22)
def test_replicas_are_dropped_as_long_as_a_quorum_stays() -> None:
    participants = Participants(FLEET, 2)
    participants.drop({"engine-1": "is lost"})
    participants.drop({"engine-1": "is lost again", "stranger": "never took part"})
    assert (sorted(participants.left), participants.dropped) == (["engine-0", "engine-2"], {"engine-1": "is lost"})
    with pytest.raises(PushAborted, match="1 of 3 replicas are left, 2 are needed: engine-1 is lost; engine-0 refused"):
        participants.drop({"engine-0": "refused"})


def test_without_a_quorum_every_replica_counts() -> None:
    with pytest.raises(PushAborted, match="2 of 3 replicas are left, 3 are needed: engine-2 refused"):
        Participants(FLEET, None).drop({"engine-2": "refused"})


def test_fewer_members_than_the_quorum_are_no_push() -> None:
    with pytest.raises(PushAborted, match="3 of 3 replicas are left, 4 are needed: nobody else lives"):
        Participants(FLEET, 4)


def test_stragglers_get_their_share_of_the_time_once_a_quorum_is_there() -> None:
    participants, deadline = Participants(FLEET, 2), Deadline(100)
    assert participants.patience(1, deadline) is deadline
    assert participants.patience(2, deadline).left_s == pytest.approx(100 * STRAGGLER_SHARE, abs=1)
    assert participants.patience(3, deadline) is deadline
