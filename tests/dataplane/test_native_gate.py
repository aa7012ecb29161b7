"""What the API server does about torn weights, on an engine client that only takes notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.errors import WeightSyncError
from weightsync.vllm.native_gate import NativeGate
from weightsync.vllm.worker import WorkerExtension

UPDATE, FINISH = "/update_weights", "/finish_weight_update"


class Engine:
    """Two engines behind one client: of an RPC the first one's results come back, and any one's error."""

    def __init__(self) -> None:
        self.torn = ["", ""]
        self.paused = False
        self.label = "5"
        self.log: list[str] = []

    async def collective_rpc(self, method: str) -> list[tuple[str, int]]:
        assert method == "weightsync_native"
        if self.torn[1]:
            raise WeightSyncError(self.torn[1])
        return [(self.torn[0], 5)]

    async def is_paused(self) -> bool:
        return self.paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.log.append(f"pause {mode} {clear_cache}")
        self.paused = True

    async def resume_generation(self) -> None:
        self.log.append("resume")
        self.paused = False

    async def reset_prefix_cache(self, **_: Any) -> bool:
        self.log.append("reset")
        return True

    async def update_weight_version(self, version: str) -> None:
        self.log.append(f"label {version}")

    async def get_weight_version(self) -> str:
        return self.label


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.mark.asyncio
@pytest.mark.failure_mode(16)
async def test_a_round_is_paused_for_and_the_old_prefix_cache_is_cleared_before_anything_runs(engine: Engine) -> None:
    gate = NativeGate(engine)
    await gate.start()
    await gate.before(UPDATE)
    await gate.after(UPDATE, 200)
    assert engine.log == ["label 0", "pause keep False", "reset", "label 5", "resume"]
    engine.label = "step-5"
    await gate.after(FINISH, 200)
    assert gate.label == "step-5"


@pytest.mark.asyncio
@pytest.mark.failure_mode(57)
async def test_any_engine_s_torn_weights_stop_all_until_a_round_succeeded(engine: Engine) -> None:
    """The second of two engines is torn, whose answer to an RPC would be dropped. Were it an answer, the gate would stay open."""
    gate = NativeGate(engine)
    engine.torn[1] = "version 5 was not received whole"
    await gate.before(UPDATE)
    await gate.after(UPDATE, 500)
    assert (gate.torn, engine.log) == ("version 5 was not received whole", ["pause keep False", "pause abort True"])
    await gate.after(FINISH, 500)
    engine.torn[1] = ""
    await gate.after(UPDATE, 500)
    assert gate.torn
    assert "resume" not in engine.log
    await gate.before(UPDATE)
    await gate.after(UPDATE, 200)
    assert not gate.torn
    assert engine.log[-3:] == ["reset", "label 5", "resume"]


@pytest.mark.asyncio
async def test_a_round_that_was_refused_before_a_byte_moved_ends_the_pause(engine: Engine) -> None:
    gate = NativeGate(engine)
    await gate.before(UPDATE)
    await gate.after(UPDATE, 500)
    assert (gate.torn, engine.log) == ("", ["pause keep False", "resume"])


@pytest.mark.asyncio
@pytest.mark.failure_mode(13)
async def test_an_engine_that_its_framework_paused_is_resumed_by_the_framework(engine: Engine) -> None:
    gate = NativeGate(engine)
    engine.paused, engine.torn[0] = True, "torn"
    await gate.before(UPDATE)
    await gate.after(UPDATE, 500)
    engine.torn[0] = ""
    await gate.after(UPDATE, 200)
    assert engine.log == ["pause abort True", "reset", "label 5"]


@pytest.mark.failure_mode(57)
def test_only_the_last_rank_raises_what_is_torn() -> None:
    """vLLM 0.32 leaves the answers behind a rank's error in its queues, and takes them for those of the next call: were it another
    rank that raises, each later call would be given the results of the one before."""
    ranks = [WorkerExtension() for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank.rank, rank.vllm_config = number, SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))
        rank.weight_transfer_engine = SimpleNamespace(torn="torn", version=4)
    assert ranks[0].weightsync_native() == ("torn", 4)
    with pytest.raises(WeightSyncError, match="torn"):
        ranks[1].weightsync_native()
    ranks[1].weight_transfer_engine.torn = ""
    assert ranks[1].weightsync_native() == ("", 4)
