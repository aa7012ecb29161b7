"""A whole session as plain processes: pushes, and whatever may die or freeze in the middle of one.

The tests share one fleet of two engines and run in order: each begins where the one before it left a healthy fleet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.fleet import Engine, Fleet, Trainer, running_fleet, until
from tests.fixtures.models import make_tiny_qwen3_moe
from weightsync.rendezvous.ledger import Ledger

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [100, 200, 300, 400], [42]]
TIMEOUT_S = 40.0

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


class Session:
    """The shared fleet and its current trainer."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.engines: list[Engine] = []
        self.trainer: Trainer
        self.step = 0

    def push(self) -> dict:
        self.step += 1
        return self.trainer.push(self.step)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        for engine in self.engines:
            until(f"{engine.name} is ready", engine.ready, timeout_s)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("fleet")
    with running_fleet(folder, make_tiny_qwen3_moe(folder / "model"), timeout_seconds=TIMEOUT_S) as fleet:
        session = Session(fleet)
        session.engines = [fleet.start_engine("engine-0"), fleet.start_engine("engine-1")]
        session.trainer = fleet.start_trainer()
        for engine in session.engines:
            engine.wait_up()
        yield session


def test_an_engine_serves_version_0_before_anything_was_pushed(session: Session) -> None:
    session.wait_ready()
    for engine in session.engines:
        state = engine.state()
        assert state.pop("direct_bytes") > 0  # every parameter is written where the engine computes with it
        assert state | {"digest": ""} == {
            "replica": engine.name,
            "state": "CLEAN",
            "version": 0,
            "epoch": 0,
            "committed": 0,
            "digest": "",
            "serving": True,
            "reason": "",
            "replayed_bytes": 0,
        }


def test_a_push_needs_the_token(session: Session) -> None:
    answer = session.engines[0].http.post("/weightsync/v1/push", json={}, headers={"Authorization": "Bearer guess"})
    assert answer.status_code == 401


def test_each_push_changes_the_answers_and_all_engines_agree(session: Session) -> None:
    answers = [session.engines[0].answer(PROMPTS[0])]
    for expected in (1, 2, 3):
        report = session.push()
        assert report["version"] == expected
        assert report["replicas"] == ["engine-0", "engine-1"]
        assert {engine.verify()["digest"] for engine in session.engines} == {report["digest"]}
        first, second = [engine.answer(PROMPTS[0]) for engine in session.engines]
        assert first == second
        answers.append(first)
    assert len({tuple(answer) for answer in answers}) > 1


def test_answers_equal_a_fresh_engine_on_the_saved_checkpoint(session: Session, tmp_path: Path) -> None:
    session.trainer.ask(do="save", path=str(tmp_path / "saved"))
    fresh = session.fleet.start_engine("fresh", model=tmp_path / "saved", joins=False).wait_up()
    expected = [fresh.answer(prompt) for prompt in PROMPTS]
    fresh.kill()
    for engine in session.engines:
        assert [engine.answer(prompt) for prompt in PROMPTS] == expected


@pytest.mark.failure_mode(19)
@pytest.mark.failure_mode(47)
@pytest.mark.failure_mode(48)
def test_a_writer_that_froze_in_flight_changes_nothing_after_the_fleet_went_on(session: Session) -> None:
    """1. rank 1 stops itself with its transfers posted; 2. the push aborts, torn engines refuse; 3. a new epoch repairs them;
    4. the frozen rank continues: no served byte changes, and both old ranks are refused.

    Without `Receiver._settle` destroying the agent, the bytes of step 4 land in live memory and `verify` says DIRTY.
    """
    old = session.trainer
    old.ranks[1].tell(do="stop_in_flight")
    assert old.ranks[1].hear() == {"armed": True}
    session.step += 1
    for rank in old.ranks:
        rank.tell(do="push", step=session.step)
    torn = until(
        "an engine is torn", lambda: [e for e in session.engines if e.state().get("state") == "DIRTY"], TIMEOUT_S + 20
    )
    assert not torn[0].ready()
    assert torn[0].complete(PROMPTS[0]).status_code == 503

    session.trainer = session.fleet.start_trainer(name="successor")
    report = session.push()
    assert report["epoch"] == 2
    session.wait_ready()
    before = [engine.answer(PROMPTS[0]) for engine in session.engines]

    old.ranks[1].thaw()
    assert "error" in old.ranks[1].hear()
    assert old.ranks[0].hear()["error"] in ("FencedOut", "PushAborted")
    old.ranks[0].tell(do="push", step=session.step)
    assert old.ranks[0].hear()["error"] == "FencedOut"
    for engine, answer in zip(session.engines, before, strict=True):
        assert engine.verify()["state"] == "CLEAN"
        assert engine.state()["digest"] == report["digest"]
        assert engine.answer(PROMPTS[0]) == answer
    old.kill()


