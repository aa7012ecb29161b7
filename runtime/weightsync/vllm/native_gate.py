"""What the API server knows of vLLM's native weight transfer with this backend: whether its engine may serve.

The workers hold the truth (`WeightSyncTransferEngine.torn`); the gate asks them after each call of a control route. Torn weights
stop the engine: what runs is aborted, what comes is refused, until a later round has made the weights whole. Should something go
around this process, the worker itself ends rather than compute.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

ROUND_ROUTES = frozenset({"/start_weight_update", "/update_weights", "/finish_weight_update"})
CONTROL_ROUTES = ROUND_ROUTES | {
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/pause",
    "/resume",
    "/abort_requests",
    "/update_weight_version",
}
"""Routes of vLLM's development mode that compute nothing, and that a repair needs."""


class NativeGate:
    """Whether an engine that a native trainer updates may answer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._stopped = False
        self.torn = ""
        """Why nothing may be answered; empty when it may."""
        self.label = "0"
        """The weight version that vLLM labels outputs with."""

    async def start(self) -> None:
        await self._engine.update_weight_version(self.label)

    async def after(self, route: str, status: int) -> None:
        """A control route was called: ask the workers what they hold."""
        if route not in ROUND_ROUTES:
            return
        try:
            await self._engine.collective_rpc("weightsync_require_whole")
        except Exception as error:  # a rank that is torn, of any engine, or cannot be asked
            await self._stop(str(error))
            return
        if route == "/finish_weight_update" and status < 400:
            await self._go_on()

    async def _stop(self, reason: str) -> None:
        self.torn = reason
        logger.error("serving nothing until a later round succeeds: %s", reason)
        self._stopped = self._stopped or not await self._engine.is_paused()
        await self._engine.pause_generation(mode="abort", clear_cache=True)

    async def _go_on(self) -> None:
        """The round is over and proved; what the old weights left in the prefix cache must not answer for the new ones."""
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        self.label = await self._engine.get_weight_version()
        self.torn = ""
        if self._stopped:  # by us: nobody else would resume it
            self._stopped = False
            await self._engine.resume_generation()
