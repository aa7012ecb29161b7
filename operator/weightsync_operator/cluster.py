"""The Kubernetes API as the operator uses it: plain dictionaries over kubernetes.aio. Nothing else knows the client.

Kinds are a table, so that no client class a kind has to be loaded.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any, Self

import aiohttp
from kubernetes.aio import client, config

from weightsync_operator.api.names import API_VERSION, FIELD_MANAGER, KIND, PLURAL
from weightsync_operator.fence import Fence
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.errors import OperatorError

REQUEST_TIMEOUT_S = 30.0
PAGE = 200
"""Objects that a page of a list has: some megabytes, which are parsed in tens of milliseconds."""
WATCH_S = 600.0
"""A watch lasts half of it to all of it, so that not all of them begin anew at once."""

SILENCE_S = 150.0
"""A watch that hears nothing for so long is begun anew: the API server sends a bookmark each minute, a lost peer nothing."""
_TIMEOUT = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)

RESOURCES: Mapping[str, tuple[str, str]] = {
    "Secret": ("v1", "secrets"),
    "ConfigMap": ("v1", "configmaps"),
    "Service": ("v1", "services"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "Pod": ("v1", "pods"),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims"),
    "Deployment": ("apps/v1", "deployments"),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "ControllerRevision": ("apps/v1", "controllerrevisions"),
    "Job": ("batch/v1", "jobs"),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets"),
    "Event": ("v1", "events"),
    "Lease": ("coordination.k8s.io/v1", "leases"),
    "ResourceClaimTemplate": ("resource.k8s.io/v1", "resourceclaimtemplates"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
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

    @property
    def namespace_ends(self) -> bool:
        """Whether it was refused because its namespace is being deleted, where nothing new can be made."""
        causes = (self.body.get("details") or {}).get("causes") or ()
        return any(cause.get("reason") == "NamespaceTerminating" for cause in causes)


class ApiUnavailable(OperatorError):
    """The API server did not answer; try again later."""


class Cluster:
    """One connection pool to one API server. Use as an async context manager."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    @classmethod
    async def connect(
        cls,
        kubeconfig: str | None,
        *,
        context: str | None = None,
        fence: Fence | None = None,
        user_agent: str = "weightsync",
    ) -> Self:
        """With a kubeconfig, or with the pod's service account; `fence` is asked before each request that changes something."""
        configuration = client.Configuration()
        configuration.connection_pool_maxsize = (
            0  # no limit: watches hold one each, and passes have a limit of their own
        )
        if fence is not None:
            configuration.trace_configs = [_asking(fence)]  # type: ignore[attr-defined] # read by the client's session
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(config_file=kubeconfig, context=context, client_configuration=configuration)
        api = client.ApiClient(configuration)
        api.user_agent = user_agent
        return cls(api)

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
        """All objects with these labels; `kind` is filled in, which a list leaves out. None of a kind that is not known."""
        try:
            answer = await self._request("GET", _path(kind, namespace), query=[("labelSelector", selector)])
        except ApiError as error:
            if error.status != 404:
                raise
            return []
        return [{**item, "apiVersion": RESOURCES[kind][0], "kind": kind} for item in answer["items"] or ()]

    async def list_page(self, kind: str, namespace: str | None, selector: str, after: str) -> Manifest:
        """A page of all objects with these labels, in one namespace or in all, as the API server answers: `items` may be null.

        `after` is `metadata.continue` of the page before, or empty. ApiError 410: that one is too old, begin again.
        """
        query = [("labelSelector", selector), ("limit", str(PAGE)), ("continue", after)]
        return await self._request("GET", _path(kind, namespace), query=query if after else query[:2])

    @contextlib.asynccontextmanager
    async def watch(
        self, kind: str, namespace: str | None, selector: str, since: str
    ) -> AsyncGenerator[AsyncIterator[Manifest]]:
        """Events after resourceVersion `since`, bookmarks among them, until the API server ends them.

        Raises ApiError (410: `since` is too old, list again) and ApiUnavailable, on entry and while events are read.
        """
        lasts_s = WATCH_S * random.uniform(0.5, 1.0)
        query = [("labelSelector", selector), ("watch", "true"), ("allowWatchBookmarks", "true")]
        query += [("resourceVersion", since), ("timeoutSeconds", f"{lasts_s:.0f}")]
        timeout = aiohttp.ClientTimeout(total=lasts_s + REQUEST_TIMEOUT_S, sock_read=SILENCE_S)
        path = _path(kind, namespace)
        with _unavailable(f"watch of {path}"):
            response = await self._call("GET", path, query=query, timeout=timeout)
            try:
                if response.status >= 400:
                    raise _error(response.status, await response.read())
                yield _events(response)
            finally:
                response.close()

    async def is_served(self) -> bool:
        """Whether the CRD is installed; everybody may ask that."""
        try:
            await self._request("GET", f"/apis/{API_VERSION}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def nodes(self) -> list[Manifest]:
        """All nodes of the cluster. Raises ApiError with status 403 where the operator may not read them."""
        return (await self._request("GET", "/api/v1/nodes"))["items"]

    async def apply(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Server-side apply as `FIELD_MANAGER`, taking fields over from others."""
        query = [("fieldManager", FIELD_MANAGER), ("force", "true")] + ([("dryRun", "All")] if dry_run else [])
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata["namespace"], metadata["name"])
        return await self._request(
            "PATCH", path, query=query, body=manifest, content_type="application/apply-patch+yaml"
        )

    async def create(self, manifest: Manifest) -> Manifest:
        """An object that must not be there yet: 409 when it is."""
        return await self._request("POST", _path(manifest["kind"], manifest["metadata"]["namespace"]), body=manifest)

    async def patch_resource(self, namespace: str, name: str, patch: Manifest) -> None:
        """Merge patch of a WeightSync's metadata; one that is gone meanwhile is no error, one that changed is a 409."""
        path = _path(KIND, namespace, name)
        await self._ignoring((404,), "PATCH", path, patch, content_type="application/merge-patch+json")

    async def patch_status(self, namespace: str, name: str, patch: Manifest) -> Manifest:
        """Merge patch of the WeightSync's status; a resourceVersion in it makes a concurrent change a 409."""
        return await self.merge(KIND, namespace, name, patch, subresource="/status")

    async def merge(self, kind: str, namespace: str, name: str, patch: Manifest, *, subresource: str = "") -> Manifest:
        """Merge patch; a resourceVersion in it makes a concurrent change a 409."""
        path = _path(kind, namespace, name) + subresource
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

    async def _ignoring(
        self, statuses: tuple[int, ...], method: str, path: str, body: Manifest, content_type: str = "application/json"
    ) -> None:
        try:
            await self._request(method, path, body=body, content_type=content_type)
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
        with _unavailable(f"{method} {path}"):
            response = await self._call(method, path, query=query, body=body, content_type=content_type)
            raw = await response.read()
        if response.status >= 400:
            raise _error(response.status, raw)
        return json.loads(raw)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, str]] | None = None,
        body: Manifest | None = None,
        content_type: str = "application/json",
        timeout: aiohttp.ClientTimeout = _TIMEOUT,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        call = await self._api.param_serialize(
            method, path, query_params=query or [], header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        return (await self._api.call_api(*call, _request_timeout=timeout)).response


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Manifest]:
    async for line in response.content:
        event = json.loads(line)
        if event["type"] == "ERROR":
            raise ApiError(event["object"].get("code", 500), event["object"].get("message", ""), event)
        yield event


