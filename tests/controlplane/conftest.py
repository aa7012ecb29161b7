"""Real things for the tests of the operator: the chart installed on a bare API server, and the operator as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.lab.bareapi import BareApiServer
from e2e.lab.tools import ensure_tool
from tests.controlplane.builders import DEFAULTS, KEY
from tests.controlplane.kube import Kube, Kubelet, tail, wait_until
from tests.fixtures.servers import (
    RedisServer,
    free_port,
    make_redis_server,
    pytest_runtest_makereport,
    redis_server,
    start_redis,
)

__all__ = ["pytest_runtest_makereport", "redis_server", "start_redis"]

ROOT = Path(__file__).parents[2]
RELEASE, SYSTEM_NAMESPACE = "ws", "weightsync-system"
EXIT_DEADLINE_S = 10.0
"""The grace period of the chart: later, SIGKILL ends it."""
INSTALLED_KINDS = ("CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding")


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
    paths = {
        "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
        "ServiceAccount": f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/serviceaccounts",
        "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    }
    for manifest in chart:
        if manifest["kind"] in INSTALLED_KINDS:
            server.request("POST", paths[manifest["kind"]], manifest)
    path = f"{paths['CustomResourceDefinition']}/weightsyncs.weightsync.dev"
    wait_until("the CRD is established", lambda: server.request("GET", path).get("status", {}), _is_established)
    return server


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
    folder, port = tmp_path_factory.mktemp("operator-process"), free_port()
    (folder / "key").write_bytes(KEY)
    environ = {
        "WEIGHTSYNC_IMAGE_RUNTIME": DEFAULTS.runtime_image,
        "WEIGHTSYNC_IMAGE_REDIS": DEFAULTS.redis_image,
        "WEIGHTSYNC_IMAGE_MODELEXPRESS": DEFAULTS.model_express_image,
        "WEIGHTSYNC_OPERATOR_KEY_FILE": str(folder / "key"),
        "WEIGHTSYNC_LIVENESS_PORT": str(port),
        "WEIGHTSYNC_LEDGER_ADDRESS": f"127.0.0.1:{ledger.port}",
        "KUBECONFIG": str(operator_kubeconfig),
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "weightsync_operator"], env={**os.environ, **environ}, stdout=out, stderr=out
        )
    try:
        wait_until("the operator is healthy", lambda: _answer(port, process, log), lambda status: status == 200)
        yield log
        assert process.poll() is None, f"the operator ended with {process.returncode}:\n{tail(log)}"
    finally:
        process.terminate()
        try:
            assert process.wait(EXIT_DEADLINE_S) == 0, tail(log)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"SIGTERM did not end the operator in {EXIT_DEADLINE_S:.0f} s:\n{tail(log)}")


def _answer(port: int, process: subprocess.Popen[bytes], log: Path) -> int:
    assert process.poll() is None, f"the operator ended with {process.returncode}:\n{tail(log)}"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def operator(operator_log: Path) -> Iterator[Path]:
    """The running operator; a bug that it logged while this test ran fails the test."""
    before = len(operator_log.read_text(errors="replace"))
    yield operator_log
    said = operator_log.read_text(errors="replace")[before:]
    if "Traceback" in said:
        pytest.fail(f"the operator logged a bug:\n{said[-4000:]}")
