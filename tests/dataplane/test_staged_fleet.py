"""Staged commits with real vLLM engines, one for each pauseMode: they serve while bytes travel, and switch in a copy's time.

The tests share one fleet and run in order: each begins where the one before it left a healthy fleet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.fleet import Engine, Fleet, Trainer, running_fleet, until
from tests.fixtures.models import make_tiny_llama, make_tiny_qwen3_moe
from weightsync.rendezvous.ledger import Ledger
from weightsync.wire import PushSummary

LONG_PROMPT = [(7 * i) % 500 + 1 for i in range(70)]
"""More than two blocks of the prefix cache."""
PROMPTS = [LONG_PROMPT, [9, 8, 7], [100, 200, 300, 400], [42]]
TOKENS = 100
TIMEOUT_S = 40.0
STAGED: dict[str, Any] = {"commit": "staged", "staging": "device"}
BLOCKS = ["--block-size", "32", "--enable-prefix-caching"]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


class Session:
    """The shared fleet and its current trainer."""

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        self.fleet, self.ledger = fleet, ledger
        self.engines: dict[str, Engine] = {}
        self.trainer: Trainer
        self.step = 0

    def push(self) -> dict[str, Any]:
        self.step += 1
        return self.trainer.push(self.step)

    def last(self) -> PushSummary:
        return self.ledger.pushes()[0]


class Crowd:
    """Requests to one engine, one after the other, from a thread of its own; asks again where the engine is behind (503)."""

    def __init__(self, engine: Engine) -> None:
        self.answers: list[tuple[list[int], str]] = []
        """Tokens and finish reason."""
        self._engine = engine
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            response = self._engine.complete([42], TOKENS)
            if response.status_code == 503:
                continue
            choice = response.json()["choices"][0]
            self.answers.append((choice["token_ids"] or [], choice["finish_reason"]))

    def stop(self) -> list[tuple[list[int], str]]:
        self._stopped.set()
        self._thread.join(60)
        return self.answers


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("staged")
    model = make_tiny_qwen3_moe(folder / "model")
    with (
        running_fleet(folder, model, timeout_seconds=TIMEOUT_S, **STAGED, quorum=2) as fleet,
        Ledger.from_contract(fleet.contract) as ledger,
    ):
        session = Session(fleet, ledger)
        for mode in ("wait", "abort", "keep"):
            session.engines[mode] = fleet.start_engine(mode, more=BLOCKS, pause_mode=mode)
        session.trainer = fleet.start_trainer()
        for engine in session.engines.values():
            engine.wait_up()
        for engine in session.engines.values():
            until(f"{engine.name} is ready", engine.ready, 60)
        yield session


@pytest.mark.failure_mode(10)
@pytest.mark.failure_mode(16)
def test_after_five_pushes_the_engines_answer_as_a_fresh_one(session: Session, tmp_path: Path) -> None:
    """Each prompt is asked before each push too: an old policy's prefix would answer for the new one, were it not reset."""
    seen = []
    for expected in (1, 2, 3, 4, 5):
        seen.append([engine.answer(LONG_PROMPT) for engine in session.engines.values()])
        report = session.push()
        assert (report["version"], report["replicas"]) == (expected, ["abort", "keep", "wait"])
        assert {engine.verify()["digest"] for engine in session.engines.values()} == {report["digest"]}
    session.trainer.ask(do="save", path=str(tmp_path / "saved"))
    fresh = session.fleet.start_engine("fresh", model=tmp_path / "saved", joins=False, more=BLOCKS).wait_up()
    wanted = [fresh.answer(prompt) for prompt in PROMPTS]
    fresh.kill()
    for engine in session.engines.values():
        assert [engine.answer(prompt) for prompt in PROMPTS] == wanted
    assert wanted[0] not in seen[-1]


@pytest.mark.failure_mode(12)
def test_requests_are_answered_while_bytes_travel_and_the_pause_is_shorter(session: Session) -> None:
    """1. a trainer rank stops itself with its transfers posted: the push is on the wire; 2. every engine is OPEN, ready, and
    answers as before; 3. the rank goes on: the push is committed, and the pause was a part of the time on the wire.
    """
    before = {name: engine.answer([42]) for name, engine in session.engines.items()}
    version = session.engines["wait"].state()["version"]
    session.trainer.ranks[1].tell(do="stop_in_flight")
    assert session.trainer.ranks[1].hear() == {"armed": True}
    session.step += 1
    for rank in session.trainer.ranks:
        rank.tell(do="push", step=session.step)
    for name, engine in session.engines.items():
        until(f"{name} is open", lambda e=engine: e.state()["state"] == "OPEN", TIMEOUT_S)
    for name, engine in session.engines.items():
        assert engine.ready()
        assert engine.answer([42]) == before[name]
        assert engine.state()["version"] == version
    session.trainer.ranks[1].thaw()
    reports = [rank.hear() for rank in session.trainer.ranks]
    assert [report["version"] for report in reports] == [version + 1] * 2
    summary = session.last()
    assert 0 < summary.copy_seconds < summary.pause_seconds < summary.phases["wire"]


