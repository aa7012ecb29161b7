"""A push as its coordinator runs it, with a ledger that is real and replicas that are a port each: who is dropped, and when."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.dataplane.ledger_makers import member
from weightsync.config import (
    Contract,
    EndpointSection,
    FabricSection,
    ModelExpressSection,
    ModelSection,
    RedisSection,
    TransferSection,
)
from weightsync.coordinator import Coordinator
from weightsync.errors import ConversionError, LedgerUnavailable, PushAborted, TransportError
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord, Vote, WriterReport, final_word, was_final
from weightsync.scale_exchange import ScaleExchange
from weightsync.waiting import Deadline
from weightsync.wire import Decision
from weightsync.writer import Written

NAMES = ("engine-0", "engine-1", "engine-2")


class Replica:
    """A port that opens pushes and votes at once, or does what `behaviour` says.

    refuse, hang, slow, no vote, votes no, leaves (once it has opened).
    """

    def __init__(self, name: str, ledger: Ledger) -> None:
        self.name, self.behaviour = name, ""
        self.told: list[PushRecord] = []
        self.released = threading.Event()
        replica = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                record = PushRecord.from_json(self.rfile.read(int(self.headers["content-length"])))
                replica.told.append(record)
                if replica.behaviour == "hang":
                    replica.released.wait(30)
                if replica.behaviour == "slow":
                    replica.released.wait(1.5)
                self.send_response(409 if replica.behaviour == "refuse" else 200)
                body = b'{"error": {"message": "not me"}}'
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                if replica.behaviour == "leaves":
                    ledger.leave(name, record.members[name])
                if replica.behaviour in ("", "votes no"):
                    ok = not replica.behaviour
                    ledger.vote(
                        record.push_id,
                        Vote(replica=name, rank=0, ok=ok, reason="" if ok else "other bytes", digest="2a"),
                    )
                    ledger.report_applied(record.push_id, Applied(replica=name, digest="2a", pause_seconds=0.1))

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class Writer:
    """Notes what it is asked, and into which replicas it was let."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.wrote_into: list[list[str]] = []
        self.fails: dict[str, str] = {}

    def learn(self, *_: Any, **__: Any) -> dict[str, str]:
        return {"layout": "plan"}

    def begin(self, _: object) -> None:
        self.calls.append("begin")

    def fill(self, _: object) -> None:
        self.calls.append("fill")

    def measure(self, record: PushRecord) -> None:
        self.calls.append("measure")

    keeps_versions = True

    def delivering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wire_spans(self, *_: Any) -> list[Any]:
        return []

    def convert_and_write(self, *arguments: Any) -> Written:
        self.calls.append("convert and")
        return self.write(*arguments)

    def write(self, record: PushRecord, replicas: Set[str], deadline: Deadline, lost: Any) -> Written:
        self.calls.append("write")
        self.wrote_into.append(sorted(replicas))
        return Written(bytes=1, failed=self.fails, in_flight=tuple(self.fails))


class Fleet:
    """Three replicas, and a coordinator for each test's contract."""

    def __init__(self, open_ledger: Callable[..., Ledger], folder: Path) -> None:
        self.ledger, self.writer = open_ledger(), Writer()
        self.replicas = {name: Replica(name, open_ledger()) for name in NAMES}
        self._token = folder / "token"
        self._token.write_text("t")
        self.epoch = self.ledger.open_epoch()
        self.ledger.hold_writer_lease(self.epoch, 0, 60)
        for name, replica in self.replicas.items():
            self.ledger.join(member(name, url=replica.url), 60)
        self._made: list[Coordinator] = []

    def push(self, **transfer: Any) -> Any:
        contract = Contract(
            session="s1",
            name="test",
            model=ModelSection(path="/none"),
            redis=RedisSection(host="127.0.0.1"),
            model_express=ModelExpressSection(address="none:1"),
            endpoint=EndpointSection(token_file=str(self._token)),
            fabric=FabricSection(profile="tcp", transports=("tcp",)),
            transfer=TransferSection(**{"timeout_seconds": 6.0, **transfer}),
        )
        writer: Any = self.writer
        self._made.append(
            Coordinator(
                contract=contract,
                epoch=self.epoch,
                world_size=1,
                ledger=self.ledger,
                writer=writer,
                exchange=ScaleExchange(None, 0, 1),
            )
        )
        return self._made[-1].push(step=1, sequence=len(self._made), call=len(self._made))

    @property
    def last(self) -> Coordinator:
        return self._made[-1]

    def close(self) -> None:
        for replica in self.replicas.values():
            replica.close()
        for coordinator in self._made:
            coordinator.close()


