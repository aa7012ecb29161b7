"""What a status says while this operator has not read the ledger yet: what the one before it said. Pure.

Else each restart, and each change of the leader, would turn a thousand fleets to Unknown and back, two writes a resource.
"""

from __future__ import annotations

from weightsync_operator.api.names import Condition, Reason
from weightsync_operator.api.status import ConditionStatus, WeightSyncStatus

_FROM_LEDGER = frozenset({Condition.SYNCED, Condition.TRANSPORT_VERIFIED, Condition.LEDGER_REACHABLE})
_LEDGERS_REASONS = frozenset({Reason.PUSH_ABORTED, Reason.ENGINES_DIRTY})


def keep_unread(before: WeightSyncStatus, now: WeightSyncStatus) -> WeightSyncStatus:
    """`now`, made without a view of the ledger, with what the ledger said in `before`; only for the same revision.

    The first answer or error of a poll comes within seconds and is shown then.
    """
    stood = {condition.type: condition for condition in before.conditions}
    read = stood.get(Condition.LEDGER_REACHABLE)
    if before.revision != now.revision or read is None or read.status == "Unknown":
        return now
    inference = now.inference.model_copy(update={"current": min(before.inference.current, now.inference.replicas)})
    conditions = tuple(_kept(condition, stood.get(condition.type)) for condition in now.conditions)
    replicas = before.replicas if before.inference.replicas == now.inference.replicas else now.replicas
    return now.model_copy(update={"conditions": conditions, "inference": inference, "replicas": replicas})


def _kept(now: ConditionStatus, before: ConditionStatus | None) -> ConditionStatus:
    if before is None or now.reason == Reason.SUSPENDED:
        return now
    healthy_unread = now.type == Condition.DEGRADED and now.status == "False" and before.reason in _LEDGERS_REASONS
    if now.type not in _FROM_LEDGER and not healthy_unread:
        return now
    return before.model_copy(update={"observed_generation": now.observed_generation})
