"""Entry point of `vllm.endpoint_plugins`: the routes by which a trainer opens a push, and probes ask for readiness.

    POST /weightsync/v1/push     open a push (bearer token); the body is a `PushRecord`
    POST /weightsync/v1/lend     write live memory into a replica that is repaired (bearer token); the body is its `PushRecord`
    GET  /weightsync/v1/state    what this replica holds (bearer token)
    POST /weightsync/v1/verify   the same, after measuring live memory again (bearer token)
    GET  /weightsync/v1/ready    200 when it may serve, else 503 with the reason
    GET  /weightsync/v1/live     200 while the engine runs
    GET  /weightsync/v1/metrics  what it holds and has taken, for Prometheus; beside vLLM's own /metrics

It also refuses requests for answers with 503 while the weights are torn or behind, since a readiness probe lags, and names the
weight version that made each answer (`vllm.versions`). An engine without a contract that vLLM's native weight transfer updates with
our backend has the last two only.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from weightsync.config import Contract, PodFacts
from weightsync.errors import DeadlineExceeded, FencedOut, WeightSyncError
from weightsync.metrics import CONTENT_TYPE
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord
from weightsync.vllm.ending import leave_before_end
from weightsync.vllm.native_gate import CONTROL_ROUTES, NativeGate
from weightsync.vllm.plugin import BACKEND
from weightsync.vllm.ranks import go_on_together, reaching_all_ranks
from weightsync.vllm.replica import Replica
from weightsync.vllm.versions import LabelledEngine, VersionHeader, watch

logger = logging.getLogger(__name__)

PREFIX = "/weightsync/v1"
_STATUS = {FencedOut: 409, DeadlineExceeded: 504}


class WeightSyncEndpoint:
    """The plug-in object that vLLM makes in its API server process."""

    name = "weightsync"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._contract = Contract.load() if "WEIGHTSYNC_CONFIG" in os.environ else None
        self._engine: Any = None
        self._replica: Replica | None = None
        self._native: NativeGate | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the gate and the header, and in a session the routes. A plain engine gets a gate that is open."""
        app.add_middleware(VersionHeader)
        app.add_middleware(ServingGate, endpoint=self)
        if self._contract is None:
            return
        # Not FastAPI's own routes, which look for dependencies in every call: a push calls a whole fleet at once.
        app.router.add_route(f"{PREFIX}/push", self._push, methods=["POST"])
        app.router.add_route(f"{PREFIX}/lend", self._lend, methods=["POST"])
        app.add_api_route(f"{PREFIX}/state", self._state, methods=["GET"])
        app.add_api_route(f"{PREFIX}/verify", self._verify, methods=["POST"])
        app.add_api_route(f"{PREFIX}/ready", self._ready, methods=["GET"])
        app.add_api_route(f"{PREFIX}/live", self._live, methods=["GET"])
        app.add_api_route(f"{PREFIX}/metrics", self._metrics, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Join the session with the engine that vLLM has just started."""
        self._engine = engine_client
        if self._contract is None:
            await self._init_native(engine_client)
            return
        engine: Any = LabelledEngine(reaching_all_ranks(engine_client), self._version)
        watch(engine_client, self._version)
        await engine.label()
        self._replica = Replica(
            engine=engine,
            contract=self._contract,
            facts=PodFacts.load(),
            ledger=Ledger.from_contract(self._contract),
            together=go_on_together(engine_client),
        )
        leave_before_end(engine_client, self._replica.leave)
        self._replica.start()

    async def _init_native(self, engine_client: Any) -> None:
        transfer = engine_client.vllm_config.weight_transfer_config
        if transfer is None or transfer.backend != BACKEND:
            logger.warning(
                "neither WEIGHTSYNC_CONFIG nor --weight-transfer-config is set: this engine takes no weights"
            )
            return
        native = self._native = NativeGate(engine_client)
        watch(engine_client, lambda: native.label)
        await native.start()

    def _version(self) -> str:
        return str(0 if self._replica is None else self._replica.view.version)

    def refusal(self) -> str:
        """Why requests must be refused now; empty when they may be answered."""
        if self._contract is None:
            return "" if self._native is None else self._native.torn
        return "starting" if self._replica is None else self._replica.refusal()

    @property
    def engine_has_ended(self) -> bool:
        """Whether the engine's processes are gone: they end before their API server does, on SIGTERM too."""
        return bool(getattr(self._engine, "errored", False))

    def controls(self, path: str) -> bool:
        """Whether a route belongs to native weight transfer into this engine, and so is never refused."""
        return self._native is not None and path in CONTROL_ROUTES

    @property
    def native(self) -> NativeGate:
        """Of an engine for which `controls` was True."""
        assert self._native is not None
        return self._native

    async def _push(self, request: Request) -> JSONResponse:
        return await self._take(request, self._member().open)

    async def _lend(self, request: Request) -> JSONResponse:
        return await self._take(request, self._member().lend)

    async def _take(self, request: Request, act: Callable[[PushRecord], Awaitable[dict[str, Any]]]) -> JSONResponse:
        """Do what a push record in the body is for."""
        if (denied := self._denied(request)) is not None:
            return denied
        try:
            record = PushRecord.from_json(await request.body())
        except (ValueError, TypeError) as error:
            return _problem(400, f"body is no push record: {error}")
        try:
            return JSONResponse(await act(record))
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
                "direct_bytes": view.direct_bytes,
                "replayed_bytes": view.replayed_bytes,
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
        if stuck := self._member().stuck:
            return _problem(503, stuck)
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
        posts = scope["type"] == "http" and scope["method"] == "POST"
        if posts and self._endpoint.controls(scope["path"]):
            await self._control(scope, receive, send)
            return
        asks_engine = posts and not scope["path"].startswith(PREFIX)
        refusal = self._endpoint.refusal() if asks_engine else ""
        if refusal:
            await _problem(503, refusal)(scope, receive, send)
            return
        await self._app(scope, receive, _Answer(self._endpoint, scope, receive, send) if asks_engine else send)

    async def _control(self, scope: Any, receive: Any, send: Any) -> None:
        """A call of native weight transfer; its caller hears of it when the gate knows what it left behind."""
        held: list[Any] = []

        async def hold(message: Any) -> None:
            held.append(message)

        native, route, status = self._endpoint.native, scope["path"], 500
        await native.before(route)
        try:
            await self._app(scope, receive, hold)
            status = held[0]["status"]
        finally:  # what a worker raised passes here, and is made an answer further out
            await native.after(route, status)
        for message in held:
            await send(message)


class _Answer:
    """`send` of one answer: an error of an engine that has ended is a 503, after which clients ask another engine, and no 500."""

    def __init__(self, endpoint: WeightSyncEndpoint, scope: Any, receive: Any, send: Any) -> None:
        self._endpoint, self._scope, self._receive, self._send = endpoint, scope, receive, send
        self._replaced = False

    async def __call__(self, message: Any) -> None:
        starts = message["type"] == "http.response.start"
        if starts and message["status"] >= 500 and self._endpoint.engine_has_ended:
            self._replaced = True
            await _problem(503, "the engine has ended")(self._scope, self._receive, self._send)
        elif not self._replaced:
            await self._send(message)


def _problem(status: int, message: str) -> JSONResponse:
    """An error in the shape that OpenAI clients read.

    After a 503 the connection is closed: the next one may go to another engine, which a Service chooses by connection.
    """
    headers = {"Retry-After": "1", "Connection": "close"} if status == 503 else None
    body = {"error": {"message": message, "type": "weightsync", "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)