@pytest.fixture
def fleet(open_ledger: Callable[..., Ledger], tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(open_ledger, tmp_path)
    yield made
    made.close()


def test_all_take_part_by_default(fleet: Fleet) -> None:
    summary = fleet.push()
    assert (summary.outcome, summary.replicas, summary.dropped) == (Decision.COMMIT, list(NAMES), {})
    assert fleet.writer.wrote_into == [list(NAMES)]


def test_a_replica_is_told_of_itself_alone(fleet: Fleet) -> None:
    """What a push says to each engine does not grow with the fleet, and the ledger's record names them all."""
    summary = fleet.push()
    whole = fleet.ledger.push(summary.push_id)
    assert whole is not None and whole.members.keys() == set(NAMES)
    for name, replica in fleet.replicas.items():
        (told,) = replica.told
        assert told == dataclasses.replace(whole, members={name: whole.members[name]})


def test_a_push_that_is_committed_stays_so_when_its_account_cannot_be_told(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights would be pushed again under another version, which ranks that heard of the commit take no part in."""

    def fail(_: object) -> None:
        raise LedgerUnavailable("Redis is away")

    monkeypatch.setattr(fleet.ledger, "publish_push", fail)
    summary = fleet.push()
    assert fleet.ledger.head().version == summary.version == 1


def test_staged_pushes_convert_while_bytes_travel_and_catch_ups_send_what_is_there(fleet: Fleet) -> None:
    """In place an engine is paused from the first byte on, and a tensor that is not finite must be found before it."""
    fleet.push()
    assert fleet.writer.calls == ["fill", "measure", "write"]
    fleet.writer.calls.clear()
    summary = fleet.push(commit="staged", staging="device")
    assert fleet.writer.calls == ["begin", "convert and", "write"]
    fleet.writer.calls.clear()
    caught_up = fleet.last.catch_up(version=summary.version, sequence=3, step=1)
    assert caught_up is not None
    assert fleet.writer.calls == ["measure", "write"]


@pytest.mark.failure_mode(13)
def test_weights_that_cannot_be_sent_are_final_for_every_rank(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. of this rank: the others find its final word, and none waits for a next attempt; 2. of another rank, whose word came while
    the push ended over something else: it counts all the same, and stands in the account, so that that rank knows it was heard.
    """

    def diverge(_: object) -> None:
        raise ConversionError("w: 1 element is not finite")

    monkeypatch.setattr(fleet.writer, "fill", diverge)
    with pytest.raises(ConversionError, match="w: 1 element"):
        fleet.push()
    (mine,) = fleet.ledger.writer_reports(fleet.ledger.pushes()[0].push_id).values()
    assert (mine.rank, mine.ok, mine.final) == (0, False, True)

    def end(record: PushRecord, *_: Any) -> Written:
        fleet.ledger.report_writer(record.push_id, WriterReport(rank=1, ok=False, final=True, reason="v is a NaN"))
        raise TransportError("a peer is gone")

    monkeypatch.undo()
    monkeypatch.setattr(fleet.writer, "write", end)
    with pytest.raises(ConversionError, match="trainer rank 1: v is a NaN"):
        fleet.push()
    assert fleet.ledger.pushes()[0].reason == "trainer rank 1: v is a NaN"


@pytest.mark.failure_mode(4)
def test_a_final_word_is_heard_whichever_of_several_ranks_it_came_from() -> None:
    """A NaN in a block that ranks share is a fault of each: rank 0 accounts with one of them, and the others try no more."""
    reports = [
        WriterReport(rank=rank, ok=False, final=True, reason=f"{rank} of 9 elements are wrong") for rank in (0, 1)
    ]
    assert final_word(reports) == "trainer rank 0: 0 of 9 elements are wrong"
    assert was_final(final_word(reports), reports)
    assert was_final(final_word(reports[1:]), reports)
    assert not was_final("engine-0 is lost", reports)
    assert not was_final("0 of 9 elements are wrong", [dataclasses.replace(report, final=False) for report in reports])


@pytest.mark.failure_mode(12)
@pytest.mark.failure_mode(22)
@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("refuse", "did not open: not me"),
        ("hang", "had not opened after 3.0 s"),
        ("no vote", "had not voted after 3.0 s"),
        ("votes no", "voted no: rank 0: other bytes"),
    ],
)
def test_a_quorum_goes_on_without_one_and_nobody_writes_into_who_has_not_opened(
    fleet: Fleet, behaviour: str, why: str
) -> None:
    """Without the names in `release_writers` the writers would write into a replica that has not paused."""
    fleet.replicas["engine-1"].behaviour = behaviour
    started = time.monotonic()
    summary = fleet.push(quorum=2)
    assert time.monotonic() - started < 6
    assert (summary.outcome, summary.replicas) == (Decision.COMMIT, ["engine-0", "engine-2"])
    assert summary.dropped.keys() == {"engine-1"}
    assert summary.dropped["engine-1"][:20] == why[:20]
    opened = list(NAMES) if behaviour in ("no vote", "votes no") else ["engine-0", "engine-2"]
    assert fleet.writer.wrote_into == [opened]
    assert fleet.ledger.head().version == summary.version


