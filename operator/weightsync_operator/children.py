"""Follows the children of all resources: one list and one watch a kind, over all namespaces or over each that is served.

Kopf watches the resources themselves. Children are a dozen times as many, and it runs a task, a queue and a memory for each.
A watch goes on where it broke off, and lists anew after any error that the API server names: no change falls into a gap, however
long it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Self

from weightsync_operator.api.names import LABEL_INSTANCE
from weightsync_operator.cluster import ApiError, ApiUnavailable, Cluster
from weightsync_operator.listing import LISTED, OURS, WATCHED, Key, Listings, pack
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.observed import disrupted_job

_log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
MAX_RETRY_S = 30.0
PAUSE_S = 0.1
"""Before a watch that ended goes on."""
GONE = 410
"""What a watch or a list wants to go on from is too old."""


class Children:
    """Watches as long as its block runs; each change goes to `listings`, and to `poke(key)`.

    `disrupted(key, uid)` is told of a trainer's Job whose pod is being evicted, preempted or drained.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespaces: tuple[str, ...],
        listings: Listings,
        *,
        poke: Callable[[Key], None],
        disrupted: Callable[[Key, str], None],
    ) -> None:
        self._follows = [
            _Follow(cluster, kind, namespace, listings, poke, disrupted)
            for kind in LISTED
            for namespace in namespaces or (None,)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(follow.run(), name=f"children {follow.what}") for follow in self._follows]
        return self

    async def listed(self) -> None:
        """Returns once each kind was listed, or could not be: then passes ask for themselves."""
        await asyncio.gather(*(follow.tried.wait() for follow in self._follows))

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Follow:
    """One kind, in one namespace or in all."""

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        namespace: str | None,
        listings: Listings,
        poke: Callable[[Key], None],
        disrupted: Callable[[Key, str], None],
    ) -> None:
        self._cluster, self._kind, self._namespace = cluster, kind, namespace
        self._listings, self._poke, self._disrupted = listings, poke, disrupted
        self._since: str | None = None
        """The resourceVersion up to which everything was seen; None when all has to be listed."""
        self._failures = 0
        """In a row."""
        self._trouble = ""
        self.tried = asyncio.Event()

    @property
    def what(self) -> str:
        return self._kind if self._namespace is None else f"{self._kind} in {self._namespace}"

    async def run(self) -> None:
        """For ever; a kind that is not watched until it was listed."""
        while True:
            try:
                await self._once()
                if self._kind not in WATCHED:
                    return
            except Exception as error:
                self._failed(error)
            self.tried.set()
            pause_s = FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 10) if self._failures else PAUSE_S
            await asyncio.sleep(min(MAX_RETRY_S, pause_s))

    async def _once(self) -> None:
        """One watch to its end, after a list where that is needed."""
        since = await self._list() if self._since is None else self._since
        self.tried.set()
        if self._kind in WATCHED:
            await self._watch(since)
        else:
            self._follows_again()

    async def _list(self) -> str:
        """All of it, page by page; returns where it stands. Whoever has something new is looked at; at the start Kopf pokes all."""
        asked, found, after = self._listings.now(), defaultdict[Key, list[bytes]](list), ""
        while True:
            page = await self._cluster.list_page(self._kind, self._namespace, OURS, after)
            for child in page["items"] or ():
                if (key := _key(child)) is not None:
                    found[key].append(pack(self._kind, child))  # as dictionaries, a thousand renders are 300 MB
                    self._note_disruption(key, child)
            after = page["metadata"].get("continue", "")
            if not after:
                break
        for key in self._listings.fill(self._kind, self._namespace, asked, found):
            if self.tried.is_set():
                self._poke(key)
        self._since = since = str(page["metadata"]["resourceVersion"])
        return since

    async def _watch(self, since: str) -> None:
        """Until the API server ends it. Raises ApiError and ApiUnavailable.

        That it answered is no success yet: an ERROR event may be all that it has to say.
        """
        async with self._cluster.watch(self._kind, self._namespace, OURS, since) as events:
            async for event in events:
                child = event["object"]
                self._since = child["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK" and (key := _key(child)) is not None:
                    self._note_disruption(key, child)
                    self._listings.changed(key, self._kind)
                    self._poke(key)
                self._follows_again()
        self._follows_again()

    def _note_disruption(self, key: Key, child: Manifest) -> None:
        if self._kind == "Pod" and (job_uid := disrupted_job(child)) is not None:
            self._disrupted(key, job_uid)

    def _failed(self, error: Exception) -> None:
        """Passes ask for themselves until changes are told again. Each trouble is told once: an outage may last for hours."""
        self._failures += 1
        self._listings.watched(self._kind, self._namespace, well=False)
        gone = isinstance(error, ApiError) and error.status == GONE
        if not isinstance(error, ApiError | ApiUnavailable):
            _log.error("children: %s: this is a bug of the operator", self.what, exc_info=error)
        elif not gone and str(error) != self._trouble:
            _log.warning("children: %s: %s; tried again until it works", self.what, error)
            self._trouble = str(error)
        if not isinstance(error, ApiUnavailable):
            self._since = None  # whatever was refused, a watch from there may be refused for ever

    def _follows_again(self) -> None:
        self._failures = 0
        self._listings.watched(self._kind, self._namespace, well=True)
        if self._trouble:
            _log.warning("children: %s: followed again", self.what)
        self._trouble = ""


def _key(child: Manifest) -> Key | None:
    """The resource that its labels name."""
    name = child["metadata"].get("labels", {}).get(LABEL_INSTANCE, "")
    return (child["metadata"]["namespace"], name) if name else None
