"""Entry point of `vllm.endpoint_plugins`: the routes by which a trainer opens a push, and probes ask for readiness.

    POST /weightsync/v1/push     open a push (bearer token); the body is a `PushRecord`
    GET  /weightsync/v1/state    what this replica holds (bearer token)
    POST /weightsync/v1/verify   the same, after measuring live memory again (bearer token)
    GET  /weightsync/v1/ready    200 when it may serve, else 503 with the reason
    GET  /weightsync/v1/live     200 while the engine runs
    GET  /weightsync/v1/metrics  what it holds and has taken, for Prometheus; beside vLLM's own /metrics

It also refuses requests for answers with 503 while the weights are torn or behind, since a readiness probe lags.
"""

from __future__ import annotations

import hmac
import logging
import os
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from weightsync.config import Contract, PodFacts
from weightsync.errors import DeadlineExceeded, FencedOut, WeightSyncError
from weightsync.metrics import CONTENT_TYPE
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord
from weightsync.vllm.replica import Replica

logger = logging.getLogger(__name__)

PREFIX = "/weightsync/v1"
_STATUS = {FencedOut: 409, DeadlineExceeded: 504}


class WeightSyncEndpoint:
    """The plug-in object that vLLM makes in its API server process."""

    name = "weightsync"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._contract = Contract.load() if "WEIGHTSYNC_CONFIG" in os.environ else None
        self._replica: Replica | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the gate. Without a contract the engine is a plain one, and nothing is added."""
        if self._contract is None:
            logger.warning("WEIGHTSYNC_CONFIG is not set: this engine takes no pushes")
            return
        app.add_middleware(ServingGate, endpoint=self)
        app.add_api_route(f"{PREFIX}/push", self._push, methods=["POST"])
        app.add_api_route(f"{PREFIX}/state", self._state, methods=["GET"])
        app.add_api_route(f"{PREFIX}/verify", self._verify, methods=["POST"])
        app.add_api_route(f"{PREFIX}/ready", self._ready, methods=["GET"])
        app.add_api_route(f"{PREFIX}/live", self._live, methods=["GET"])
        app.add_api_route(f"{PREFIX}/metrics", self._metrics, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Join the session with the engine that vLLM has just started."""
        if self._contract is None:
            return
        self._engine = engine_client
        self._replica = Replica(
            engine=engine_client,
            contract=self._contract,
            facts=PodFacts.load(),
            ledger=Ledger.from_contract(self._contract),
        )
        self._replica.start()

    def refusal(self) -> str:
        """Why requests must be refused now; empty when they may be answered."""
        return "starting" if self._replica is None else self._replica.refusal()

    async def _push(self, request: Request) -> JSONResponse:
        if (denied := self._denied(request)) is not None:
            return denied
        try:
            record = PushRecord.from_json(await request.body())
        except (ValueError, TypeError) as error:
            return _problem(400, f"body is no push record: {error}")
        try:
            return JSONResponse(await self._member().open(record))
        except WeightSyncError as error:
            return _problem(_STATUS.get(type(error), 500), str(error))

    async def _state(self, request: Request) -> JSONResponse:
        return self._denied(request) or self._described()

    async def _verify(self, request: Request) -> JSONResponse:
        if (denied := self._denied(request)) is not None:
            return denied
        try:
            await self._member().verify()
        except WeightSyncError as error:
            return _problem(500, str(error))
        return self._described()

    def _described(self) -> JSONResponse:
        view, refusal = self._member().view, self.refusal()
        return JSONResponse(
            {
                "replica": self._member().name,
                "state": view.state,
                "version": view.version,
                "epoch": view.epoch,
                "committed": view.committed,
                "digest": view.digest,
                "serving": not refusal,
                "reason": refusal,
            }
        )

    async def _ready(self) -> JSONResponse:
        refusal = self.refusal()
        return _problem(503, refusal) if refusal else JSONResponse({"ready": True})

    async def _live(self) -> JSONResponse:
        try:
            await self._engine.check_health()
        except Exception as error:  # vLLM raises several types; each of them means that the engine is dead
            return _problem(503, f"engine is dead: {error}")
        return JSONResponse({"live": True})

    async def _metrics(self) -> Response:
        return Response(self._member().metrics(), media_type=CONTENT_TYPE)

    def _member(self) -> Replica:
        assert self._replica is not None  # vLLM calls init_state before it serves
        return self._replica

    def _denied(self, request: Request) -> JSONResponse | None:
        assert self._contract is not None
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self._contract.endpoint_token().encode()):
            return None
        return _problem(401, "bearer token missing or wrong")


class ServingGate:
    """ASGI middleware: 503 for whatever the engine would answer from weights that must not be served."""

    def __init__(self, app: Any, endpoint: WeightSyncEndpoint) -> None:
        self._app = app
        self._endpoint = endpoint

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asks_engine = scope["type"] == "http" and scope["method"] == "POST" and not scope["path"].startswith(PREFIX)
        refusal = self._endpoint.refusal() if asks_engine else ""
        if refusal:
            await _problem(503, refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _problem(status: int, message: str) -> JSONResponse:
    """An error in the shape that OpenAI clients read."""
    headers = {"Retry-After": "1"} if status == 503 else None
    body = {"error": {"message": message, "type": "weightsync", "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)