@pytest.mark.failure_mode(12)
def test_one_that_opened_and_died_does_not_stand_for_one_that_has_not_opened(fleet: Fleet) -> None:
    """engine-0 opens and is gone, engine-1 opens late, engine-2 not at all: counted together, two would have opened of two left."""
    for name, behaviour in zip(NAMES, ("leaves", "slow", "hang"), strict=True):
        fleet.replicas[name].behaviour = behaviour
    with pytest.raises(PushAborted, match="1 of 3 replicas are left, 2 are needed"):
        fleet.push(quorum=2)
    assert fleet.writer.wrote_into == []


def test_a_digest_that_nobody_measured_is_not_called_good(fleet: Fleet) -> None:
    assert fleet.push().digest_ok
    assert not fleet.push(verify="off").digest_ok


def test_a_replica_that_no_writer_reached_is_dropped(fleet: Fleet) -> None:
    fleet.writer.fails = {"engine-2": "was lost while rank 0 wrote"}
    summary = fleet.push(quorum=2)
    assert (summary.replicas, summary.dropped) == (["engine-0", "engine-1"], fleet.writer.fails)
    (report,) = fleet.ledger.writer_reports(summary.push_id).values()
    assert report.in_flight == ("engine-2",)


@pytest.mark.failure_mode(13)
@pytest.mark.parametrize(("quorum", "needed"), [(None, 3), (3, 3), (2, 2)])
def test_below_the_quorum_the_push_is_aborted(fleet: Fleet, quorum: int | None, needed: int) -> None:
    fleet.replicas["engine-1"].behaviour = "votes no"
    if needed == 2:
        fleet.replicas["engine-0"].behaviour = "refuse"
    with pytest.raises(PushAborted, match=f"of 3 replicas are left, {needed} are needed"):
        fleet.push(quorum=quorum)
    assert (fleet.ledger.head().version, fleet.ledger.pushes()[0].outcome) == (0, Decision.ABORT)


def test_a_push_waits_for_as_many_members_as_the_quorum_needs(fleet: Fleet) -> None:
    with pytest.raises(PushAborted, match="not 4 of the session's engines are alive"):
        fleet.push(quorum=4, timeout_seconds=1.0)
    assert fleet.writer.wrote_into == []


def test_an_error_of_the_device_ends_the_push_at_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no error of ours: the caller has it as it is, and the engines hear of it without waiting for the deadline."""

    def fill(_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fleet.writer, "fill", fill)
    with pytest.raises(RuntimeError, match="out of memory"):
        fleet.push()
    record = fleet.ledger.push(fleet.ledger.current_push(fleet.epoch)[1])
    verdict = fleet.ledger.decision(record.push_id)
    assert (verdict.decision, verdict.reason) == (Decision.ABORT, "out of memory")
