"""What the operator waits for before it starts.

Kopf can wait for a CRD only where it may watch CRDs; there one that it sees before the API server serves it may be missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from weightsync_operator.cluster import ApiError, ApiUnavailable, Cluster

CRD_PERIOD_S = 2.0

_log = logging.getLogger(__name__)


async def crd_is_there(cluster: Cluster, stop: asyncio.Event) -> bool:
    """Return once the CRD is served; False when `stop` was set before. Each trouble is told once."""
    told: set[str] = set()
    while not stop.is_set():
        try:
            if await cluster.is_served():
                return True
            trouble = "the CRD is not installed: an administrator applies charts/weightsync/files/crd.yaml"
        except (ApiError, ApiUnavailable) as error:
            trouble = f"whether the CRD is installed cannot be read: {error}"
        if trouble not in told:
            _log.warning("%s", trouble)
            told.add(trouble)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), CRD_PERIOD_S)
    return False
