"""WeightSync's runtime: converts a trainer's sharded weights and pushes them with NIXL into live engines.

Trainers use the names below; everything else is reached through its module. Importing the package is cheap (no torch, no
NIXL), because the operator imports `weightsync.wire` from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsync.errors import PushAborted, WeightSyncError
    from weightsync.publisher import Publisher, PushReport

__all__ = ["Publisher", "PushAborted", "PushReport", "WeightSyncError"]

_HOMES = {
    "Publisher": "weightsync.publisher",
    "PushReport": "weightsync.publisher",
    "PushAborted": "weightsync.errors",
    "WeightSyncError": "weightsync.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weightsync' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