@pytest.mark.failure_mode(18)
@pytest.mark.failure_mode(28)
@pytest.mark.failure_mode(60)
@pytest.mark.failure_mode(61)
def test_an_engine_that_restarts_serves_nothing_until_it_is_brought_up_to_date(session: Session) -> None:
    """The trainer does nothing meanwhile: its keeper pushes what the arenas hold to the newcomer, and to nobody else."""
    session.engines[1].kill()
    session.engines[1] = session.fleet.start_engine("engine-1").wait_up()
    expected = session.engines[0].state()
    seen = []

    def current() -> bool:
        answer = session.engines[1].complete(PROMPTS[0], 4)
        state = session.engines[1].state()
        seen.append((answer.status_code, state.get("version")))
        return session.engines[1].ready()

    until("engine-1 is current", current, 60.0)
    assert all(status == 503 for status, version in seen[:-1] if version == 0)
    assert session.engines[1].verify()["digest"] == expected["digest"]
    assert session.engines[0].state() == expected


@pytest.mark.failure_mode(30)
@pytest.mark.failure_mode(50)
def test_redis_comes_back_empty_and_versions_go_on(session: Session) -> None:
    before = session.push()
    session.fleet.redis.restart(with_data=False)
    for engine in session.engines:
        assert engine.answer(PROMPTS[0], 4)
    after = session.push()
    assert (after["epoch"], after["version"]) > (before["epoch"], before["version"])
    assert after["version"] > before["version"]


@pytest.mark.failure_mode(30)
def test_modelexpress_restarts_and_the_next_push_works(session: Session) -> None:
    with Ledger.from_contract(session.fleet.contract) as ledger:  # they join an empty ledger with their next heartbeat
        until("both engines are members", lambda: len(ledger.live_members()) == 2, 30.0)
    session.fleet.modelexpress.restart()
    assert session.push()["replicas"] == ["engine-0", "engine-1"]


@pytest.mark.failure_mode(22)
def test_an_engine_that_dies_in_the_middle_is_not_waited_for_past_the_deadline(session: Session) -> None:
    """Frozen between two pushes, so that it cannot open: the push is aborted and tried again without it."""
    session.engines[1].freeze()
    try:
        report = session.push()
    finally:
        session.engines[1].thaw()
    assert report["replicas"] == ["engine-0"]
    until("engine-1 has caught up", lambda: session.engines[1].state().get("digest") == report["digest"], 60.0)


@pytest.mark.failure_mode(28)
@pytest.mark.failure_mode(61)
def test_after_training_an_engine_that_restarts_gets_the_weights_from_its_peer(
    session: Session, tmp_path: Path
) -> None:
    """1. the trainer has ended, an engine restarts with the checkpoint; 2. it refuses until its peer has repaired it; 3. it
    answers as the peer does, and as a fresh engine on the weights that were pushed.
    """
    report = session.push()
    session.trainer.ask(do="save", path=str(tmp_path / "saved"))
    session.trainer.kill()
    session.engines[1].kill()
    session.engines[1] = session.fleet.start_engine("engine-1")
    session.engines[1].wait_up()
    seen = []

    def current() -> bool:
        seen.append((session.engines[1].complete(PROMPTS[0], 4).status_code, session.engines[1].state()["version"]))
        return session.engines[1].ready()

    until("engine-1 is current", current, 60.0)
    assert {status for status, version in seen if version == 0} == {503}
    assert {engine.verify()["digest"] for engine in session.engines} == {report["digest"]}
    with Ledger.from_contract(session.fleet.contract) as ledger:
        assert (ledger.pushes()[0].source, ledger.pushes()[0].version) == ("engine-0", report["version"])
    fresh = session.fleet.start_engine("fresh-at-the-end", model=tmp_path / "saved", joins=False).wait_up()
    expected = [fresh.answer(prompt) for prompt in PROMPTS]
    fresh.kill()
    for engine in session.engines:
        assert [engine.answer(prompt) for prompt in PROMPTS] == expected
