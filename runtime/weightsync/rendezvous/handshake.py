"""Handshake of one push beyond its decision: who is ready to write, the word to go, what each replica applied.

A part of `Ledger`; imports no client of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from weightsync.rendezvous.pushes import PushLedger
from weightsync.telemetry import Span, spans_of
from weightsync.wire import JsonRecord, Keys, PushSummary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Applied(JsonRecord):
    """A replica serves the version of a committed push."""

    replica: str
    digest: str
    """Hexadecimal, of live memory before it served; one a rank, joined by `+`."""
    pause_seconds: float
    """From the request to pause until generation went on."""
    copy_seconds: float = 0.0
    """Of that, what the slowest rank's device copy took in a staged commit; 0 in place."""
    spans: tuple[Span, ...] = ()
    """Its pause, open, apply and resume."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", spans_of(self.spans))


class HandshakeLedger(PushLedger):
    """The part of the ledger by which the processes of one push keep step."""

    def report_planned(self, push_id: str, rank: int, group: str) -> bool:
        """A trainer rank has planned its writes and will convert. False when the ledger does not know the push.

        group: in which push the ranks with which it can exchange FP8 scales met; empty when it has to meet them.
        """
        return self._add_to_push(push_id, f"planned:{rank}", group)

    def planned(self, push_id: str, world_size: int) -> dict[int, str]:
        """What trainer ranks that have planned said of their group."""
        said = self._push_fields(push_id, tuple(f"planned:{rank}" for rank in range(world_size))).values()
        return {rank: group for rank, group in enumerate(said) if group is not None}

    def report_ready(self, push_id: str, rank: int) -> bool:
        """A trainer rank has prepared its writes. False when the ledger does not know the push."""
        return self._add_to_push(push_id, f"ready:{rank}", "1")

    def release_writers(self, push_id: str, replicas: Iterable[str]) -> bool:
        """These replicas are open: the writers may begin, with them only. False when the ledger does not know the push."""
        return self._add_to_push(push_id, "go", json.dumps(sorted(replicas)))

    def ready(self, push_id: str) -> frozenset[int]:
        """Trainer ranks whose bytes are converted and whose writes are prepared."""
        return self._ranks_at(push_id, "ready:")

    def released(self, push_id: str) -> frozenset[str] | None:
        """The replicas into which writers may write; None while they may not begin."""
        text = self._push_fields(push_id, ("go",))["go"]
        return None if text is None else frozenset(json.loads(text))

    def report_applied(self, push_id: str, applied: Applied) -> bool:
        """A replica serves the push. False when the ledger does not know the push."""
        return self._add_to_push(push_id, f"applied:{applied.replica}", applied.to_json())

    def applied(self, push_id: str) -> dict[str, Applied]:
        """What the replicas applied, by name."""
        return {applied.replica: applied for applied in self._read_from_push(push_id, "applied:", Applied.from_json)}

    def summary(self, push_id: str) -> PushSummary | None:
        """The account of a push that ended; None until there is one."""
        text = self._push_fields(push_id, ("summary",))["summary"]
        return None if text is None else PushSummary.from_json(text)

    def _ranks_at(self, push_id: str, prefix: str) -> frozenset[int]:
        names: Any = self._call("read push", lambda client: client.hkeys(Keys(self.session).push(push_id)))
        return frozenset(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))
