"""Which changes of conditions are worth an event: what breaks, what is well again, and what ends. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.names import Condition, Reason
from weightsync_operator.api.status import ConditionStatus, WeightSyncStatus

NORMAL, WARNING = "Normal", "Warning"

_TOLD: Mapping[tuple[str, str], str] = {
    (Condition.SPEC_VALID, "False"): WARNING,
    (Condition.DEGRADED, "True"): WARNING,
    (Condition.TRANSPORT_VERIFIED, "False"): WARNING,
    (Condition.LEDGER_REACHABLE, "False"): WARNING,
    (Condition.FAILED, "True"): WARNING,
    (Condition.SPEC_VALID, "True"): NORMAL,
    (Condition.AVAILABLE, "True"): NORMAL,
    (Condition.SUSPENDED, "True"): NORMAL,
    (Condition.UPDATE_PENDING, "True"): NORMAL,
    (Condition.COMPLETE, "True"): NORMAL,
}
"""Told whenever the condition comes to this status, or changes its reason in it. Synced is not here: it moves with every push."""
_ENDS: Mapping[tuple[str, str], str] = {
    (Condition.AVAILABLE, "False"): WARNING,
    (Condition.DEGRADED, "False"): NORMAL,
    (Condition.TRANSPORT_VERIFIED, "True"): NORMAL,
    (Condition.LEDGER_REACHABLE, "True"): NORMAL,
    (Condition.SUSPENDED, "False"): NORMAL,
}
"""Told only where the opposite was: a new resource is not available, and nobody has to hear it."""
_OPPOSITE = {"True": "False", "False": "True"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """One event about the resource."""

    condition: str
    type: str
    """Normal or Warning."""
    reason: str
    message: str


def notes(before: Mapping[str, Any], after: WeightSyncStatus) -> tuple[Note, ...]:
    """Events for the step from a status as it stood (camelCase, as stored) to the next one."""
    stood = {c["type"]: (c["status"], c["reason"]) for c in before.get("conditions") or []}
    found = []
    for condition in after.conditions:
        was = stood.get(condition.type, ("", ""))
        if was == (condition.status, condition.reason):
            continue
        now = (condition.type, condition.status)
        type_ = _ENDS.get(now) if was[0] == _OPPOSITE.get(condition.status) else None
        if _is_hidden_restart(condition, after):
            type_ = WARNING
        if (type_ := _TOLD.get(now, type_)) is not None:
            words = condition.message or f"{condition.type} is {condition.status}"
            found.append(Note(condition=condition.type, type=type_, reason=condition.reason, message=words))
    return tuple(found)


def _is_hidden_restart(condition: ConditionStatus, after: WeightSyncStatus) -> bool:
    """A restart of the gang that Degraded does not tell, since torn engines or an aborted push stand before it there."""
    restarts = (condition.type, condition.status, condition.reason) == (
        Condition.PROGRESSING,
        "True",
        Reason.TRAINER_RESTARTING,
    )
    return restarts and all(other.reason != condition.reason for other in after.conditions if other is not condition)
