"""How an engine ends: it leaves its session first, and lets no request wait for an answer that cannot come.

On SIGTERM vLLM's API server stops the engine's processes, and then waits for connections to close. The replica in it would renew
its lease meanwhile, a member of each push that refuses to take it; and requests that outlast `--shutdown-timeout` (0 unless given)
would never be answered, since what waits for them is only cancelled (vllm/v1/engine/async_llm.py, `shutdown`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Any


def leave_before_end(engine: Any, leave: Callable[[], None]) -> None:
    """Have the shutdown of vLLM's client `engine` begin with `leave`, and end what outlasts it with vLLM's EngineDeadError.

    Call it on the event loop that serves. vLLM shuts down from another thread, and sometimes once more at its exit.
    """
    shutdown, loop = engine.shutdown, asyncio.get_running_loop()

    @functools.wraps(shutdown)
    def leave_and_shut_down(timeout: float | None = None) -> None:
        leave()
        shutdown(timeout=timeout)
        with contextlib.suppress(RuntimeError):  # the loop is closed: no request is left
            loop.call_soon_threadsafe(engine.output_processor.propagate_error, engine.dead_error)

    engine.shutdown = leave_and_shut_down
