"""The bare API server: what operator tests rely on, proved against the real servers."""

import time
import urllib.error
from typing import Any

import pytest

from e2e.lab.bareapi import BareApiServer

CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "probes.lab.weightsync.dev"},
    "spec": {
        "group": "lab.weightsync.dev",
        "names": {"kind": "Probe", "plural": "probes"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {"size": {"type": "integer", "minimum": 1}},
                    }
                },
            }
        ],
    },
}


def ask_until(server: BareApiServer, path: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
    """GET `path` until it exists and its storage is ready (429 until then); the last error is raised at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return server.request("GET", path)
        except urllib.error.HTTPError as error:
            if error.code not in (404, 429) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@pytest.fixture(scope="module")
def probes(api_server: BareApiServer) -> str:
    """The path prefix of an established custom resource."""
    api_server.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", CRD)
    ask_until(api_server, "/apis/lab.weightsync.dev/v1/probes")
    return "/apis/lab.weightsync.dev/v1"


def test_serves_a_custom_resource_and_refuses_what_its_schema_forbids(
    api_server: BareApiServer, namespace: str, probes: str
) -> None:
    path = f"{probes}/namespaces/{namespace}/probes"
    body = {"apiVersion": "lab.weightsync.dev/v1", "kind": "Probe", "metadata": {"name": "one"}}
    api_server.request("POST", path, {**body, "size": 3})
    assert [item["size"] for item in api_server.request("GET", path)["items"]] == [3]
    with pytest.raises(urllib.error.HTTPError) as refused:
        api_server.request("POST", path, {**body, "metadata": {"name": "none"}, "size": 0})
    assert refused.value.code == 422


def test_a_service_account_may_do_only_what_a_role_grants(api_server: BareApiServer, namespace: str) -> None:
    prefix = f"/api/v1/namespaces/{namespace}"
    ask_until(api_server, f"{prefix}/serviceaccounts/default")
    limited = BareApiServer(
        url=api_server.url,
        token=api_server.service_account_token(namespace, "default"),
        ca_path=api_server.ca_path,
        kubeconfig=api_server.kubeconfig,
        directory=api_server.directory,
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        limited.request("GET", f"{prefix}/configmaps")
    assert refused.value.code == 403
    roles = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}
    api_server.request("POST", f"{roles}/roles", {"metadata": {"name": "reader"}, "rules": [rule]})
    api_server.request(
        "POST",
        f"{roles}/rolebindings",
        {
            "metadata": {"name": "reader"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
            "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
        },
    )
    deadline = time.monotonic() + 10
    while True:
        try:
            names = [item["metadata"]["name"] for item in limited.request("GET", f"{prefix}/configmaps")["items"]]
            break
        except urllib.error.HTTPError as error:
            if error.code != 403 or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
    assert set(names) <= {"kube-root-ca.crt"}


def test_controllers_make_the_pods_of_a_job_and_collect_them_with_it(api_server: BareApiServer, namespace: str) -> None:
    ask_until(api_server, f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
    jobs, pods = f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "none"}]}}
    spec = {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "template": template}
    api_server.request("POST", jobs, {"metadata": {"name": "gang"}, "spec": spec})
    wait_for_count(api_server, pods, 2)
    api_server.request("DELETE", f"{jobs}/gang", {"propagationPolicy": "Background"})
    wait_for_count(api_server, pods, 0)


def wait_for_count(server: BareApiServer, path: str, count: int, *, timeout_s: float = 20.0) -> None:
    """Poll a list until it has `count` items."""
    deadline = time.monotonic() + timeout_s
    while (seen := len(server.request("GET", path)["items"])) != count:
        if time.monotonic() > deadline:
            pytest.fail(f"{path} has {seen} items after {timeout_s:.0f} s, not {count}")
        time.sleep(0.05)
