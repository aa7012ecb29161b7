"""How an engine ends: it leaves its session first, and lets no request wait for an answer that cannot come.

On SIGTERM vLLM's API server stops the engine's processes, and then waits for connections to close. The replica in it would renew
its lease meanwhile, a member of each push that refuses to take it; and requests and calls that outlast `--shutdown-timeout` (0
unless given) would never be answered, since what answers them is only cancelled (vllm/v1/engine/async_llm.py, `shutdown`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def leave_before_end(engine: Any, leave: Callable[[], None]) -> None:
    """Have the shutdown of vLLM's client `engine` begin with `leave`, and end what outlasts it with vLLM's EngineDeadError.

    Call it on the event loop that serves. vLLM shuts down from another thread, and sometimes once more at its exit.
    """
    shutdown, loop = engine.shutdown, asyncio.get_running_loop()

    @functools.wraps(shutdown)
    def leave_and_shut_down(timeout: float | None = None) -> None:
        try:
            leave()
        except Exception:  # or the server would never end: vLLM asks for that once
            logger.exception("the engine ends and cannot leave its session; its lease runs out")
        try:
            shutdown(timeout=timeout)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_fail_waiters, engine)

    engine.shutdown = leave_and_shut_down


def _fail_waiters(engine: Any) -> None:
    """Requests, and calls of the engine's processes: what vLLM cancels is only that which would have answered them."""
    engine.output_processor.propagate_error(engine.dead_error)
    for call in engine.engine_core.utility_results.values():
        if not call.done():
            call.set_exception(engine.dead_error)
