"""A real engine that is told to end while it answers and a trainer pushes: nobody waits for it, and every request is answered."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fixtures.fleet import TOKEN, Engine, Fleet, running_fleet, until
from tests.fixtures.models import make_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.failure_mode(46)]
LONG = ("--max-model-len", "512")
TOKENS = 480
SOON_S = 20.0
"""Less than the 60 s after which clients give up."""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running_fleet(tmp_path, make_tiny_llama(tmp_path / "model")) as fleet:
        yield fleet


class Asked:
    """A call of an engine, under way on a thread of its own."""

    def __init__(self, engine: Engine, path: str, body: dict[str, Any] | None = None) -> None:
        self.ended = 0.0
        self._answer: httpx.Response | Exception | None = None
        self._thread = threading.Thread(target=self._ask, args=(engine, path, body), daemon=True)
        self._thread.start()

    def wait(self) -> httpx.Response:
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), f"no answer within {SOON_S:.0f} s"
        assert isinstance(self._answer, httpx.Response), self._answer
        return self._answer

    def is_over(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _ask(self, engine: Engine, path: str, body: dict[str, Any] | None) -> None:
        try:
            with httpx.Client(base_url=engine.url, timeout=60, trust_env=False) as client:
                self._answer = client.post(path, json=body, headers={"Authorization": f"Bearer {TOKEN}"})
        except httpx.HTTPError as error:
            self._answer = error
        self.ended = time.monotonic()


def ask_for_long(engine: Engine) -> Asked:
    """Four long answers, of which the engine has begun to make the first tokens."""
    body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": TOKENS, "n": 4, "ignore_eos": True, "detokenize": False}
    asked = Asked(engine, "/v1/completions", body)
    until("the request runs", lambda: running(engine), 30)
    return asked


def ask_and_freeze(engine: Engine, core: psutil.Process) -> Asked:
    """A request in whose middle the engine's core stands still; another one where it was over sooner than it was caught."""
    for _ in range(5):
        asked = ask_for_long(engine)
        core.suspend()
        if not asked.is_over(1.0):
            return asked
        core.resume()
    raise AssertionError(f"{TOKENS} tokens were made sooner than the engine was stopped, five times")


def running(engine: Engine) -> bool:
    text = engine.http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return bool(lines) and float(lines[0].split()[-1]) > 0


def connections(engine: Engine) -> int:
    """Of clients with the engine's server."""
    found = psutil.Process(engine.process.pid).net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == engine.port for c in found)


def test_an_engine_that_ends_leaves_its_session_and_answers_what_it_has_begun(fleet: Fleet) -> None:
    """1. an engine of two is told to end in the middle of a request; 2. a new request is refused, on a connection that is closed;
    3. a push takes one attempt, with the other engine alone, though a lease lives for seconds; 4. the old request is answered.
    """
    stays = fleet.start_engine("stays")
    ends = fleet.start_engine("ends", more=LONG)
    trainer = fleet.start_trainer()
    for engine in (stays, ends):
        engine.wait_up()
        until(f"{engine.name} is ready", engine.ready, 60)
    assert trainer.push(1)["replicas"] == ["ends", "stays"]
    asked, told = ask_for_long(ends), time.monotonic()
    ends.process.send_signal(signal.SIGTERM)
    refused = until("requests are refused", lambda: (r := ends.complete([1])).status_code == 503 and r, 10)
    assert refused.headers["connection"] == "close"
    assert "ending" in refused.json()["error"]["message"]
    report = trainer.push(2)
    assert (report["version"], report["replicas"]) == (2, ["stays"])
    assert asked.wait().status_code == 200
    assert asked.ended > told
    ends.process.wait(SOON_S)


def test_what_an_ending_engine_cannot_answer_is_answered_all_the_same(fleet: Fleet) -> None:
    """1. an engine's core stands still in the middle of a request and of a call of ours; 2. vLLM gives it no time, and kills it;
    3. both are answered, and the server ends. vLLM would leave them open until the pod is killed.
    """
    ends = fleet.start_engine("ends", more=(*LONG, "--shutdown-timeout", "0")).wait_up()
    fleet.start_trainer().push(1)
    until("it serves", ends.ready, 60)
    core = next(child for child in psutil.Process(ends.process.pid).children() if "EngineCore" in child.name())
    asked = ask_and_freeze(ends, core)
    before = connections(ends)
    called = Asked(ends, "/weightsync/v1/verify")
    until("the call is there", lambda: connections(ends) > before, 10)
    assert ends.ready()  # the loop that answers this has met the call before
    ends.process.send_signal(signal.SIGTERM)
    answer = asked.wait()
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert called.wait().status_code >= 500
    ends.process.wait(SOON_S)
