"""The status of a resource whose spec this operator cannot read. Pure."""

from __future__ import annotations

from pydantic import ValidationError

from weightsync_operator.api.names import Condition, Reason
from weightsync_operator.api.status import WeightSyncStatus
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.conditions import Verdict, with_verdict

ERRORS_SHOWN = 5


def invalid_spec(resource: Manifest, error: ValidationError, now: float) -> WeightSyncStatus:
    """Everything as it was, with SpecValid=False and the fields' paths; what runs is left as it is."""
    before = WeightSyncStatus.model_validate(resource.get("status") or {})
    verdict = Verdict(False, Reason.SPEC_INVALID, _message(error))
    return with_verdict(before, Condition.SPEC_VALID, verdict, generation=resource["metadata"]["generation"], now=now)


def _message(error: ValidationError) -> str:
    faults = error.errors()
    shown = "; ".join(f"spec.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:ERRORS_SHOWN])
    return f"{shown}; {len(faults)} fault(s) in all"
