"""Transfers of one payload to one peer, taking turns: plain NIXL streams in several manners, the best of which is the roof.

A plain stream has nothing around NIXL: one buffer to one buffer. Imports the transport; `bench.push` uses it too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from weightsync.errors import DeadlineExceeded, TransportError
from weightsync.reception import NOTIFICATION_POLL_S
from weightsync.transport import Agent, Region, TransferState
from weightsync.waiting import Deadline
from weightsync.writer import TRANSFER_POLL_S

MIB = 1 << 20


class Manner(NamedTuple):
    """What a plain stream varies."""

    descriptor_bytes: int | None
    """None for one descriptor."""
    pause_s: float | None
    """Between two looks of the receiving process, while the sending one pauses too; None: neither pauses."""


PLAIN = {
    "one descriptor, polled without a pause": Manner(None, None),
    "one descriptor, polled with pauses": Manner(None, NOTIFICATION_POLL_S),
    "descriptors of 4 MiB, polled without a pause": Manner(4 * MIB, None),
    "descriptors of 4 MiB, polled with pauses": Manner(4 * MIB, NOTIFICATION_POLL_S),
    "descriptors of 64 MiB, polled with pauses": Manner(64 * MIB, NOTIFICATION_POLL_S),
}


def plain_stream(
    agent: Agent, peer: str, local: Region, remote: Region, manner: Manner, timeout_s: float
) -> Callable[[], None]:
    """Prepare one transfer of all of `local` to `remote`, of one length; what is returned moves it once.

    That raises DeadlineExceeded after timeout_s, with bytes in flight, and TransportError when NIXL fails.
    """
    length = manner.descriptor_bytes or local.length_bytes
    transfer = agent.prepare(peer, _cut(local, length), _cut(remote, length))

    def move() -> None:
        deadline = Deadline(timeout_s)
        transfer.post()
        while transfer.in_flight:
            if deadline.passed:
                raise DeadlineExceeded(f"{local.length_bytes} bytes to {peer} are in flight after {timeout_s:.0f} s")
            if manner.pause_s is not None:
                time.sleep(TRANSFER_POLL_S)
        if transfer.poll() is TransferState.FAILED:
            raise TransportError(f"a plain stream to {peer} failed: {transfer.failure}")

    return move


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    deadline: Deadline | None = None,
    before: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Median seconds of each run over so many turns of all; one turn before them is not counted.

    So what else the machine does falls on all alike. `before` is called with a run's name before its clock starts. Past the
    deadline the turn is finished and the rest left out, but for the first that counts.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        if turn > 1 and deadline is not None and deadline.passed:
            break
        for name, run in runs.items():
            before(name)
            started = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def _cut(region: Region, length: int) -> list[Region]:
    whole = region.length_bytes
    return [
        dataclasses.replace(region, address=region.address + at, length_bytes=min(length, whole - at))
        for at in range(0, whole, length)
    ]
