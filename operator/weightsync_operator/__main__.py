"""`python -m weightsync_operator`: stand by until this operator leads, then work until a signal or a lost Lease ends it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import signal
import socket
import sys
from typing import Any

import kopf

from weightsync_operator.children import Children
from weightsync_operator.cluster import Cluster
from weightsync_operator.fence import Fence
from weightsync_operator.handlers import operator_settings, register
from weightsync_operator.health import alive, serve
from weightsync_operator.leadership import Elector
from weightsync_operator.listing import Listings
from weightsync_operator.logs import configure
from weightsync_operator.metrics import Metrics
from weightsync_operator.plan.errors import OperatorError
from weightsync_operator.reconcile import Reconciler
from weightsync_operator.settings import Settings, SettingsError
from weightsync_operator.startup import crd_is_there
from weightsync_operator.telemetry import Telemetry
from weightsync_operator.workers import Workers

LOST_LEASE_EXIT_CODE = 3
WATCH_ENDED_EXIT_CODE = 4
STALE_AFTER_RETRIES = 5
"""A standby that could not read the Lease so many times in a row is not ready to take over."""


_log = logging.getLogger("weightsync_operator")


class WatchEnded(OperatorError):
    """Kopf watches WeightSyncs no more; a process that goes on would look healthy, and miss every change."""


class Operator:
    """One process: its right to write, whether it works yet, and the order of its start and its end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._fence = Fence(open_until=math.inf if settings.lease is None else -math.inf)
        self._elector: Elector | None = None
        self._metrics = Metrics()
        self._works = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        self._take_signals()
        pages = {"/healthz": alive, "/readyz": self._ready, "/metrics": self._metrics.page}
        async with serve(self._settings.port, pages):
            if self._settings.lease is None:
                await self._work()
                return
            async with await Cluster.connect(self._settings.kubeconfig, user_agent=self._identity) as own:
                self._elector = Elector(own, self._settings.lease, self._identity, self._fence)
                await self._lead(self._elector)

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)

    async def _lead(self, elector: Elector) -> None:
        acquiring = asyncio.create_task(elector.acquire())
        if not await _first(acquiring, self._stop):
            return
        holding = asyncio.create_task(_hold(elector))
        try:
            await self._work()
        finally:
            holding.cancel()
            await elector.release()

    async def _work(self) -> None:
        """Reconcile all resources until a signal."""
        settings = self._settings
        async with await Cluster.connect(settings.kubeconfig, fence=self._fence, user_agent=self._identity) as cluster:
            telemetry = Telemetry(on_change=lambda key: workers.poke(key))
            listings = Listings()
            reconciler = Reconciler(cluster, listings, telemetry, settings, self._metrics)
            workers = Workers(self._metrics.measured(reconciler.reconcile))
            self._metrics.follow(queue_depth=lambda: workers.depth, leads=self._fence.is_open)
            if not await crd_is_there(cluster, self._stop):
                return
            children = Children(
                cluster,
                settings.namespaces,
                listings,
                poke=lambda key: workers.poke(key),
                disrupted=reconciler.note_disruption,
            )
            try:
                async with children:
                    listing = asyncio.create_task(children.listed())
                    if await _first(listing, self._stop):
                        await self._watch(workers)
            finally:
                await workers.close()
                await telemetry.close()

    async def _watch(self, workers: Workers) -> None:
        """Let Kopf watch until a signal. Its end is not waited for: with a hundred resources that took longer than a pod has."""
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        register(registry, workers.poke)
        namespaces = self._settings.namespaces
        watching = asyncio.create_task(
            kopf.operator(
                registry=registry,
                settings=operator_settings(cluster_wide=not namespaces),
                clusterwide=not namespaces,
                namespaces=namespaces,
                standalone=True,
                ready_flag=self._works,
            )
        )
        started = asyncio.create_task(self._works.wait())
        try:
            if await _first(started, self._stop, watching):
                self._take_signals()  # Kopf took them
                await _first(watching, self._stop)
        except Exception as error:
            raise WatchEnded(
                f"the watch of WeightSyncs ended ({error!r}): this operator ends, to be started again"
            ) from error

    def _ready(self) -> tuple[int, str]:
        """/readyz: it works, or could take over at once; a standby that were unready would hold up a rolling update."""
        if self._works.is_set():
            return 200, "leads\n"
        if self._settings.lease is None or self._elector is None:
            return 503, "starts\n"
        silence_s = self._elector.silence_s
        if silence_s > STALE_AFTER_RETRIES * self._settings.lease.retry_s:
            return 503, f"the Lease could not be read for {silence_s:.0f} s\n"
        return 200, "stands by\n"


async def _hold(elector: Elector) -> None:
    """End the process, without a word to anybody, once it may no longer write: there is nothing that it would have to save."""
    try:
        await elector.hold()
    except Exception:
        _log.exception("this is a bug of the operator")
    _log.critical("the Lease is lost: this operator ends, and starts again as a standby")
    logging.shutdown()
    os._exit(LOST_LEASE_EXIT_CODE)


async def _first(task: asyncio.Task[Any], stop: asyncio.Event, other: asyncio.Task[Any] | None = None) -> bool:
    """Wait for `task`, `stop` or `other`. False when `task` did not come first; raises what a task raised."""
    stopping = asyncio.create_task(stop.wait())
    tasks = {task, stopping} if other is None else {task, stopping, other}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for ended in (task, other):
        if ended is not None and ended.done():
            ended.result()
    if not task.done():
        task.cancel()
    return task.done() and not task.cancelled()


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, else $KUBECONFIG: the same order as for the operator's own client."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def main() -> None:
    try:
        settings = Settings.load()
    except SettingsError as error:
        sys.exit(f"weightsync-operator: {error}")
    configure(settings.log_format)
    with asyncio.Runner() as runner:
        try:
            runner.run(Operator(settings).run())
            code = 0
            _log.info("ended")
        except WatchEnded as error:
            code = WATCH_ENDED_EXIT_CODE
            _log.critical("%s", error)
        logging.shutdown()
        os._exit(code)  # whatever of Kopf is still under way only reads


if __name__ == "__main__":
    main()
