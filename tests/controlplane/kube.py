"""A test's own hands on a real API server: plain requests, kubectl, and the part of a kubelet that says how pods fare."""

from __future__ import annotations

import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from e2e.lab.bareapi import BareApiServer
from weightsync_operator.api.names import API_VERSION, LABEL_COMPONENT, LABEL_INSTANCE, PLURAL, Component

T = TypeVar("T")
TIMEOUT_S = 60.0
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
WEIGHTSYNCS = f"/apis/{API_VERSION}/namespaces/{{}}/{PLURAL}"


def wait_until(what: str, fetch: Callable[[], T], met: Callable[[T], bool], timeout_s: float = TIMEOUT_S) -> T:
    """The first value that meets it. Raises AssertionError with the last value at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = fetch()
        if met(value):
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not so after {timeout_s:.0f} s; last seen: {value!r}")
        time.sleep(0.1)


class Kube:
    """One namespace of the API server, as its administrator."""

    def __init__(self, server: BareApiServer, namespace: str, kubectl: tuple[str, ...]) -> None:
        self.server = server
        self.namespace = namespace
        self._kubectl = kubectl
        self._tls = ssl.create_default_context(cafile=str(server.ca_path))

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """One call; raises urllib.error.HTTPError for a status of 400 or more."""
        request = urllib.request.Request(self.server.url + path, method=method)
        request.add_header("Authorization", f"Bearer {self.server.token}")
        request.add_header("Content-Type", content_type)
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(request, data=data, timeout=30, context=self._tls) as answer:
            return json.loads(answer.read())

    def path(self, kind: str, name: str = "") -> str:
        groups = {
            "pods": "api/v1", "services": "api/v1", "configmaps": "api/v1", "secrets": "api/v1", "serviceaccounts": "api/v1",
            "deployments": "apis/apps/v1", "statefulsets": "apis/apps/v1", "controllerrevisions": "apis/apps/v1",
            "jobs": "apis/batch/v1", "poddisruptionbudgets": "apis/policy/v1",
            "networkpolicies": "apis/networking.k8s.io/v1", "persistentvolumeclaims": "api/v1",
            "resourceclaimtemplates": "apis/resource.k8s.io/v1", PLURAL: f"apis/{API_VERSION}",
        }  # fmt: skip
        return f"/{groups[kind]}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def list(self, kind: str) -> dict[str, dict[str, Any]]:
        """All objects of a kind that carry the operator's label, by name."""
        query = "" if kind == PLURAL else "?labelSelector=app.kubernetes.io/managed-by=weightsync"
        return {item["metadata"]["name"]: item for item in self.request("GET", self.path(kind) + query)["items"]}

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        try:
            return self.request("GET", self.path(kind, name))
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None

    def patch(self, kind: str, name: str, body: Any, *, status: bool = False) -> dict[str, Any]:
        content_type = JSON_PATCH if isinstance(body, list) else MERGE
        return self.request("PATCH", self.path(kind, name) + ("/status" if status else ""), body, content_type)

    def delete(self, kind: str, name: str, **options: Any) -> None:
        self.request("DELETE", self.path(kind, name), options or None)

    def create(self, spec: Mapping[str, Any], name: str = "ws") -> dict[str, Any]:
        """Create a WeightSync."""
        body = {"apiVersion": API_VERSION, "kind": "WeightSync", "metadata": {"name": name}, "spec": spec}
        return self.request("POST", self.path(PLURAL), body)

    def status(self, name: str = "ws") -> dict[str, Any]:
        resource = self.get(PLURAL, name)
        return {} if resource is None else resource.get("status", {})

    def condition(self, type_: str, name: str = "ws") -> tuple[str, str, str]:
        """(status, reason, message), empty while there is none."""
        found = [c for c in self.status(name).get("conditions", []) if c["type"] == type_]
        return (found[0]["status"], found[0]["reason"], found[0]["message"]) if found else ("", "", "")

    def kubectl(self, *arguments: str, manifest: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        """kubectl as the administrator in this namespace; a manifest goes to its standard input."""
        command = [
            *self._kubectl,
            f"--kubeconfig={self.server.kubeconfig}",
            f"--namespace={self.namespace}",
            *arguments,
        ]
        text = None if manifest is None else json.dumps(manifest)
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


class Kubelet:
    """Says how pods fare, since nothing runs them."""

    def __init__(self, kube: Kube, instance: str = "ws") -> None:
        self._kube = kube
        self._instance = instance

    def pods(self, component: Component) -> list[dict[str, Any]]:
        """Pods of one role by name."""
        labels = {LABEL_COMPONENT: component.value, LABEL_INSTANCE: self._instance}
        pods = self._kube.list("pods").values()
        return [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]

    def answer_preflight(self, verdict: Mapping[str, Any] | None = None) -> None:
        """Wait for the question and answer it, by default with yes."""
        (pod,) = wait_until("a preflight pod", lambda: self.pods(Component.PREFLIGHT), lambda pods: len(pods) == 1)
        message = json.dumps(verdict or {"ok": True, "errors": []})
        self.end(pod, exit_code=0 if (verdict or {"ok": True})["ok"] else 1, message=message)

    def wait_for(self, component: Component, count: int) -> list[dict[str, Any]]:
        what = f"{count} {component.value} pods"
        return wait_until(what, lambda: self.pods(component), lambda pods: len(pods) == count)

    def make_ready(self, *components: Component) -> None:
        """Every pod of these roles turns ready."""
        for component in components:
            for pod in wait_until(f"{component} pods", lambda c=component: self.pods(c), bool):
                self._patch(pod, {"phase": "Running", "conditions": [_ready(True)]})

    def end(self, pod: Mapping[str, Any], *, exit_code: int, message: str = "") -> None:
        """The pod's only container ended."""
        ended = {"exitCode": exit_code, "message": message, "reason": "Completed" if exit_code == 0 else "Error"}
        container = pod["spec"]["containers"][0]["name"]
        state = {
            "name": container,
            "image": "x",
            "imageID": "x",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": ended},
        }
        phase = "Succeeded" if exit_code == 0 else "Failed"
        self._patch(pod, {"phase": phase, "containerStatuses": [state], "conditions": [_ready(False)]})

    def bind(self, pod: Mapping[str, Any], node: str = "node-1") -> None:
        """On a node a deleted pod stays until its kubelet lets it go."""
        name = pod["metadata"]["name"]
        self._make_node(node)
        body = {"metadata": {"name": name}, "target": {"apiVersion": "v1", "kind": "Node", "name": node}}
        self._kube.request("POST", self._kube.path("pods", name) + "/binding", body)

    def _make_node(self, name: str) -> None:
        """Pods of a node that does not exist are collected."""
        try:
            self._kube.request("POST", "/api/v1/nodes", {"metadata": {"name": name}})
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise

    def let_go(self, pod: Mapping[str, Any]) -> None:
        """The kubelet's last word about a deleted pod."""
        self._kube.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)

    def _patch(self, pod: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        self._kube.patch("pods", pod["metadata"]["name"], {"status": status}, status=True)


def _ready(ready: bool) -> dict[str, str]:
    return {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-01-01T00:00:00Z"}


def tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"
