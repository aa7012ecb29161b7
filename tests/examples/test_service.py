"""The trainer's view of the service, against a loopback server that says what a test wants."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from examples.smollm2.service import Service, ServiceUnavailable
from examples.smollm2.task import messages, reward

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Start a server that answers each POST by a function; gives its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status, body = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def choice(text: str, ids: list[int], reason: str = "stop") -> dict[str, Any]:
    return {"message": {"content": text}, "token_ids": ids, "finish_reason": reason}


def ask(url: str, *prompts: str, samples: int = 2):
    return Service(url, timeout_s=10).sample(
        [messages(each) for each in prompts], samples=samples, max_tokens=4, reward=reward
    )


def test_groups_keep_the_order_of_prompts_and_carry_the_sampled_tokens(serve: Callable[[Answer], str]):
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["messages"][-1]["content"]
        assert body["return_token_ids"] and body["temperature"] == 1.0 and body["top_p"] == 1.0
        choices = [choice(prompt.upper(), [n, 2]) for n in range(body["n"])]
        return 200, {"prompt_token_ids": [len(prompt)], "choices": choices}

    groups = ask(serve(answer), "abc", "de", samples=3)
    assert [[answer.text for answer, _ in group] for group in groups] == [["ABC"] * 3, ["DE"] * 3]
    assert [answer.token_ids for answer, _ in groups[0]] == [(0, 2), (1, 2), (2, 2)]
    assert groups[1][0][0].prompt_ids == (2,)
    assert groups[0][0][1] == 1.0


def test_one_engine_that_is_behind_makes_the_whole_sample_unavailable(serve: Callable[[Answer], str]):
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["messages"][-1]["content"] == "b":
            return 503, {"error": {"message": "holds version 3, version 4 is committed"}}
        return 200, {"prompt_token_ids": [1], "choices": [choice("x", [1])]}

    with pytest.raises(ServiceUnavailable, match=r"503: .*holds version 3"):
        ask(serve(answer), "a", "b")


def test_an_aborted_answer_is_not_trained_on(serve: Callable[[Answer], str]):
    aborted = {"prompt_token_ids": [1], "choices": [choice("HALF", [1, 5], reason="abort")]}
    with pytest.raises(ServiceUnavailable, match="aborted"):
        ask(serve(lambda body: (200, aborted)), "a")


def test_nobody_listening_is_unavailable_and_not_a_crash():
    with pytest.raises(ServiceUnavailable, match="ConnectError"):
        ask("http://127.0.0.1:9", "a")


def test_a_refused_request_is_the_trainers_fault_and_is_not_retried(serve: Callable[[Answer], str]):
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        ask(serve(lambda body: (400, {"error": "bad"})), "a")
