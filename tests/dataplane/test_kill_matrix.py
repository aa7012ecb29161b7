"""Cells of the kill matrix on real processes; `python -m tests.kill_matrix` runs all 84 of them.

One fleet serves the cells one after another: each leaves it healthy. What each guard is worth was seen by taking it out; the
cells name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fixtures.kill_cell import TIMEOUT_S, Cell, Run, judge_answers, judge_waits
from tests.fixtures.killable import Fleet
from tests.fixtures.killable_gate import Gate
from tests.kill_matrix import make_fleet

pytestmark = pytest.mark.timeout(400)


class Shared:
    """The fleet of the moment; a cell that fails costs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self._fleet: Fleet | None = None

    def fleet(self) -> Fleet:
        if self._fleet is None:
            self._made += 1
            self._fleet = make_fleet(self._folder / str(self._made), "wait").__enter__()
        return self._fleet

    def end(self) -> None:
        if self._fleet is not None:
            self._fleet.__exit__()
            self._fleet = None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("kill-matrix"))
    yield shared
    shared.end()


@pytest.mark.failure_mode(12)
@pytest.mark.failure_mode(13)
@pytest.mark.failure_mode(21)
@pytest.mark.failure_mode(22)
@pytest.mark.failure_mode(47)
@pytest.mark.failure_mode(48)
@pytest.mark.failure_mode(58)
@pytest.mark.failure_mode(60)
@pytest.mark.parametrize(
    "cell",
    [
        # rank 1 waited for the lease of rank 0 to run out, 14 s; torn engines stay silent till the next gang
        Cell("trainer-0", "wire", "kill"),
        # rank 1 called a committed push aborted (`Publisher._outcome` reads the decision)
        Cell("trainer-0", "apply", "kill"),
        Cell("trainer-0", "convert", "stop"),
        # its bytes come after the fleet went on (`Receiver._settle` destroys the agent)
        Cell("trainer-1", "wire", "stop"),
        # writers in flight to it waited 10 s more
        Cell("receiver", "wire", "stop"),
        Cell("receiver", "verify", "kill"),
        # one rank has committed, the other has not (`View.version` is the least of all ranks)
        Cell("tp-rank", "apply", "kill"),
        Cell("tp-rank", "plan", "stop"),
        Cell("modelexpress", "plan", "kill"),
        # each last call of a push was tried for 5 s more (`LedgerConnection.bounded`)
        Cell("redis", "convert", "stop"),
        Cell("redis", "apply", "kill"),
    ],
    ids=str,
)
def test_nothing_torn_is_served_no_wait_is_late_and_the_next_push_works(shared: Shared, cell: Cell) -> None:
    """1. all serve; 2. the actor is hit in its phase; 3. every wait ends in time; 4. the next push works and all serve it;
    5. every answer that the client got meanwhile is of one committed step, and none is older than one before.

    With `View.refusal` silent about DIRTY and `Replica._abort` always resuming, trainer-*/wire/kill gives 125 mixed answers.
    """
    outcome = Run(shared.fleet(), cell).run()
    if outcome.faults:
        shared.end()
    assert outcome.faults == []
    assert outcome.answers > 0


@pytest.mark.failure_mode(22)
def test_a_verification_that_outlasts_the_deadline_ends_with_the_push(shared: Shared) -> None:
    """1. a rank measures what it got until after the deadline; 2. the push aborts; 3. the next one works and all serve it.

    With `Receiver.abort` holding the lock that the measuring thread takes at its end, both wait for ever.
    """
    fleet = shared.fleet()
    run = Run(fleet, Cell("tp-rank", "measure", "hold"))
    outcome = run.run()
    if outcome.faults:
        shared.end()
    assert outcome.faults == []


