"""What the API server does about native weight transfer with this backend: it pauses around rounds, and stops for torn weights.

The workers hold the truth (`WeightSyncTransferEngine.torn`); the gate asks them after each call of a control route. Torn weights
stop the engine: what runs is aborted, what comes is refused, until a later round has made the weights whole. Should something go
around this process, the worker itself ends rather than compute.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

UPDATE, FINISH = "/update_weights", "/finish_weight_update"
CONTROL_ROUTES = {
    UPDATE,
    FINISH,
    "/start_weight_update",
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
        self._pauses = False
        """Whether the present pause is the gate's, who then ends it."""
        self.torn = ""
        """Why nothing may be answered; empty when it may."""
        self.label = "0"
        """The weight version that vLLM labels outputs with."""

    async def start(self) -> None:
        await self._engine.update_weight_version(self.label)

    async def before(self, route: str) -> None:
        """A control route is about to be called. A round that its framework did not pause for keeps requests until it is over: no
        answer's step may run between a failure and the word of it."""
        if route == UPDATE:
            await self._pause("keep")

    async def after(self, route: str, status: int) -> None:
        """A control route was called, with that HTTP status: ask the workers what they hold."""
        if route not in (UPDATE, FINISH):
            return
        torn, version = await self._ask()
        if torn:
            self.torn = torn
            logger.error("serving nothing until a later round succeeds: %s", torn)
            await self._pause("abort")
            return
        if route == FINISH:
            self.label = await self._engine.get_weight_version()
            return
        if status < 400:
            await self._take_over(version)
        if not self.torn and self._pauses:
            self._pauses = False
            await self._engine.resume_generation()

    async def _ask(self) -> tuple[str, str]:
        """Why any rank is torn, and the version that they hold."""
        try:
            told = await self._engine.collective_rpc("weightsync_native")
        except Exception as error:  # a rank of any engine that is torn, or cannot be asked
            return str(error), ""
        return next((torn for torn, _ in told if torn), ""), str(min(version for _, version in told))

    async def _take_over(self, version: str) -> None:
        """Every rank has proved this version; what older ones left in the prefix cache must not answer for it."""
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        await self._engine.update_weight_version(version)
        self.label, self.torn = version, ""

    async def _pause(self, mode: str) -> None:
        if not await self._engine.is_paused():
            self._pauses = True
        elif mode == "keep":
            return
        await self._engine.pause_generation(mode=mode, clear_cache=mode == "abort")
