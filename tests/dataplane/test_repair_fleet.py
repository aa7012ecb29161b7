"""Repairs of real processes by their peers, while no trainer is there to do it: who may die, freeze or be pushed to in the middle.

Two engines of two tensor parallel ranks and three of one share a fleet, tests in order; each leaves it healthy. A client asks all
the time: nothing torn, and nothing older than before, may ever be answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fixtures.fleet import until
from tests.fixtures.kill_cell import judge_answers
from tests.fixtures.killable import TOKEN, Fleet
from tests.fixtures.killable_gate import Gate
from weightsync.layout.meshes import EngineMesh

PAIR, TRIO = ("pair-0", "pair-1"), ("single-0", "single-1", "single-2")
TIMEOUT_S = 8.0
REPAIRED_S = 40.0

pytestmark = pytest.mark.timeout(300)


class JudgedFleet(Fleet):
    """A fleet whose client's log is judged from a byte on."""

    judged_from = 0

    def judge_from_now(self) -> None:
        self.judged_from = self.answers.stat().st_size


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgedFleet]:
    folder = tmp_path_factory.mktemp("repairs")
    (folder / "gates").mkdir()
    replicas = dict.fromkeys(PAIR, EngineMesh(tensor=2)) | dict.fromkeys(TRIO, EngineMesh(tensor=1))
    with JudgedFleet(folder, replicas=replicas, timeout_seconds=TIMEOUT_S) as fleet:
        yield fleet


@pytest.fixture
def fleet(shared: JudgedFleet) -> Iterator[JudgedFleet]:
    """The fleet after a push, with its trainer gone; what the client was answered in the test is judged at its end."""
    if not any(rank.alive for rank in shared.ranks):
        shared.start_gang()
    for name in shared.replicas:
        until(f"{name} has joined", lambda n=name: shared.state(n).get("committed") is not None, 60)
    until("somebody asks", shared.answers.exists, 30)
    shared.judge_from_now()
    push(shared)
    end_trainer(shared)
    yield shared
    until("every replica has answered", lambda: set(shared.replicas) <= answering(shared), 30)
    answers = [entry for entry in shared.log_since(shared.judged_from) if "tokens" in entry]
    assert judge_answers(answers, shared.committed_steps()) == []


def answering(fleet: JudgedFleet) -> set[str]:
    """Replicas that gave the client a whole answer since it is judged."""
    log = fleet.log_since(fleet.judged_from)
    return {entry["replica"] for entry in log if "tokens" in entry and entry["status"] == 200}


def push(fleet: Fleet) -> None:
    fleet.step += 1
    said = fleet.push(fleet.step)
    assert all("report" in each and len(each["report"]["replicas"]) == len(fleet.replicas) for each in said), said


def end_trainer(fleet: Fleet) -> None:
    for rank in fleet.ranks:
        rank.kill()


def restart(fleet: Fleet, name: str) -> None:
    fleet.engines[name].kill()
    fleet.start_engine(name)


