"""Real engines with vLLM's own CPU kernels, one in place and one staged, beside one that is written directly, in pushes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.fleet import Engine, Fleet, until
from tests.fixtures.models import make_tiny_qwen3_moe
from tests.fixtures.servers import make_modelexpress_server, make_redis_server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
PROMPTS = [[9, 8, 7], [100, 200, 300, 400], [42]]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    redis = make_redis_server(tmp_path)
    modelexpress = make_modelexpress_server(tmp_path, redis.port)
    redis.start()
    modelexpress.start()
    fleet = Fleet(tmp_path, redis, modelexpress, make_tiny_qwen3_moe(tmp_path / "model"))
    try:
        yield fleet
    except BaseException:
        for name, tail in fleet.tails():
            print(f"===== {name}\n{tail}")
        raise
    finally:
        fleet.end()
        modelexpress.kill()
        redis.kill()


def test_after_five_pushes_engines_that_replay_answer_as_fresh_ones(fleet: Fleet, tmp_path: Path) -> None:
    """1. status tells what is direct and what is replayed; 2. each push is applied, and verified in live memory; 3. answers are
    those of a fresh engine with the same kernels on the trainer's weights.
    """
    engines: dict[str, Engine] = {
        "in-place": fleet.start_engine("in-place", kernels="vllm"),
        "staged": fleet.start_engine("staged", kernels="vllm", commit="staged", staging="device"),
    }
    trainer = fleet.start_trainer()
    for engine in engines.values():
        engine.wait_up()
        until(f"{engine.name} is ready", engine.ready, 60)
    before = engines["staged"].answer(PROMPTS[0])
    for engine in engines.values():
        state = engine.state()
        assert 0 < state["direct_bytes"] < state["replayed_bytes"]
    for version in (1, 2, 3, 4, 5):
        report = trainer.push(version)
        assert (report["version"], report["replicas"]) == (version, ["in-place", "staged"])
        assert {engine.verify()["state"] for engine in engines.values()} == {"CLEAN"}
        assert {engine.state()["digest"] for engine in engines.values()} == {report["digest"]}
    trainer.ask(do="save", path=str(tmp_path / "saved"))
    fresh = fleet.start_engine("fresh", model=tmp_path / "saved", joins=False, kernels="vllm").wait_up()
    wanted = [fresh.answer(prompt) for prompt in PROMPTS]
    for engine in engines.values():
        assert [engine.answer(prompt) for prompt in PROMPTS] == wanted
    assert wanted[0] != before
