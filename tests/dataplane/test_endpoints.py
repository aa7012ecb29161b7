"""Calls to engines keep their connections, survive one that lay idle too long, and end in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from weightsync.endpoints import Endpoints


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        said = self.rfile.read(int(self.headers["content-length"])).decode()
        self.server.heard.append((self.client_address, said, self.headers["authorization"]))  # type: ignore[attr-defined]
        text = b'{"error": {"message": "no"}}' if said == "refuse" else b"{}"
        self.send_response(409 if said == "refuse" else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        self.close_connection = said == "hang up"

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def engine() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        server.heard = []  # type: ignore[attr-defined]
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_second_call_uses_the_first_ones_connection(engine: ThreadingHTTPServer) -> None:
    """1. both come from one port, with the token; 2. an error is told in the engine's words."""
    endpoints, base = Endpoints(token="t"), f"http://127.0.0.1:{engine.server_port}"
    assert endpoints.post(base, "/push", "one", timeout_s=5).ok
    answer = endpoints.post(base, "/push", "refuse", timeout_s=5)
    endpoints.close()
    assert (answer.ok, answer.status, answer.message) == (False, 409, "no")
    (first, said, token), (second, *_) = engine.heard  # type: ignore[attr-defined]
    assert (first, said, token) == (second, "one", "Bearer t")


def test_a_connection_that_the_engine_closed_is_made_anew(engine: ThreadingHTTPServer) -> None:
    """Servers close idle connections after seconds, pushes are minutes apart. Fails when the first error counts."""
    endpoints, base = Endpoints(token="t"), f"http://127.0.0.1:{engine.server_port}"
    for said in ("hang up", "hang up", "three"):
        assert endpoints.post(base, "/push", said, timeout_s=5).ok
    endpoints.close()
    assert [said for _, said, _ in engine.heard] == ["hang up", "hang up", "three"]  # type: ignore[attr-defined]
    assert len({client for client, *_ in engine.heard}) == 3  # type: ignore[attr-defined]


def test_an_engine_that_does_not_answer_is_waited_for_no_longer_than_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints, started = Endpoints(token="t"), time.monotonic()
        with pytest.raises(TimeoutError):
            endpoints.post(f"http://127.0.0.1:{silent.getsockname()[1]}", "/push", "x", timeout_s=0.2)
        endpoints.close()
    assert time.monotonic() - started < 2
