"""The part of kubelets that says how pods fare, for thousands of pods that nobody runs. Imports aiohttp and names only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from e2e.lab.bareapi import BareApiServer
from weightsync_operator.api.names import LABEL_COMPONENT, LABEL_MANAGED_BY, MANAGED_BY, Component

SELECTOR = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
PATCHES_AT_ONCE = 32
MERGE = {"Content-Type": "application/merge-patch+json"}


@contextlib.asynccontextmanager
async def administrator(server: BareApiServer) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with the administrator's token; paths are relative to the server."""
    tls = ssl.create_default_context(cafile=str(server.ca_path))
    headers = {"Authorization": f"Bearer {server.token}"}
    connector = aiohttp.TCPConnector(ssl=tls, limit=PATCHES_AT_ONCE + 8)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
    async with aiohttp.ClientSession(server.url, headers=headers, connector=connector, timeout=timeout) as session:
        yield session


class FleetKubelet:
    """Every pod of the operator's turns ready as soon as it is there; preflight pods end with a yes."""

    def __init__(self, api: aiohttp.ClientSession) -> None:
        self._api = api
        self._slots = asyncio.Semaphore(PATCHES_AT_ONCE)
        self._known: set[str] = set()
        self._patches: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled; a watch that ends is begun anew."""
        while True:
            async with self._api.get("/api/v1/pods", params={"labelSelector": SELECTOR}) as answer:
                listed = await answer.json()
            for pod in listed["items"] or ():  # null when there is none
                self._see(pod)
            await self._watch(listed["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> None:
        query = {"labelSelector": SELECTOR, "watch": "1", "resourceVersion": version}
        async with self._api.get("/api/v1/pods", params=query) as answer:
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                if event["type"] != "DELETED":
                    self._see(event["object"])

    def _see(self, pod: Mapping[str, Any]) -> None:
        if pod["metadata"]["uid"] not in self._known:
            self._known.add(pod["metadata"]["uid"])
            task = asyncio.create_task(self._answer(pod))
            self._patches.add(task)
            task.add_done_callback(self._patches.discard)

    async def _answer(self, pod: Mapping[str, Any]) -> None:
        place = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}/status"
        asked = pod["metadata"]["labels"].get(LABEL_COMPONENT) == Component.PREFLIGHT
        status = _passed(pod["spec"]["containers"][0]["name"]) if asked else _ready()
        async with self._slots, self._api.patch(place, data=json.dumps({"status": status}), headers=MERGE) as answer:
            if answer.status not in (200, 404):
                raise RuntimeError(f"{place}: {answer.status} {await answer.text()}")


def _ready() -> dict[str, Any]:
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"phase": "Running", "conditions": [ready]}


def _passed(container: str) -> dict[str, Any]:
    ended = {"exitCode": 0, "message": json.dumps({"ok": True, "errors": []}), "reason": "Completed"}
    state = {"name": container, "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
    return {"phase": "Succeeded", "containerStatuses": [{**state, "state": {"terminated": ended}}]}
