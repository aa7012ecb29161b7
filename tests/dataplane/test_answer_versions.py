"""The header that names the weight version of an answer, on vLLM's outputs and ASGI's messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.vllm.versions import LabelledEngine, VersionHeader, watch

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def output(*spans: str, tokens: int = 1) -> Any:
    """One of vLLM's outputs; with spans it is finished."""
    versions = [SimpleNamespace(version=version) for version in spans] or None
    return SimpleNamespace(outputs=[SimpleNamespace(weight_versions=versions, token_ids=[1] * tokens)])


class Engine:
    """Generates what it is given; `current` is the version that it holds."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs, self.current, self.log = outputs, "3", []

    async def generate(self, *_: Any) -> AsyncIterator[Any]:
        for one in self.outputs:
            yield one

    async def update_weight_version(self, version: str) -> None:
        self.log.append(f"label {version}")

    async def resume_generation(self) -> None:
        self.log.append("resume")


async def answered(engine: Engine, *, streams: bool) -> list[dict[str, Any]]:
    """The ASGI messages of a response that the engine's outputs make."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if streams:
            await send(START)
        async for _ in engine.generate():
            if streams:
                await send({"type": "http.response.body", "body": b"data: token\n\n", "more_body": True})
        if streams:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        else:
            await send(START)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    watch(engine, lambda: engine.current)
    await VersionHeader(app)({"type": "http"}, None, send)
    return messages


def header(messages: list[dict[str, Any]]) -> bytes | None:
    return dict(messages[0]["headers"]).get(b"x-weight-version")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("spans", "told"),
    [(("3",), b"3"), (("9", "10"), b"9-10"), (("step-b", "step-a"), b"step-b-step-a"), (("1", "2", "3"), b"1-3")],
)
async def test_a_whole_answer_names_the_versions_of_its_tokens(spans: tuple[str, ...], told: bytes) -> None:
    messages = await answered(Engine(output(*spans)), streams=False)
    assert header(messages) == told
    assert messages[0]["headers"][0] == START["headers"][0]


@pytest.mark.asyncio
async def test_choices_of_several_versions_are_spanned() -> None:
    assert header(await answered(Engine(output("4"), output("5")), streams=False)) == b"4-5"


@pytest.mark.asyncio
async def test_a_stream_names_its_first_token_s_version_and_a_later_one_before_its_end() -> None:
    """Its start is held back until a token is there: a request that waited out a push is of the version after it."""
    messages = await answered(Engine(output(), output("3", "4")), streams=True)
    assert header(messages) == b"3"
    assert messages[-2]["body"] == b": weight-version 3-4\n\ndata: [DONE]\n\n"
    same = await answered(Engine(output(), output("3")), streams=True)
    assert [m["body"] for m in same[1:]] == [b"data: token\n\n"] * 2 + [b"data: [DONE]\n\n", b""]


@pytest.mark.asyncio
async def test_an_answer_that_no_token_was_made_for_names_none() -> None:
    messages = await answered(Engine(output(tokens=0)), streams=False)
    assert messages[0] == START
    assert header(await answered(Engine(), streams=False)) is None


@pytest.mark.asyncio
async def test_an_engine_is_labelled_before_it_goes_on() -> None:
    """The other way round its first tokens would carry the old label."""
    engine, version = Engine(), "7"
    labelled = LabelledEngine(engine, lambda: version)
    await labelled.resume_generation()
    assert engine.log == ["label 7", "resume"]
    assert labelled.current == "3"
