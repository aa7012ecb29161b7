"""`python -m weightsync.tlsforward`: a plain port of this pod alone, carried to a Redis that speaks TLS.

Runs beside ModelExpress, whose Redis client speaks none. Standard library only, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import ssl
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
CHUNK_BYTES = 65_536

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def forward(*, listen: int, host: str, port: int, ca: Path | None) -> None:
    """Carry each connection to 127.0.0.1:`listen` on to `host`:`port` by TLS, until cancelled.

    The certificate must name `host` and be signed by `ca` (PEM, read at each connection: it is renewed in place), or by an
    authority of the system when that is None. A connection that cannot be carried is closed, and the log says why.
    Raises OSError when the port to listen at is taken.
    """

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far = await asyncio.open_connection(host, port, ssl=ssl.create_default_context(cafile=ca))
        except (OSError, TimeoutError) as error:  # a certificate that is refused is an OSError too
            _log.warning("%s:%d: %s", host, port, error or f"no connection in {CONNECT_TIMEOUT_S:g} s")
            writer.close()
            return
        await _both_ways((reader, writer), far)

    async with await asyncio.start_server(carry, "127.0.0.1", listen) as server:
        await server.serve_forever()


async def _both_ways(near: Stream, far: Stream) -> None:
    """Until one side ends: a client of Redis that hangs up waits for no answer, and nothing follows a Redis that does."""
    ways = [asyncio.create_task(_copy(near[0], far[1])), asyncio.create_task(_copy(far[0], near[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for _, writer in (near, far):
            writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while chunk := await source.read(CHUNK_BYTES):
        target.write(chunk)
        await target.drain()


async def _until_sigterm(options: argparse.Namespace) -> None:
    """PID 1 has no default for SIGTERM: without a handler the pod would wait out its grace period."""
    task = asyncio.create_task(
        forward(listen=options.listen, host=options.host, port=options.port, ca=options.ca), name="forward"
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        _log.info("ends")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m weightsync.tlsforward", description=__doc__)
    parser.add_argument("--listen", type=int, required=True, help="port of 127.0.0.1")
    parser.add_argument("--host", required=True, help="which the certificate must name")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ca", type=Path, help="PEM of whom to trust; default the system's authorities")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_until_sigterm(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
