"""The Kubernetes API as the operator uses it: plain dictionaries over kubernetes.aio. Nothing else knows the client.

Kinds are a table, so that no client class a kind has to be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import aiohttp
from kubernetes.aio import client, config

from weightsync_operator.api.names import API_VERSION, FIELD_MANAGER, KIND, PLURAL
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.errors import OperatorError

REQUEST_TIMEOUT_S = 30.0

RESOURCES: Mapping[str, tuple[str, str]] = {
    "Secret": ("v1", "secrets"),
    "ConfigMap": ("v1", "configmaps"),
    "Service": ("v1", "services"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "Pod": ("v1", "pods"),
    "Deployment": ("apps/v1", "deployments"),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "ControllerRevision": ("apps/v1", "controllerrevisions"),
    "Job": ("batch/v1", "jobs"),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets"),
    KIND: (API_VERSION, PLURAL),
}
"""kind -> (apiVersion, plural)"""


class ApiError(OperatorError):
    """The API server refused a request."""

    def __init__(self, status: int, message: str, body: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.body = body


class ApiUnavailable(OperatorError):
    """The API server did not answer; try again later."""


class Cluster:
    """One connection pool to one API server. Use as an async context manager."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    @classmethod
    async def connect(cls, kubeconfig: str | None) -> Self:
        """With a kubeconfig, or with the pod's service account."""
        configuration = client.Configuration()
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
        return cls(client.ApiClient(configuration))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._api.close()

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """None when it does not exist."""
        try:
            return await self._request("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, selector: str) -> list[Manifest]:
        """All objects with these labels; `kind` is filled in, which a list leaves out."""
        answer = await self._request("GET", _path(kind, namespace), query=[("labelSelector", selector)])
        return [{**item, "apiVersion": RESOURCES[kind][0], "kind": kind} for item in answer["items"]]

    async def apply(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Server-side apply as `FIELD_MANAGER`, taking fields over from others."""
        query = [("fieldManager", FIELD_MANAGER), ("force", "true")] + ([("dryRun", "All")] if dry_run else [])
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata["namespace"], metadata["name"])
        return await self._request(
            "PATCH", path, query=query, body=manifest, content_type="application/apply-patch+yaml"
        )

    async def patch_status(self, namespace: str, name: str, patch: Manifest) -> Manifest:
        """Merge patch of the WeightSync's status; a resourceVersion in it makes a concurrent change a 409."""
        path = _path(KIND, namespace, name) + "/status"
        return await self._request("PATCH", path, body=patch, content_type="application/merge-patch+json")

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str, foreground: bool) -> None:
        """Delete exactly the object `uid`; one that is gone, or is another one by now, is no error."""
        policy = "Foreground" if foreground else "Background"
        body = {"propagationPolicy": policy, "preconditions": {"uid": uid}}
        await self._ignoring((404, 409), "DELETE", _path(kind, namespace, name), body)

    async def evict(self, namespace: str, name: str, *, uid: str) -> None:
        """Ask for an eviction; a budget that refuses it for now (429) is no error."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
            "deleteOptions": {"preconditions": {"uid": uid}},
        }
        await self._ignoring((404, 409, 429), "POST", _path("Pod", namespace, name) + "/eviction", body)

    async def mount_faults(self, namespace: str, pod_uid: str) -> tuple[str, ...]:
        """What the kubelet said about volumes of a pod, oldest first."""
        selector = f"involvedObject.uid={pod_uid},reason=FailedMount"
        answer = await self._request(
            "GET", f"/api/v1/namespaces/{namespace}/events", query=[("fieldSelector", selector)]
        )
        events = sorted(answer["items"], key=lambda event: event.get("lastTimestamp") or "")
        return tuple(event.get("message", "") for event in events)

    async def _ignoring(self, statuses: tuple[int, ...], method: str, path: str, body: Manifest) -> None:
        try:
            await self._request(method, path, body=body)
        except ApiError as error:
            if error.status not in statuses:
                raise

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, str]] | None = None,
        body: Manifest | None = None,
        content_type: str = "application/json",
    ) -> Manifest:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        call = await self._api.param_serialize(
            method, path, query_params=query or [], header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        try:
            response = await self._api.call_api(*call, _request_timeout=REQUEST_TIMEOUT_S)
            raw = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiUnavailable(f"{method} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _error(response.status, raw)
        return json.loads(raw)


def _error(status: int, raw: bytes) -> ApiError:
    try:
        body = json.loads(raw)
        return ApiError(status, str(body.get("message", "")), body)
    except ValueError:
        return ApiError(status, raw.decode(errors="replace")[:500], {})


def _path(kind: str, namespace: str, name: str | None = None) -> str:
    api_version, plural = RESOURCES[kind]
    prefix = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    return f"{prefix}/namespaces/{namespace}/{plural}" + ("" if name is None else f"/{name}")
