"""An engine rank that replays a tensor, in pushes over real NIXL agents and a real ledger: in place and staged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.dataplane.push_makers import SHAPES, Bench
from weightsync import verify
from weightsync.rendezvous.ledger import Ledger
from weightsync.wire import ReplicaState

STAGED = {"commit": "staged", "staging": "device"}
Make = Callable[..., Bench]
both_modes = pytest.mark.parametrize("transfer", [{}, STAGED], ids=["inPlace", "staged"])


@pytest.fixture
def make(open_ledger: Callable[..., Ledger]) -> Iterator[Make]:
    made: list[Bench] = []

    def make_one(**options: object) -> Bench:
        made.append(Bench(open_ledger, replayed="b", **options))  # type: ignore[arg-type]
        return made[-1]

    yield make_one
    for bench in made:
        bench.close()


@both_modes
def test_each_push_is_replayed_into_the_same_memory(make: Make, transfer: dict[str, str]) -> None:
    """1. live memory is the version, in the kernel's order; 2. the digest is of what was sent; 3. bytes are told by kind."""
    bench = make(**transfer)
    assert bench.replay is not None
    trainer, address = bench.trainer(), bench.replay.live.data_ptr()
    for version in (1, 2):
        record = bench.push(trainer, version)
        assert bench.holds(version)
        described = bench.receiver.describe()
        sent = {**bench.params, **bench.replay.staged}
        assert described.digest == verify.to_hex(sum(verify.digest_tensor(n, t) for n, t in sent.items()))
        (vote,) = bench.ledger.votes(record.push_id).values()
        assert (vote.ok, vote.digest) == (True, described.digest)
    replayed = 2 * SHAPES["b"][0] * SHAPES["b"][1]
    assert described.replayed_bytes == replayed
    assert described.direct_bytes + replayed == vote.bytes
    assert bench.replay.live.data_ptr() == address
    assert bench.receiver.verify().state == ReplicaState.CLEAN


@pytest.mark.failure_mode(54)
@both_modes
def test_a_replay_in_part_is_voted_against_and_live_memory_is_as_it_was(make: Make, transfer: dict[str, str]) -> None:
    """Staged: the rank serves on. In place the other parameters are torn: DIRTY until the next push, which repairs them.

    Seen to fail with `Receiver._prepared` returning nothing: the vote is yes.
    """
    bench = make(**transfer)
    assert bench.replay is not None
    trainer = bench.trainer()
    bench.push(trainer, 1)
    replayed = bench.replay.live.clone()
    bench.replay.lost_rows = 3
    record = bench.deliver(trainer, 2)
    (vote,) = bench.ledger.votes(record.push_id).values()
    assert (vote.ok, "layer was replayed in part (live: 132 of 231 elements written)" in vote.reason) == (False, True)
    described = bench.receiver.abort(record.push_id, vote.reason)
    assert torch.equal(bench.replay.live, replayed)
    assert described.state == (ReplicaState.CLEAN if transfer else ReplicaState.DIRTY)
    assert bench.holds(1) == bool(transfer)
    bench.replay.lost_rows = 0
    bench.push(trainer, 3)
    assert bench.holds(3)
    assert bench.receiver.describe().state == ReplicaState.CLEAN


@pytest.mark.failure_mode(24)
def test_a_loader_that_breaks_is_voted_against_in_its_words(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with a `Receiver._prepared` that catches refusals only: its thread ends, and nobody votes."""
    bench = make(**STAGED)

    def breaks(wanted: Callable[[], bool]) -> None:
        assert wanted()
        raise RuntimeError("out of memory")

    assert bench.replay is not None
    monkeypatch.setattr(bench.replay, "prepare", breaks)
    record = bench.deliver(bench.trainer(), 1)
    (vote,) = bench.ledger.votes(record.push_id).values()
    assert (vote.ok, vote.reason) == (False, "the replay failed: RuntimeError: out of memory")


@pytest.mark.failure_mode(12)
@both_modes
def test_nothing_replayed_is_live_before_the_commit(make: Make, transfer: dict[str, str]) -> None:
    bench = make(**transfer)
    assert bench.replay is not None
    trainer = bench.trainer()
    bench.push(trainer, 1)
    replayed = bench.replay.live.clone()
    record = bench.deliver(trainer, 2)
    assert torch.equal(bench.replay.live, replayed)
    bench.receiver.abort(record.push_id, "test")
    assert torch.equal(bench.replay.live, replayed)


@pytest.mark.failure_mode(10)
@both_modes
def test_a_change_of_replayed_memory_is_found_though_no_digest_of_the_trainers_covers_it(
    make: Make, transfer: dict[str, str]
) -> None:
    """Seen to fail with `Receiver._differing_replayed` returning nothing."""
    bench = make(**transfer)
    assert bench.replay is not None
    bench.push(bench.trainer(), 1)
    assert bench.receiver.verify().state == ReplicaState.CLEAN
    bench.replay.live[2, 2] += 1
    described = bench.receiver.verify()
    assert (described.state, described.reason) == (ReplicaState.DIRTY, "1 targets (live) differ from version 1")


@pytest.mark.failure_mode(47)
def test_a_silent_writers_staging_of_replays_is_retired(make: Make) -> None:
    bench = make(**STAGED)
    assert bench.replay is not None
    trainer = bench.trainer()
    bench.push(trainer, 1)
    address = bench.replay.memory.data_ptr()
    record = bench.begin(trainer)
    bench.receiver.open(record)
    assert bench.receiver.abort(record.push_id, "a writer fell silent").state == ReplicaState.CLEAN
    assert bench.replay.memory.data_ptr() != address
    bench.push(bench.trainer(), 2)
    assert bench.holds(2)
