"""A real engine that is told to end while it answers and a trainer pushes: nobody waits for it, and every request is answered."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fixtures.fleet import Engine, Fleet, running_fleet, until
from tests.fixtures.models import make_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.failure_mode(46)]
TOKENS = 100
SOON_S = 10.0
"""Far less than the 60 s after which the client gives up."""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running_fleet(tmp_path, make_tiny_llama(tmp_path / "model")) as fleet:
        yield fleet


class Asked:
    """A long request to an engine, under way on a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.response: httpx.Response | None = None
        self.error: Exception | None = None
        self.ended = 0.0
        self._thread = threading.Thread(target=self._ask, args=(engine,), daemon=True)
        self._thread.start()
        until("the request runs", lambda: _running(engine), 30)

    def wait(self) -> httpx.Response:
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), f"no answer within {SOON_S:.0f} s"
        assert self.response is not None, self.error
        return self.response

    def _ask(self, engine: Engine) -> None:
        try:
            with httpx.Client(base_url=engine.url, timeout=60, trust_env=False) as client:
                body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": TOKENS, "n": 4, "ignore_eos": True}
                self.response = client.post("/v1/completions", json=body | {"temperature": 1, "detokenize": False})
        except httpx.HTTPError as error:
            self.error = error
        self.ended = time.monotonic()


def _running(engine: Engine) -> bool:
    text = engine.http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return bool(lines) and float(lines[0].split()[-1]) > 0


def test_an_engine_that_ends_leaves_its_session_and_answers_what_it_has_begun(fleet: Fleet) -> None:
    """1. an engine of two is told to end in the middle of a request; 2. the request is answered; 3. a push a moment later succeeds
    at once with the other one, though the first one's lease would live for seconds.
    """
    stays = fleet.start_engine("stays")
    ends = fleet.start_engine("ends")
    trainer = fleet.start_trainer()
    for engine in (stays, ends):
        engine.wait_up()
        until(f"{engine.name} is ready", engine.ready, 60)
    assert trainer.push(1)["replicas"] == ["ends", "stays"]
    asked = Asked(ends)
    ends.process.send_signal(signal.SIGTERM)
    assert asked.wait().status_code == 200
    report = trainer.push(2)
    assert (report["version"], report["replicas"]) == (2, ["stays"])
    ends.process.wait(SOON_S)


def test_a_request_that_an_ending_engine_cannot_finish_is_to_be_asked_again(fleet: Fleet) -> None:
    """vLLM gives it up with the engine's processes and leaves its connection open, until the pod is killed after half a minute."""
    ends = fleet.start_engine("ends", more=("--shutdown-timeout", "0")).wait_up()
    fleet.start_trainer().push(1)
    until("it serves", ends.ready, 60)
    asked = Asked(ends)
    ends.process.send_signal(signal.SIGTERM)
    answer = asked.wait()
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    ends.process.wait(SOON_S)
