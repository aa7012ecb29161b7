"""The status of a resource whose spec this operator cannot even read. Pure."""

from __future__ import annotations

from pydantic import ValidationError

from weightsync_operator.api.names import Condition, Reason
from weightsync_operator.api.status import ConditionStatus, WeightSyncStatus
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.observed import timestamp

ERRORS_SHOWN = 5


def invalid_spec(resource: Manifest, error: ValidationError, now: float) -> WeightSyncStatus:
    """Everything as it was, with SpecValid=False and the fields' paths; what runs is left as it is."""
    before = WeightSyncStatus.model_validate(resource.get("status") or {})
    generation = resource["metadata"]["generation"]
    known = next((condition for condition in before.conditions if condition.type == Condition.SPEC_VALID), None)
    since = known.last_transition_time if known is not None and known.status == "False" else timestamp(now)
    verdict = ConditionStatus(
        type=Condition.SPEC_VALID.value,
        status="False",
        observed_generation=generation,
        last_transition_time=since,
        reason=Reason.SPEC_INVALID.value,
        message=_message(error)[:1024],
    )
    others = tuple(condition for condition in before.conditions if condition.type != Condition.SPEC_VALID)
    return before.model_copy(update={"observed_generation": generation, "conditions": (verdict, *others)})


def _message(error: ValidationError) -> str:
    faults = error.errors()
    shown = "; ".join(f"spec.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:ERRORS_SHOWN])
    return f"{shown}; {len(faults)} fault(s) in all"
