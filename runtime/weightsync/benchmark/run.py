"""One bench from beginning to end: with a process of its own as the engine, or with one on another node.

Whoever listens is written into. A token keeps strangers out; what they tell each other is in clear text. Imports the transport.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence

import torch

from weightsync.benchmark.conversion import measure_conversion
from weightsync.benchmark.engine import ANSWER_S, device_name, serve
from weightsync.benchmark.report import Report
from weightsync.benchmark.wire import measure_wire
from weightsync.channel import Channel
from weightsync.errors import ConfigError, RendezvousUnavailable, TransportError
from weightsync.waiting import Deadline

LISTEN_S = 600.0
CPU_CONVERSION_BYTES = 64 << 20
"""What a CPU converts at most in a turn: its FP8 reference takes a second for that."""
_JOIN_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What to measure. Checks itself: raises ConfigError."""

    payload_bytes: int
    sizes: Sequence[int]
    """Bytes of a write."""
    device: str
    engine_device: str
    turns: int
    seconds: float
    """How long to measure; what has begun by then is finished."""
    expected: Sequence[str] | None = None

    def __post_init__(self) -> None:
        whole = self.payload_bytes
        odd = [size for size in self.sizes if size % 2 or not 0 < size <= whole or whole % size]
        if odd or not self.sizes:
            raise ConfigError(
                f"--sizes {', '.join(map(str, odd)) or '(none)'}: each must be even and divide --payload, {whole} bytes"
            )
        for device in (self.device, self.engine_device):
            check_device(device)


def check_device(device: str) -> None:
    """Raise ConfigError unless this process can use it."""
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"device {device}: this process sees {torch.cuda.device_count()} GPUs; there is cpu")


def default_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def bench(question: Question) -> Report:
    """Both processes on this machine. Raises TransportError and what `measure_wire` raises."""
    with _engine_process(question) as channel:
        return _drive(channel, question)


def bench_remote(question: Question, address: str, port: int, token: str) -> Report:
    """Write into the process that listens there. Raises RendezvousUnavailable when none does."""
    with contextlib.closing(Channel.connect(address, port, token, Deadline(ANSWER_S))) as channel:
        return _drive(channel, question)


def listen(
    address: str, port: int, *, token: str, device: str, limit_bytes: int, told: Callable[[int], object]
) -> None:
    """Be written into by the first that comes with the token. `told` hears the port once it is open.

    Raises RendezvousUnavailable when none comes within LISTEN_S, TransportError when it leaves too early.
    """
    check_device(device)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server:
        told(server.getsockname()[1])
        with contextlib.closing(_await(server, token, Deadline(LISTEN_S), lambda: True)) as channel:
            serve(channel, device, limit_bytes)


def _drive(channel: Channel, question: Question) -> Report:
    if question.device != "cpu":
        torch.cuda.set_device(question.device)
    deadline = Deadline(question.seconds)
    wire = measure_wire(
        channel,
        payload_bytes=question.payload_bytes,
        sizes=question.sizes,
        device=question.device,
        turns=question.turns,
        deadline=deadline,
    )
    limit = question.payload_bytes if question.device != "cpu" else CPU_CONVERSION_BYTES
    converted = min(question.payload_bytes, limit)
    rates = measure_conversion(
        source_bytes=converted, device=question.device, turns=question.turns, deadline=Deadline(question.seconds)
    )
    return Report(
        payload_bytes=question.payload_bytes,
        turns=question.turns,
        device=device_name(question.device),
        wire=wire,
        conversion=rates,
        expected=question.expected,
    )


@contextlib.contextmanager
def _engine_process(question: Question) -> Iterator[Channel]:
    """A child that is written into; it is gone afterwards, whatever happens."""
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = (server.getsockname()[1], token, question.engine_device, question.payload_bytes)
        # Not a fork: a process that has used CUDA or UCX cannot be forked.
        child = multiprocessing.get_context("spawn").Process(target=_be_engine, args=arguments, daemon=True)
        child.start()
        try:
            with contextlib.closing(_await(server, token, Deadline(2 * ANSWER_S), child.is_alive)) as channel:
                yield channel
        finally:
            child.join(_JOIN_S)
            child.kill()
            child.join()


def _be_engine(port: int, token: str, device: str, limit_bytes: int) -> None:
    channel = Channel.connect("127.0.0.1", port, token, Deadline(ANSWER_S))
    with contextlib.suppress(TransportError):  # the other side tells what went wrong
        serve(channel, device, limit_bytes)


def _await(server: socket.socket, token: str, deadline: Deadline, may_come: Callable[[], bool]) -> Channel:
    while not deadline.passed and may_come():
        channel = Channel.accept(server, token, deadline)
        if channel is not None:
            return channel
    raise RendezvousUnavailable(f"the other process of the bench did not come within {deadline.timeout_s:.0f} s")
