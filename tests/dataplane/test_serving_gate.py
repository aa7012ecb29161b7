"""What clients hear from an engine that is ending: ask again, and never that their request was at fault."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from weightsync.vllm.endpoint import ServingGate


def _client(*, status: int, errored: bool) -> TestClient:
    """A server that answers everything with `status`, behind the gate of an engine that lives or has ended."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def answer() -> JSONResponse:
        return JSONResponse({"from": "vLLM"}, status_code=status)

    endpoint: Any = SimpleNamespace(controls=lambda path: False, refusal=lambda: "", engine_has_ended=errored)
    return TestClient(ServingGate(app, endpoint), raise_server_exceptions=False)


@pytest.mark.failure_mode(46)
@pytest.mark.parametrize(
    ("status", "errored", "told"),
    [(500, True, 503), (503, True, 503), (500, False, 500), (400, True, 400), (200, True, 200)],
)
def test_an_error_of_an_engine_that_has_ended_is_one_to_ask_again_after(status: int, errored: bool, told: int) -> None:
    """Seen in a rollout: the engine's core ends before its API server, which answered 500 meanwhile."""
    answer = _client(status=status, errored=errored).post("/v1/completions", json={})
    assert answer.status_code == told
    assert ("retry-after" in answer.headers) is (told == 503)
    assert ("from" in answer.json()) is (told != 503)