@pytest.mark.failure_mode(24)
def test_what_one_receiver_finds_wrong_all_trainer_ranks_hear_at_once(shared: Shared) -> None:
    """1. a byte changes in a replica before it measures; 2. its vote of no ends the push on both ranks long before the deadline,
    with the target's name; 3. the next attempt repairs it.

    Without `Coordinator._wait_votes` reading refusals, or rank 1 reading the decision, the ranks wait for the deadline.
    """
    fleet = shared.fleet()
    fleet.step += 1
    gate = Gate(fleet.folder / "gates", "engine-0.1", "measure")
    try:
        for rank in fleet.ranks:
            rank.pipe.send(fleet.step)
        assert gate.wait_reached(TIMEOUT_S)
        assert httpx.post(f"{fleet.urls['engine-0']}/corrupt", trust_env=False).status_code == 200
    finally:
        gate.open()
    for rank in fleet.ranks:
        told = fleet.hear(rank)
        assert "report" in told[-1], told
        first_s = next(message["attempt_s"] for message in told if "attempt_s" in message)
        assert first_s < TIMEOUT_S / 2
    reasons = [push.reason for push in fleet.pushes() if push.step == fleet.step]
    assert reasons[0] == ""
    assert (
        "engine-0 voted no: rank 1: 1 of 5 targets differ from what was sent: model.embed_tokens.weight" in reasons[-1]
    )


@pytest.mark.failure_mode(12)
def test_pushes_without_a_pause_between_them_never_reach_an_engine_that_runs(shared: Shared) -> None:
    """Twenty, as fast as they go; the client's answers are each of one step. What one push left in the ledger opens no other."""
    fleet = shared.fleet()
    offset = fleet.answers.stat().st_size
    for _ in range(20):
        fleet.step += 1
        assert all("report" in answer for answer in fleet.push(fleet.step))
    answers = [entry for entry in fleet.log_since(offset) if "tokens" in entry]
    assert judge_answers(answers, fleet.committed_steps()) == []
    assert len({step for answer in answers for token in answer["tokens"] for step in token}) >= 3


@pytest.mark.failure_mode(17)
@pytest.mark.failure_mode(49)
def test_a_trainer_that_resumes_from_an_older_step_pushes_it_as_a_newer_version(shared: Shared) -> None:
    """The gang is begun anew and pushes step 1 first, as after a checkpoint; it takes the same way as any other push."""
    fleet = shared.fleet()
    fleet.step += 1
    before = fleet.push(fleet.step)[0]["report"]
    fleet.start_gang()
    for answer in fleet.push(1):
        report = answer["report"]
        assert (report["epoch"], report["version"]) == (before["epoch"] + 1, before["version"] + 1)
        assert report["replicas"] == ("engine-0", "engine-1")
    for url in fleet.urls.values():
        answer = httpx.post(f"{url}/v1/completions", json={"max_tokens": 2}, trust_env=False).json()
        assert answer["tokens"] == [[1.0], [1.0]]


def test_the_judge_of_answers_sees_mixed_uncommitted_and_old_ones() -> None:
    """Its faults, one at a time; what passes everything would pass a broken product, too."""

    def told(*tokens: list[list[float]]) -> list[str]:
        answers = [{"replica": "engine-0", "status": 200, "tokens": each} for each in tokens]
        return judge_answers(answers, {0, 1, 3})

    assert told([[0.0]], [[1.0], [1.0]], [], [[3.0]]) == []
    assert "mixed" in told([[1.0], [3.0]])[0]
    assert "mixed" in told([[1.0, 3.0]])[0]
    assert "not committed" in told([[2.0]])[0]
    assert "after step" in told([[3.0]], [[1.0]])[0]


def test_the_judge_of_waits_sees_a_late_answer_and_a_push_that_stays_open() -> None:
    looks = [{"replica": "engine-0", "at": float(at), "state": "OPEN"} for at in range(12)]
    assert judge_waits([], looks[:8]) == []
    assert "was OPEN for" in judge_waits([], looks)[0]
    assert judge_waits([{"replica": "engine-0", "at": 0.0, "until": 8.0}], []) == []
    assert "let a request wait" in judge_waits([{"replica": "engine-0", "at": 0.0, "until": 9.0}], [])[0]