@contextlib.contextmanager
def _unavailable(what: str) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ApiUnavailable(f"{what}: {error or type(error).__name__}") from error


def _asking(fence: Fence) -> aiohttp.TraceConfig:
    """Ask the fence when a request has its connection and its first byte comes next: waiting for one can take long."""
    trace = aiohttp.TraceConfig()

    async def note_method(_: aiohttp.ClientSession, ctx: Any, params: aiohttp.TraceRequestStartParams) -> None:
        ctx.changes = params.method != "GET"

    async def ask(_: aiohttp.ClientSession, ctx: Any, params: object) -> None:
        if ctx.changes:
            fence.check()

    trace.on_request_start.append(note_method)
    trace.on_connection_create_end.append(ask)
    trace.on_connection_reuseconn.append(ask)
    return trace


def _error(status: int, raw: bytes) -> ApiError:
    try:
        body = json.loads(raw)
        return ApiError(status, str(body.get("message", "")), body)
    except ValueError:
        return ApiError(status, raw.decode(errors="replace")[:500], {})


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    """Of one object, of all in a namespace, or of all."""
    api_version, plural = RESOURCES[kind]
    prefix = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    place = "" if namespace is None else f"/namespaces/{namespace}"
    return f"{prefix}{place}/{plural}" + ("" if name is None else f"/{name}")
