"""Real `vllm serve --data-parallel-size 2` on the CPU: one replica, of which every rank answers from the weights of a push."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.fleet import Engine, Fleet, running_fleet, until
from tests.fixtures.models import make_tiny_llama
from weightsync import verify
from weightsync.rendezvous.ledger import Ledger
from weightsync.wire import Decision

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [100, 200, 300, 400]]
DATA_PARALLEL = ["--data-parallel-size", "2", "--api-server-count", "1"]
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("data-parallel")
    with running_fleet(folder, make_tiny_llama(folder / "model"), timeout_seconds=TIMEOUT_S) as fleet:
        yield fleet


@pytest.mark.failure_mode(57)
def test_every_data_parallel_rank_answers_as_a_fresh_engine_and_one_that_dies_in_a_push_tears_nothing(
    fleet: Fleet, tmp_path: Path
) -> None:
    """1. both ranks join as one replica; 2. three pushes: both hold the same bytes, measured in live memory; 3. both answer as a
    fresh engine does on the weights that were pushed; 4. the second rank's process is killed while a push has its bytes on the
    wire: the engine ends, and the push is not committed.
    """
    engine, trainer = fleet.start_engine("engine-0", more=DATA_PARALLEL), fleet.start_trainer()
    engine.wait_up()
    until("the engine is ready", engine.ready, 60)
    before = _answers(engine, 0)
    assert before == _answers(engine, 1)
    for step in (1, 2, 3):
        report = trainer.push(step)
        assert (report["version"], report["replicas"]) == (step, ["engine-0"])
        held = engine.verify()["digest"].split("+")
        assert (len(held), held[0]) == (2, held[1])
        assert verify.sum_hex(held) == report["digest"]
    trainer.ask(do="save", path=str(tmp_path / "saved"))
    fresh = fleet.start_engine("fresh", model=tmp_path / "saved", joins=False).wait_up()
    expected = [fresh.answer(prompt) for prompt in PROMPTS]
    fresh.kill()
    made = _tokens_made(engine, 1)
    assert _answers(engine, 0) == expected != before
    assert _tokens_made(engine, 1) == made
    assert _answers(engine, 1) == expected
    until("its tokens are counted", lambda: _tokens_made(engine, 1) > made, 10)

    trainer.ranks[1].tell(do="stop_in_flight")
    assert trainer.ranks[1].hear() == {"armed": True}
    for rank in trainer.ranks:
        rank.tell(do="push", step=4)
    until("the push is open", lambda: engine.state().get("state") == "OPEN", TIMEOUT_S)
    os.kill(_engine_core(engine, 1), signal.SIGKILL)
    until("the engine has ended", lambda: engine.process.poll() is not None, 60)
    assert engine.get("/health") is None
    assert "error" in trainer.ranks[0].hear()
    with Ledger.from_contract(fleet.contract) as ledger:
        assert ledger.head().version == 3
        assert {push.outcome for push in ledger.pushes() if push.version > 3} <= {Decision.ABORT}


def _answers(engine: Engine, rank: int) -> list[list[int]]:
    """Greedy tokens of one data-parallel rank."""
    return [engine.answer(prompt, rank=rank) for prompt in PROMPTS]


def _tokens_made(engine: Engine, rank: int) -> float:
    """By one data-parallel rank since it began, as vLLM counts them."""
    metrics = engine.http.get("/metrics").text
    (count,) = re.findall(rf'^vllm:generation_tokens_total{{engine="{rank}",.*}} (\S+)$', metrics, re.MULTILINE)
    return float(count)


def _engine_core(engine: Engine, rank: int) -> int:
    """Process id of a data-parallel rank, by the title that vLLM gives it."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, status = (process / "cmdline").read_text(), (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if f"EngineCore_DP{rank}" in title and int(status[2]) == engine.process.pid:
            return int(process.name)
    raise AssertionError(f"no process of {engine.name} is called EngineCore_DP{rank}")
