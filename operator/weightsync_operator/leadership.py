"""One operator works, the others stand by: a Lease that the leader renews, and a fence that closes before it runs out.

Standard library and `cluster.py` only. Not kubernetes' own elector: it trusts the wall clock, and asks nobody before a write.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from weightsync_operator.cluster import ApiError, ApiUnavailable, Cluster
from weightsync_operator.fence import Fence, clock
from weightsync_operator.plan.build.context import Manifest

_log = logging.getLogger(__name__)
_CONFLICT = 409


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaseTerms:
    """Which Lease, and its times; the shares are those of Kubernetes' own controllers (15, 10 and 2 seconds)."""

    namespace: str
    name: str
    duration_s: float = 15.0
    """Others wait so long after the last renewal that they saw."""

    @property
    def renew_within_s(self) -> float:
        """The fence closes so long after the last renewal that succeeded was sent; the rest is for requests under way."""
        return self.duration_s * 2 / 3

    @property
    def retry_s(self) -> float:
        return self.duration_s * 2 / 15


class Elector:
    """One candidate: `acquire`, then `hold` beside the work, then `release`.

    `cluster` must be this elector's own: a renewal that queues behind the operator's requests comes too late.
    """

    def __init__(self, cluster: Cluster, terms: LeaseTerms, identity: str, fence: Fence) -> None:
        self._cluster = cluster
        self._terms = terms
        self._identity = identity
        self._fence = fence
        self._lease: Manifest = {}
        self._renewal_seen: tuple[str, str] = ("", "")
        self._renewal_seen_at = self._answered_at = clock()
        self._trouble = ""

    @property
    def silence_s(self) -> float:
        """Seconds since the API server last answered about the Lease."""
        return clock() - self._answered_at

    async def acquire(self) -> None:
        """Return once this candidate leads, with the fence open."""
        while not await self._told(self._compete):  # noqa: ASYNC110 - another holder's silence is no event
            await asyncio.sleep(self._terms.retry_s)
        _log.info("%s leads by Lease %s", self._identity, self._place)

    async def hold(self) -> None:
        """Renew until the Lease is lost; returns then, and the process has to end."""
        while self._fence.is_open():
            await asyncio.sleep(self._terms.retry_s)
            if not self._fence.is_open():  # this process was stopped meanwhile: others may lead by now
                return
            if not await self._told(self._renew) and self._holder != self._identity:
                return

    async def release(self) -> None:
        """Close the fence, and if it was open let the next candidate lead at once."""
        led = self._fence.is_open()
        self._fence.close()
        if led:
            await self._told(lambda: self._write(holder=""))

    async def _compete(self) -> bool:
        """Take the Lease if nobody holds it, or its holder was not seen to renew it for as long as it lasts."""
        await self._read()
        spec = self._lease.get("spec") or {}
        renewal = (self._holder, spec.get("renewTime") or "")
        if renewal != self._renewal_seen:
            self._renewal_seen, self._renewal_seen_at = renewal, clock()
        lasts_s = spec.get("leaseDurationSeconds") or self._terms.duration_s
        if self._holder and clock() < self._renewal_seen_at + lasts_s:
            return False
        return await self._lead()

    async def _renew(self) -> bool:
        try:
            return await self._lead()
        except ApiError as error:
            if error.status != _CONFLICT:
                raise
        await self._read()  # somebody changed a label, or leads
        return self._holder == self._identity and await self._lead()

    async def _lead(self) -> bool:
        sent_at = clock()
        await self._write(holder=self._identity)
        self._fence.open_until = sent_at + self._terms.renew_within_s
        return True

    async def _read(self) -> None:
        lease = await self._cluster.get("Lease", self._terms.namespace, self._terms.name)
        if lease is None:
            raise ApiError(404, f"Lease {self._place} does not exist; the chart makes it: helm upgrade", {})
        self._lease = lease

    async def _write(self, holder: str) -> bool:
        """Merged into the Lease exactly as it was read, so that two candidates cannot both succeed."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: dict[str, Any] = {"holderIdentity": holder, "renewTime": now}
        if holder != self._holder:
            taken = (self._lease.get("spec") or {}).get("leaseTransitions") or 0
            spec |= {"acquireTime": now, "leaseTransitions": taken + 1}
            spec["leaseDurationSeconds"] = max(1, round(self._terms.duration_s))
        version = self._lease["metadata"]["resourceVersion"]
        patch = {"metadata": {"resourceVersion": version}, "spec": spec}
        self._lease = await self._cluster.merge("Lease", self._terms.namespace, self._terms.name, patch)
        return True

    @property
    def _holder(self) -> str:
        return (self._lease.get("spec") or {}).get("holderIdentity") or ""

    @property
    def _place(self) -> str:
        return f"{self._terms.namespace}/{self._terms.name}"

    async def _told(self, attempt: Callable[[], Awaitable[bool]]) -> bool:
        """False, and a line in the log for each new trouble, when it was refused or not answered within the renewal time."""
        try:
            async with asyncio.timeout(self._terms.renew_within_s / 2):
                done, trouble = await attempt(), ""
            self._answered_at = clock()
        except TimeoutError:
            done, trouble = False, "the API server does not answer"
        except (ApiError, ApiUnavailable) as error:
            done, trouble = False, str(error)
        if trouble and trouble != self._trouble:
            _log.warning("Lease %s: %s", self._place, trouble)
        self._trouble = trouble
        return done
