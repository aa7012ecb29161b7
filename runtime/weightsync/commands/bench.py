"""`weightsync bench`: the data path between two processes of one machine, or between two nodes, against what NIXL alone reaches."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import click

from weightsync.config import Contract

HELP = """Measure the data path on your own nodes: wire and conversion, by the code that a push runs.

Without --listen and --connect a second process of this machine is written into. One payload goes through pushes in writes of
several sizes and through plain NIXL streams, in turns; the best stream is what the fabric gives, and the pushes are held
against it. What moved the bytes is told in UCX's own words: set UCX_TLS and friends as your pods have them. Bytes are
checked where they arrive.

\b
Between two nodes:
  node-1$ weightsync bench --listen 0.0.0.0:9999       prints the command for the other node
  node-2$ weightsync bench --connect node-1:9999 --token ...

In pods of a WeightSync, --config $WEIGHTSYNC_CONFIG beside --connect judges what moved the bytes by its fabric. Two processes of
one machine use what shares memory, cuda_ipc or cma, where UCX_TLS lets them.

It takes about twice --payload of memory in the writing process and once in the other, and --seconds a part at most.

\b
Reading it: small writes that are much slower than large ones are the cost of a write; `weightsync inspect` says how many a
push of your model makes, and of which size. `tcp` where you have RDMA means that UCX_TLS, the devices or memlock are wrong.

Exit codes: 0 measured; 1 not, or another fabric than --config wants; 2 the question is wrong.
"""

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class _Bytes(click.ParamType):
    """64K, 16M, 1G, or a number of bytes; several by commas."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(_bytes(word) for word in value.upper().split(","))
        except (ValueError, KeyError):
            self.fail(f"{value!r}: say bytes, or 64K, 16M, 1G; several by commas")


class _Address(click.ParamType):
    """HOST:PORT"""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            self.fail(f"{value!r}: say HOST:PORT")
        return host.strip("[]"), int(port)


@click.command("bench", help=HELP)
@click.option("--listen", type=_Address(), metavar="HOST:PORT", help="Be the engine of a bench on another node.")
@click.option("--connect", type=_Address(), metavar="HOST:PORT", help="Write into the process that listens there.")
@click.option("--token", help="What --listen printed; it makes one up unless it is given.")
@click.option("--device", help="cpu, cuda:0, ...; default the first GPU, else the CPU.")
@click.option("--engine-device", help="Of the second process of this machine; default that of --device.")
@click.option("--payload", type=_Bytes(), default="128M", show_default=True, help="Moved in each turn of each row.")
@click.option("--sizes", type=_Bytes(), default="4K,64K,1M,16M", show_default=True, help="Bytes of a push's writes.")
@click.option("--turns", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rates are their medians.")
@click.option(
    "--seconds", type=click.FloatRange(1, 3600), default=60, show_default=True, help="Fewer turns when they are over."
)
@click.option("--config", type=click.Path(path_type=Path), help="A session's contract, whose fabric judges.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
def command(**options: Any) -> None:
    sys.exit(_run(**options))


def _run(
    *,
    listen: tuple[str, int] | None,
    connect: tuple[str, int] | None,
    token: str | None,
    device: str | None,
    engine_device: str | None,
    payload: tuple[int, ...],
    sizes: tuple[int, ...],
    turns: int,
    seconds: float,
    config: Path | None,
    as_json: bool,
) -> int:
    from weightsync.benchmark import run  # torch: not for --help

    if (listen and connect) or (connect and not token) or len(payload) != 1:
        raise click.UsageError("--listen or --connect, not both; --connect needs --token; one --payload")
    device = device or run.default_device()
    if listen:
        _listen(listen, token or secrets.token_hex(16), device, payload[0])
        return 0
    question = run.Question(
        payload_bytes=payload[0],
        sizes=sizes,
        device=device,
        engine_device=engine_device or device,
        turns=turns,
        seconds=seconds,
        expected=None if config is None else Contract.load({"WEIGHTSYNC_CONFIG": str(config)}).fabric.transports,
    )
    report = run.bench_remote(question, *connect, token or "") if connect else run.bench(question)
    click.echo(json.dumps(report.document()) if as_json else report.text())
    return 0 if report.as_expected else 1


def _listen(address: tuple[str, int], token: str, device: str, limit_bytes: int) -> None:
    from weightsync.benchmark import run

    def tell(port: int) -> None:
        click.echo(f"on the other node:  weightsync bench --connect THIS-NODE:{port} --token {token}", err=True)

    host, port = address
    run.listen(host, port, token=token, device=device, limit_bytes=limit_bytes, told=tell)


def _bytes(word: str) -> int:
    digits = word.rstrip("KMG")
    return int(digits) * _SUFFIXES[word[len(digits) :]]
