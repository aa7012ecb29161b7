"""Real things for the tests of the operator: the chart installed on a bare API server, and the operator as a process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.lab.bareapi import BareApiServer
from e2e.lab.tools import ensure_tool
from tests.controlplane.kube import Kube, Kubelet, tail, wait_until
from tests.controlplane.process import start_operator
from tests.fixtures.servers import (
    RedisServer,
    make_redis_server,
    pytest_runtest_makereport,
    redis_server,
    start_redis,
)

__all__ = ["pytest_runtest_makereport", "redis_server", "start_redis"]

ROOT = Path(__file__).parents[2]
RELEASE, SYSTEM_NAMESPACE = "ws", "weightsync-system"
RBAC = "rbac.authorization.k8s.io/v1"
INSTALLED = {
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "ClusterRole": f"/apis/{RBAC}/clusterroles",
    "ClusterRoleBinding": f"/apis/{RBAC}/clusterrolebindings",
    "Role": f"/apis/{RBAC}/namespaces/{{}}/roles",
    "RoleBinding": f"/apis/{RBAC}/namespaces/{{}}/rolebindings",
}
"""What of the chart the tests install: everything but the operator itself."""


def helm_template(*options: str) -> subprocess.CompletedProcess[str]:
    """The chart as helm renders it, without a cluster."""
    chart = str(ROOT / "charts/weightsync")
    command = [
        str(ensure_tool("helm")),
        "template",
        RELEASE,
        chart,
        f"--namespace={SYSTEM_NAMESPACE}",
        "--kube-version=1.34",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="session")
def chart() -> list[dict[str, Any]]:
    """All manifests of the chart with its default values."""
    rendered = helm_template()
    assert rendered.returncode == 0, rendered.stderr
    return [document for document in yaml.safe_load_all(rendered.stdout) if document]


@pytest.fixture(scope="session")
def installed(api_server: BareApiServer, chart: list[dict[str, Any]]) -> BareApiServer:
    """The API server with the chart's CRD, account and rights: the operator of the tests may do what the chart lets it do."""
    server = api_server
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": SYSTEM_NAMESPACE}})
    install(server, chart)
    path = f"{INSTALLED['CustomResourceDefinition']}/weightsyncs.weightsync.dev"
    wait_until("the CRD is established", lambda: server.request("GET", path).get("status", {}), _is_established)
    return server


def install(server: BareApiServer, manifests: list[dict[str, Any]]) -> None:
    """Create the objects of a rendered chart that the tests need."""
    for manifest in manifests:
        if manifest["kind"] in INSTALLED:
            path = INSTALLED[manifest["kind"]].format(manifest["metadata"].get("namespace"))
            server.request("POST", path, manifest)


def _is_established(status: dict[str, Any]) -> bool:
    return any(c["type"] == "Established" and c["status"] == "True" for c in status.get("conditions") or [])


@pytest.fixture(scope="session")
def operator_kubeconfig(installed: BareApiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig with the rights of the chart's service account."""
    token = installed.service_account_token(SYSTEM_NAMESPACE, f"{RELEASE}-operator")
    return installed.write_kubeconfig(tmp_path_factory.mktemp("operator") / "kubeconfig", token)


@pytest.fixture
def kube(installed: BareApiServer, namespace: str) -> Kube:
    """This test's namespace."""
    return Kube(installed, namespace, (str(ensure_tool("kube")), "kubectl"))


@pytest.fixture
def kubelet(kube: Kube) -> Kubelet:
    """Speaks for the pods of the resource `ws`."""
    return Kubelet(kube)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The Redis that the operator process takes for every resource's own."""
    server = make_redis_server(tmp_path_factory.mktemp("ledger"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def operator_log(
    operator_kubeconfig: Path, ledger: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """`python -m weightsync_operator` with the chart's rights, up and healthy; its log.

    It serves all namespaces and ends with its module: tests that drive passes themselves must be alone with theirs.
    """
    with start_operator(operator_kubeconfig, tmp_path_factory.mktemp("operator-process"), ledger.port) as operator:
        operator.wait_ready()
        yield operator.log
        operator.page("/healthz")
        assert operator.end() == 0, tail(operator.log)


@pytest.fixture
def operator(operator_log: Path) -> Iterator[Path]:
    """The running operator; a bug that it logged while this test ran fails the test."""
    before = len(operator_log.read_text(errors="replace"))
    yield operator_log
    said = operator_log.read_text(errors="replace")[before:]
    if "Traceback" in said:
        pytest.fail(f"the operator logged a bug:\n{said[-4000:]}")
