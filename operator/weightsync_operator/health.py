"""What probes and Prometheus ask over HTTP. Imports aiohttp only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

Page = Callable[[], tuple[int, str]]
"""Status and text of an answer."""


def alive() -> tuple[int, str]:
    """/healthz: that anything answers says that the event loop turns, and no more can be mended by a restart."""
    return 200, "ok\n"


@asynccontextmanager
async def serve(port: int, pages: Mapping[str, Page]) -> AsyncIterator[None]:
    """Answer GET of each path on all addresses until the block ends. Raises OSError when the port is taken."""
    app = web.Application()
    for path, page in pages.items():
        app.router.add_get(path, _handler(page))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "0.0.0.0", port).start()
        yield
    finally:
        await runner.cleanup()


def _handler(page: Page) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.Response:
        status, text = page()
        return web.Response(status=status, text=text)

    return answer
