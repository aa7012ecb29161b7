"""A writer's rules about transfers that fail and overtake each other, with transfers that end when the test says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.errors import TransportError
from weightsync.rendezvous.records import PushRecord
from weightsync.transport import TransferState
from weightsync.waiting import Deadline
from weightsync.writer import Writer, _Peer

RECORD = PushRecord(
    push_id="1.1.1",
    session="s",
    epoch=1,
    version=1,
    attempt=1,
    step=1,
    catch_up=False,
    deadline_at=0.0,
    writers=1,
    plan_digests={"layout": "plan"},
    members={"first": "i", "second": "i"},
)


class Scripted:
    """A transfer that is in flight for some polls, and then in its last state."""

    def __init__(self, peer: str, polls: int, ends: TransferState) -> None:
        self.peer, self.length_bytes, self.failure = peer, 8, "connection reset"
        self.released = False
        self._polls, self._ends = polls, ends

    def post(self) -> None: ...

    def poll(self) -> TransferState:
        self._polls -= 1
        return TransferState.IN_FLIGHT if self._polls > 0 else self._ends

    @property
    def in_flight(self) -> bool:
        return not self.poll().terminal

    @property
    def ended(self) -> bool:
        return self._polls <= 0

    def release(self) -> None:
        assert self.ended, "released in flight"
        self.released = True


def make_writer(*transfers: Scripted) -> tuple[Writer, list[Any]]:
    """A writer that is connected to the members of RECORD, and the list of what it does to its agent."""
    done: list[Any] = []
    agent = SimpleNamespace(
        notify=lambda peer, payload: done.append((peer, [transfer.ended for transfer in transfers])),
        disconnect=lambda peer: done.append(f"disconnected {peer}"),
    )
    writer = Writer(rank=0, agent=agent, slots=SimpleNamespace(groups=[None]), rendezvous=None)  # type: ignore[arg-type]
    for transfer in transfers:
        writer._peers[transfer.peer, 0, "i"] = _Peer(transfer.peer, "layout", (transfer,))  # type: ignore[arg-type]
    writer._partials["layout"] = {}
    return writer, done


@pytest.mark.failure_mode(23)
def test_a_transfer_that_failed_is_told_when_all_others_have_ended() -> None:
    """Raising at the first failure leaves the second in flight, from memory that the next step rewrites; only it is notified."""
    failed, slow = Scripted("first", 1, TransferState.FAILED), Scripted("second", 50, TransferState.DONE)
    writer, done = make_writer(failed, slow)
    written = writer.write(RECORD, RECORD.members.keys(), Deadline(30), frozenset)
    assert (written.bytes, written.in_flight) == (8, ())
    assert written.failed == {"first": "rank 0 to first: 1 of 1 transfers failed: connection reset"}
    assert slow.ended
    assert (failed.released, slow.released) == (True, False)
    assert done == ["disconnected first", ("second", [True, True])]


@pytest.mark.failure_mode(23)
def test_a_peer_that_nixl_forgot_by_itself_is_no_reason_to_leave_the_others_in_flight() -> None:
    """NIXL drops what it knows of a peer whose connection broke, and refuses to be told so again."""
    failed, slow = Scripted("first", 1, TransferState.FAILED), Scripted("second", 50, TransferState.DONE)
    writer, _ = make_writer(failed, slow)

    def disconnect(peer: str) -> None:
        raise TransportError(f"cannot forget peer agent {peer}: NIXL_ERR_NOT_FOUND")

    writer._agent.disconnect = disconnect  # type: ignore[method-assign]
    written = writer.write(RECORD, RECORD.members.keys(), Deadline(30), frozenset)
    assert (written.bytes, written.failed.keys(), slow.ended) == (8, {"first"}, True)


@pytest.mark.failure_mode(23)
def test_an_error_is_raised_when_nothing_is_in_flight_any_more() -> None:
    """The other side believes it, and offers the memory again."""
    slow, broken = Scripted("first", 50, TransferState.DONE), Scripted("second", 1, TransferState.DONE)
    writer, _ = make_writer(slow, broken)

    def post() -> None:
        raise TransportError("no route")

    broken.post = post  # type: ignore[method-assign]
    with pytest.raises(TransportError, match="no route"):
        writer.write(RECORD, RECORD.members.keys(), Deadline(30), frozenset)
    assert slow.ended


@pytest.mark.failure_mode(59)
def test_the_last_word_to_a_peer_goes_out_when_every_transfer_to_it_is_done() -> None:
    """A word when the first group is done would overtake the second. A slow peer holds nobody else up."""
    early, late, slow = [Scripted(p, n, TransferState.DONE) for p, n in (("first", 1), ("first", 20), ("second", 60))]
    writer, done = make_writer(early, slow)
    writer._slots.groups = [None, None]  # type: ignore[misc]
    writer._peers["first", 0, "i"] = _Peer("first", "layout", (early, late))  # type: ignore[arg-type]
    writer._peers["second", 0, "i"] = _Peer("second", "layout", (None, slow))  # type: ignore[arg-type]
    assert writer.write(RECORD, RECORD.members.keys(), Deadline(30), frozenset).bytes == 24
    assert done == [("first", [True, False]), ("second", [True, True])]
    assert late.ended
