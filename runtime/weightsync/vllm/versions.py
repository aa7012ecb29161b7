"""Which weights made an answer: a header on every response that tokens were generated for.

    X-Weight-Version: 7          all tokens are of version 7
    X-Weight-Version: 7-8        a push came between (pauseMode keep, or the native path): the first one's and the last one's

vLLM labels each step of its engine with a weight version, and each finished output with spans of them; its OpenAI responses drop
both. The plug-in sets the labels, and reads the spans from the outputs on their way to the response that they belong to. A streamed
response sends its header before its last token exists: it names the first token's version, and where later ones are of another, the
comment `: weight-version 7-8` precedes `data: [DONE]`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

HEADER = b"x-weight-version"
_DONE = b"data: [DONE]"

_request: ContextVar[Made | None] = ContextVar("weightsync_request", default=None)


class Made:
    """The versions that made the tokens of one HTTP request, as far as they are known."""

    def __init__(self) -> None:
        self._labels: list[str] = []

    def note(self, output: Any, current: str) -> None:
        """Take in a vLLM `RequestOutput`; until it has finished its tokens are of the version that the engine holds now."""
        for completion in output.outputs:
            spans = completion.weight_versions
            labels = [current] if spans is None and completion.token_ids else [span.version for span in spans or ()]
            self._labels += [label for label in labels if label not in self._labels]

    def __str__(self) -> str:
        """One label, or the first and the last; empty when no token was made."""
        numbers = all(label.isdigit() for label in self._labels)
        ordered = sorted(self._labels, key=int) if numbers else self._labels
        return "-".join(dict.fromkeys([*ordered[:1], *ordered[-1:]]))


class LabelledEngine:
    """vLLM's engine client, which labels its outputs with a weight version whenever it goes on generating."""

    def __init__(self, engine: Any, version: Callable[[], str]) -> None:
        self._engine = engine
        self._version = version

    async def resume_generation(self) -> None:
        await self.label()
        await self._engine.resume_generation()

    async def label(self) -> None:
        """Label what is generated from here on; the engine must be paused, or not yet serving."""
        await self._engine.update_weight_version(self._version())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def watch(engine: Any, version: Callable[[], str]) -> None:
    """Note the versions of the outputs of `engine` for the request that is being answered; `version` is the present one."""
    generate = engine.generate

    @functools.wraps(generate)
    async def noting(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        made = _request.get()
        async for output in generate(*args, **kwargs):
            if made is not None:
                made.note(output, version())
            yield output

    engine.generate = noting


class VersionHeader:
    """ASGI middleware: puts on each response what `watch` noted for it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        made = Made()
        token = _request.set(made)
        try:
            await self._app(scope, receive, _Answer(made, send))
        finally:
            _request.reset(token)


class _Answer:
    """`send` of one response: holds its start back until the first bytes of its body are there."""

    def __init__(self, made: Made, send: Any) -> None:
        self._made = made
        self._send = send
        self._start: dict[str, Any] | None = None
        self._told = ""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is not None:
            start, self._start, self._told = self._start, None, str(self._made)
            if self._told:
                start = {**start, "headers": [*start["headers"], (HEADER, self._told.encode())]}
            await self._send(start)
        elif self._told != str(self._made) and message.get("body", b"").startswith(_DONE):
            message = {**message, "body": f": weight-version {self._made}\n\n".encode() + message["body"]}
        await self._send(message)