def post(fleet: Fleet, name: str, path: str) -> dict[str, Any]:
    answer = httpx.post(
        f"{fleet.urls[name]}{path}", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=20
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_repaired(fleet: Fleet, name: str, like: str) -> None:
    """Until a replica serves what another one holds, byte for byte as measured anew."""
    held = fleet.state(like)

    def repaired() -> bool:
        state = fleet.state(name)
        return bool(state.get("serving")) and (state["epoch"], state["version"]) == (held["epoch"], held["version"])

    try:
        until(f"{name} is repaired", repaired, REPAIRED_S)
    except AssertionError as error:
        raise AssertionError(
            f"{error}\n{fleet.state(name)}\n{(fleet.folder / f'{name}.log').read_text()[-3000:]}"
        ) from None
    assert post(fleet, name, "/weightsync/v1/verify")["digest"] == held["digest"]


@pytest.mark.failure_mode(28)
@pytest.mark.failure_mode(61)
def test_an_engine_that_restarts_after_training_is_brought_up_to_date_by_its_peer(fleet: Fleet) -> None:
    """1. the trainer is gone, an engine of two ranks restarts with the checkpoint; 2. it serves nothing; 3. its peer of the same
    layout brings both ranks to the version, and serves meanwhile; 4. the ledger says who repaired whom.
    """
    offset = fleet.answers.stat().st_size
    restart(fleet, "pair-1")
    until("it is back", lambda: fleet.state("pair-1").get("committed"), 30)
    assert fleet.state("pair-1")["serving"] is False
    wait_repaired(fleet, "pair-1", "pair-0")
    last = fleet.pushes()[0]
    assert (last.source, list(last.replicas), last.catch_up) == ("pair-0", ["pair-1"], True)
    assert (last.outcome, last.digest_ok, last.step) == ("COMMIT", True, fleet.step)
    assert last.bytes > 0 and last.phases.keys() == {"open", "wire", "verify", "commit"}
    lender = [e for e in fleet.log_since(offset) if e["replica"] == "pair-0" and "status" in e]
    assert {entry["status"] for entry in lender} == {200}


@pytest.mark.failure_mode(13)
@pytest.mark.failure_mode(49)
def test_a_torn_engine_is_repaired_while_the_trainer_is_gone(fleet: JudgedFleet) -> None:
    """1. bytes of every rank change: DIRTY, 503; 2. a peer brings the same version again."""
    post(fleet, "pair-0", "/corrupt")
    described = post(fleet, "pair-0", "/weightsync/v1/verify")
    assert (described["state"], described["serving"]) == ("DIRTY", False)
    asked = fleet.answers.stat().st_size

    def answered(status: int) -> bool:
        entries = [entry for entry in fleet.log_since(asked) if "status" in entry]
        return any((entry["replica"], entry["status"]) == ("pair-0", status) for entry in entries)

    until("pair-0 refuses a client", lambda: answered(503), 20)
    asked = fleet.answers.stat().st_size
    fleet.judge_from_now()  # before, the test's own stray bytes were served
    wait_repaired(fleet, "pair-0", "pair-1")
    until("pair-0 answers again", lambda: answered(200), 20)


@pytest.mark.failure_mode(22)
@pytest.mark.failure_mode(61)
def test_a_source_that_is_killed_in_the_middle_is_replaced_by_another(fleet: Fleet) -> None:
    """1. a source is killed with its bytes on the wire; 2. what it was to repair does not serve; 3. the third engine repairs it,
    and then the one that was killed and came back.
    """
    gates = {name: Gate(fleet.folder / "gates", f"{name}.0", "lend") for name in TRIO[1:]}
    restart(fleet, "single-0")
    source = until("a peer lends", lambda: next((n for n in gates if gates[n].wait_reached(0)), None), REPAIRED_S)
    fleet.engines[source].kill()
    for gate in gates.values():
        gate.open()
    assert not fleet.state("single-0").get("serving")
    other = next(name for name in gates if name != source)
    wait_repaired(fleet, "single-0", other)
    assert fleet.pushes()[0].source == other
    fleet.start_engine(source)
    wait_repaired(fleet, source, other)


@pytest.mark.failure_mode(47)
@pytest.mark.failure_mode(48)
def test_a_source_that_freezes_on_the_wire_and_goes_on_later_changes_nothing(fleet: Fleet) -> None:
    """1. a source is stopped with its bytes on the wire; 2. the repair ends at its deadline, another engine carries it out; 3. a
    new trainer pushes the next version to all but the stopped one; 4. that goes on: no byte of the old one lands.

    Seen to fail with a `Receiver._settle` that ends nobody's access: the loan stays in flight towards memory that is in use.
    """
    gates = {name: Gate(fleet.folder / "gates", f"{name}.0", "lend") for name in TRIO[1:]}
    restart(fleet, "single-0")
    source = until("a peer lends", lambda: next((n for n in gates if gates[n].wait_reached(0)), None), REPAIRED_S)
    fleet.engines[source].freeze()
    for gate in gates.values():
        gate.open()
    try:
        other = next(name for name in gates if name != source)
        wait_repaired(fleet, "single-0", other)
        fleet.start_gang()
        fleet.step += 1
        said = fleet.push(fleet.step)
        assert all(source not in each["report"]["replicas"] for each in said), said
        held = fleet.state("single-0")
    finally:
        fleet.engines[source].thaw()
    until("its loan has ended", lambda: "not lent to single-0" in fleet.engines[source].log.read_text(), 30)
    until("it has caught up", lambda: fleet.state(source).get("serving"), 30)
    described = post(fleet, "single-0", "/weightsync/v1/verify")
    assert (described["state"], described["digest"]) == ("CLEAN", held["digest"])


@pytest.mark.failure_mode(13)
@pytest.mark.failure_mode(19)
def test_a_push_that_comes_while_a_peer_lends_goes_first(fleet: Fleet) -> None:
    """1. a peer has bytes on the wire; 2. a new trainer pushes, into both ends of the repair; 3. the loan ends by itself, the push
    is committed by all.
    """
    gate = Gate(fleet.folder / "gates", "pair-0.1", "lend")
    restart(fleet, "pair-1")
    try:
        assert gate.wait_reached(REPAIRED_S)
        fleet.start_gang()
        fleet.step += 1
        for rank in fleet.ranks:
            rank.pipe.send(fleet.step)
        until("the lender is open", lambda: fleet.state("pair-0").get("state") == "OPEN", TIMEOUT_S)
    finally:
        gate.open()
    for rank in fleet.ranks:
        heard = fleet.hear(rank)
        assert heard[-1].get("report", {}).get("replicas") == tuple(sorted(fleet.replicas)), heard
    for name in fleet.replicas:
        until(f"{name} serves", lambda n=name: fleet.state(n).get("serving"), 30)
        assert post(fleet, name, "/weightsync/v1/verify")["state"] == "CLEAN"
    assert "not lent to pair-1" in fleet.engines["pair-0"].log.read_text()
