"""`python -m weightsync_operator`: run the operator until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import kopf

from weightsync_operator.cluster import Cluster
from weightsync_operator.handlers import operator_settings, register
from weightsync_operator.reconcile import Reconciler
from weightsync_operator.settings import Settings, SettingsError
from weightsync_operator.telemetry import Telemetry
from weightsync_operator.workers import Workers


async def run(settings: Settings) -> None:
    """Serve all namespaces until SIGTERM or SIGINT."""
    async with await Cluster.connect(settings.kubeconfig) as cluster:
        telemetry = Telemetry(on_change=lambda key: workers.poke(key))
        reconciler = Reconciler(cluster, telemetry, settings)
        workers = Workers(reconciler.reconcile)
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        register(registry, reconciler, workers)
        try:
            await kopf.operator(
                registry=registry,
                settings=operator_settings(),
                clusterwide=True,
                standalone=True,
                liveness_endpoint=f"http://0.0.0.0:{settings.liveness_port}/healthz",
            )
        finally:
            await workers.close()
            await telemetry.close()


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, else $KUBECONFIG: the same order as for the operator's own client."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for chatty in ("kopf.objects", "aiohttp.access"):  # every event of every child, every probe of the kubelet
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = Settings.load()
    except SettingsError as error:
        sys.exit(f"weightsync-operator: {error}")
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
