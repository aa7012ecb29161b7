"""A reconciler in the test's own process, driven pass by pass against a real API server."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.controlplane.builders import DEFAULTS, KEY
from tests.controlplane.kube import Kube
from tests.fixtures.servers import free_port
from weightsync_operator.cluster import ApiError, Cluster
from weightsync_operator.listing import WATCHED, Listings
from weightsync_operator.metrics import Metrics
from weightsync_operator.reconcile import Reconciler
from weightsync_operator.settings import Settings
from weightsync_operator.telemetry import Telemetry


class CountingCluster(Cluster):
    """Notes every request that changes something."""

    changes: list[tuple[str, str]]

    async def _request(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        if method != "GET":
            self.changes.append((method, path))
        return await super()._request(method, path, **kwargs)


@dataclasses.dataclass
class DrivenOperator:
    """A reconciler that is driven pass by pass."""

    reconciler: Reconciler
    listings: Listings
    cluster: CountingCluster
    key: tuple[str, str]

    async def one_pass(self) -> float | None:
        """A pass; one that came upon a change of somebody else is to be repeated at once.

        Nothing is watched here, so anything may have changed.
        """
        for kind in WATCHED:
            self.listings.changed(self.key, kind)
        try:
            return await self.reconciler.reconcile(self.key)
        except ApiError as error:
            if error.status != 409:
                raise
            return 0.0

    async def settle(self, passes: int = 40) -> None:
        """Pass after pass until one asks for nothing soon and changed nothing."""
        for _ in range(passes):
            before = len(self.cluster.changes)
            wait_s = await self.one_pass()
            if wait_s is None or (wait_s > 1 and len(self.cluster.changes) == before):
                return
        raise AssertionError(f"not settled after {passes} passes; last changes: {self.cluster.changes[-5:]}")


def drive(
    kubeconfig: Path,
    kube: Kube,
    play: Callable[[DrivenOperator], Awaitable[None]],
    runtime_image: str = "",
    namespaces: tuple[str, ...] = (),
) -> None:
    async def scenario() -> None:
        defaults = dataclasses.replace(DEFAULTS, runtime_image=runtime_image or DEFAULTS.runtime_image)
        address = f"127.0.0.1:{free_port()}"
        settings = Settings(defaults=defaults, operator_key=KEY, ledger_address=address, namespaces=namespaces)
        async with await CountingCluster.connect(str(kubeconfig)) as cluster:
            cluster.changes = []
            telemetry = Telemetry(on_change=lambda key: None)
            listings = Listings()
            reconciler = Reconciler(cluster, listings, telemetry, settings, Metrics())
            operator = DrivenOperator(reconciler, listings, cluster, (kube.namespace, "ws"))
            try:
                await play(operator)
            finally:
                await telemetry.close()

    asyncio.run(scenario())
