"""The resource: pydantic models of spec and status, one source of truth for the CRD and docs/api.md."""

from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.api.status import WeightSyncStatus

__all__ = ["WeightSyncSpec", "WeightSyncStatus"]