def test_each_pause_mode_does_to_running_requests_what_it_says(session: Session) -> None:
    """wait: every answer is whole and of one version. abort: whole and of one version, or cut. keep: whole, and some span two.

    A push meets the one moment in which no request runs now and then, so there are as many of them as it takes, within five.
    """
    crowds = {name: [Crowd(engine) for _ in range(2)] for name, engine in session.engines.items()}
    whole = [_answer_of_all(session)]
    answers: dict[str, list[tuple[list[int], str]]] = {}
    try:
        for _ in range(5):
            for name, pair in crowds.items():
                for crowd in pair:
                    had = len(crowd.answers)
                    until(f"{name} answers", lambda c=crowd, n=had: len(c.answers) > n, 60)
            session.push()
            whole.append(_answer_of_all(session))
            answers = {name: [answer for crowd in pair for answer in crowd.answers] for name, pair in crowds.items()}
            cut = [tokens for tokens, reason in answers["abort"] if reason == "abort"]
            spanning = [tokens for tokens, _ in answers["keep"] if tokens not in whole]
            if cut and spanning:
                break
    finally:
        for crowd in (crowd for pair in crowds.values() for crowd in pair):
            crowd.stop()
    assert whole[0] != whole[1]
    assert all(tokens in whole and reason == "length" for tokens, reason in answers["wait"])
    assert cut
    assert all(any(tokens == version[: len(tokens)] for version in whole) for tokens in cut)
    assert all(tokens in whole for tokens, reason in answers["abort"] if reason != "abort")
    assert spanning
    assert all(len(tokens) == TOKENS and tokens[0] in [version[0] for version in whole] for tokens in spanning)


def _answer_of_all(session: Session) -> list[int]:
    """What every engine answers at the version that is committed; a replica that a quorum left behind catches up first."""
    version = session.ledger.head().version
    for engine in session.engines.values():
        until(f"{engine.name} holds version {version}", lambda e=engine: e.state().get("version") == version, 60)
    answers = {tuple(engine.answer([42], TOKENS)) for engine in session.engines.values()}
    assert len(answers) == 1
    return list(answers.pop())


@pytest.mark.failure_mode(22)
def test_a_quorum_goes_on_without_a_frozen_engine_which_is_caught_up(session: Session) -> None:
    frozen = session.engines["keep"]
    frozen.freeze()
    try:
        report = session.push()
        summary = session.last()
    finally:
        frozen.thaw()
    assert report["replicas"] == ["abort", "wait"]
    assert summary.dropped.keys() == {"keep"}
    assert report["seconds"] < TIMEOUT_S
    until("it has caught up", lambda: frozen.state().get("version") == report["version"], 60)
    until("it is ready", frozen.ready, 20)
    assert frozen.answer([42]) == session.engines["wait"].answer([42])


@pytest.mark.failure_mode(47)
@pytest.mark.failure_mode(13)
def test_a_writer_that_froze_in_flight_leaves_staged_engines_serving(session: Session) -> None:
    """1. rank 1 stops itself with its transfers posted, for good; 2. the push is aborted: every engine is CLEAN, ready and answers
    as before; 3. a new epoch pushes; 4. the frozen rank continues: nothing changes.
    """
    old = session.trainer
    before = session.engines["wait"].answer([42])
    old.ranks[1].tell(do="stop_in_flight")
    assert old.ranks[1].hear() == {"armed": True}
    session.step += 1
    for rank in old.ranks:
        rank.tell(do="push", step=session.step)
    aborted = len(session.ledger.pushes())
    until("the push is over", lambda: len(session.ledger.pushes()) > aborted, TIMEOUT_S + 20)
    assert session.last().outcome == "ABORT"
    for engine in session.engines.values():
        until(f"{engine.name} is clean", lambda e=engine: e.state()["state"] in ("CLEAN", "OPEN"), 20)
        assert engine.ready()
        assert engine.answer([42]) == before
    session.trainer = session.fleet.start_trainer(name="successor")
    report = session.push()
    expected = [engine.answer([42]) for engine in session.engines.values()]
    old.ranks[1].thaw()
    assert "error" in old.ranks[1].hear()
    assert "error" in old.ranks[0].hear()
    for engine, answer in zip(session.engines.values(), expected, strict=True):
        assert engine.verify() | {"replica": ""} == engine.state() | {"replica": ""}
        assert engine.state()["digest"] == report["digest"]
        assert engine.answer([42]) == answer
    old.kill()


def test_all_ranks_of_a_tensor_parallel_engine_switch_together(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    with running_fleet(tmp_path, model, timeout_seconds=TIMEOUT_S, **STAGED) as fleet:
        engine = fleet.start_engine("engine-0", tp=2)
        trainer = fleet.start_trainer()
        engine.wait_up()
        until("the engine is ready", engine.ready, 60)
        for step in (1, 2):
            report = trainer.push(step)
            assert engine.verify()["version"] == report["version"] == step
        trainer.ask(do="save", path=str(tmp_path / "saved"))
        answers = [engine.answer(prompt) for prompt in PROMPTS[1:]]
        engine.kill()
        fresh = fleet.start_engine("fresh", model=tmp_path / "saved", joins=False, tp=2).wait_up()
        assert [fresh.answer(prompt) for prompt in PROMPTS[1:]] == answers
