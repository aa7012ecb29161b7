"""What vLLM's shutdown of an engine is made to do besides, with a client that only notes."""

from __future__ import annotations

import asyncio

import pytest

from weightsync.vllm.ending import leave_before_end


class Client:
    """vLLM's engine client, its output processor and its core's client in one, with a call of the engine that waits."""

    dead_error = RuntimeError("EngineDeadError")

    def __init__(self, log: list[str], *, fails: bool = False) -> None:
        self.output_processor = self.engine_core = self
        self.utility_results = {1: asyncio.get_running_loop().create_future()}
        self._log, self._fails = log, fails

    def shutdown(self, timeout: float | None = None) -> None:
        self._log.append(f"shut down in {timeout}")
        if self._fails:
            raise OSError("no")

    def propagate_error(self, error: Exception) -> None:
        self._log.append(f"requests end with {error}")


@pytest.mark.asyncio
async def test_it_leaves_then_shuts_down_then_fails_what_still_waits() -> None:
    log: list[str] = []
    client = Client(log)
    leave_before_end(client, lambda: log.append("leave"))
    await asyncio.to_thread(client.shutdown, timeout=3)
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        await client.utility_results[1]
    assert log == ["leave", "shut down in 3", "requests end with EngineDeadError"]
    await asyncio.to_thread(client.shutdown)  # at vLLM's exit once more: the call that has failed stays as it is
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_neither_a_leave_nor_a_shutdown_that_fails_keeps_the_rest_from_ending() -> None:
    log: list[str] = []
    client = Client(log, fails=True)

    def leave() -> None:
        raise ValueError("a bug")

    leave_before_end(client, leave)
    with pytest.raises(OSError, match="no"):
        await asyncio.to_thread(client.shutdown)
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        await client.utility_results[1]
    assert log == ["shut down in None", "requests end with EngineDeadError"]
