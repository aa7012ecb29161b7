"""Short makers of ledger records with sane defaults, for the ledger's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from weightsync.errors import FencedOut
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Member, PushRecord
from weightsync.wire import Decision, ReplicaStatus


def member(replica: str = "engine-0", **changes: object) -> Member:
    """A member with one rank."""
    fields: dict[str, object] = {
        "replica": replica,
        "url": f"http://{replica}:8000",
        "ranks": 1,
        "incarnation": f"{replica}-first",
        "layout_digests": ("layout",),
    }
    return Member(**(fields | changes))  # type: ignore[arg-type]


def begin(ledger: Ledger, epoch: int, **changes: object) -> PushRecord:
    """Open a push of `epoch`."""
    fields: dict[str, object] = {
        "sequence": 1,
        "step": 0,
        "timeout_s": 60.0,
        "writers": 2,
        "members": {"engine-0": "engine-0-first"},
        "plan_digests": {"layout": "plan"},
    }
    return ledger.begin_push(epoch=epoch, **(fields | changes))  # type: ignore[arg-type]


def commit(ledger: Ledger, epoch: int, **changes: object) -> PushRecord:
    """Open a push of `epoch` and commit it."""
    push = begin(ledger, epoch, **changes)
    verdict = ledger.decide(push.push_id, Decision.COMMIT)
    if verdict.decision is not Decision.COMMIT:
        raise RuntimeError(f"push {push.push_id} was not committed: {verdict.reason}")
    return push


def replica_heartbeat(
    ledger: Ledger,
    current: Callable[[], Member] = member,
    status: Callable[[], ReplicaStatus] | None = None,
    *,
    ttl_s: float,
    on_fenced: Callable[[FencedOut], None] | None = None,
) -> Heartbeat:
    """A replica's heartbeat as the vLLM plug-in makes it: joins each third of its lease under its first `joined_at`."""
    joined_at = 0.0

    def beat() -> None:
        nonlocal joined_at
        joined_at = ledger.join(dataclasses.replace(current(), joined_at=joined_at), ttl_s).joined_at
        if status is not None:
            ledger.publish_replica_status(status())

    return Heartbeat("replica", beat, interval_s=ttl_s / 3, on_fenced=on_fenced)
