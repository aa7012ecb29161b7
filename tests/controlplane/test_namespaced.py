"""An operator with a Role in two namespaces and no right in the cluster: it works there, and asks for nothing more."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.lab.bareapi import BareApiServer
from tests.controlplane.builders import MINIMAL, merged
from tests.controlplane.conftest import helm_template, install
from tests.controlplane.kube import Kube, Kubelet, wait_until
from tests.controlplane.process import OperatorProcess, start_operator
from tests.fixtures.servers import RedisServer
from weightsync_operator.api.names import PLURAL, Component
from weightsync_operator.cluster import ApiUnavailable
from weightsync_operator.startup import crd_is_there

TWO = merged(MINIMAL, {"trainer": {"nodes": 2}, "inference": {"replicas": 2}})
CLUSTER_KINDS = {"nodes", "namespaces", "customresourcedefinitions", "clusterroles", "clusterrolebindings"}


def _render(*options: str) -> list[dict[str, Any]]:
    rendered = helm_template(*options)
    assert rendered.returncode == 0, rendered.stderr
    return [document for document in yaml.safe_load_all(rendered.stdout) if document]


def test_the_chart_of_named_namespaces_has_roles_and_nothing_for_the_cluster() -> None:
    chart = _render("--set=watchNamespaces={a,b}", "--set=crds.install=false")
    kinds = {manifest["kind"] for manifest in chart}
    assert kinds == {"Deployment", "Lease", "Role", "RoleBinding", "Secret", "ServiceAccount"}
    roles = [
        manifest
        for manifest in chart
        if manifest["kind"] == "Role" and not manifest["metadata"]["name"].endswith("lease")
    ]
    assert [role["metadata"]["namespace"] for role in roles] == ["a", "b"]
    asked = {resource for role in roles for rule in role["rules"] for resource in rule["resources"]}
    assert not asked & CLUSTER_KINDS, "a Role cannot give these"
    assert all("metadata" in manifest and manifest["metadata"].get("namespace") for manifest in chart)


@pytest.fixture
def elsewhere(installed: BareApiServer) -> Iterator[str]:
    """A namespace that the operator does not serve."""
    name = f"elsewhere-{secrets.token_hex(3)}"
    installed.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    installed.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def operator(kube: Kube, ledger: RedisServer, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator installed into the test's own namespace, which it alone serves."""
    options = (
        f"--set=watchNamespaces={{{kube.namespace}}}",
        "--set=crds.install=false",
        f"--namespace={kube.namespace}",
    )
    install(kube.server, _render(*options))
    token = kube.server.service_account_token(kube.namespace, "ws-operator")
    kubeconfig = kube.server.write_kubeconfig(tmp_path / "kubeconfig", token)
    environ = {"WEIGHTSYNC_NAMESPACES": kube.namespace, "WEIGHTSYNC_LEASE": f"{kube.namespace}/ws-operator"}
    with start_operator(kubeconfig, tmp_path / "operator", ledger.port, **environ) as running:
        running.wait_ready()
        yield running


def test_it_works_with_a_role_alone_and_never_asks_for_more(
    operator: OperatorProcess, kube: Kube, kubelet: Kubelet, elsewhere: str
) -> None:
    """1 a resource is brought up, repaired and taken away; 2 one in another namespace is not touched; 3 no request was refused."""
    other = Kube(kube.server, elsewhere, ())
    other.create(TWO)
    kube.create(TWO)
    kubelet.answer_preflight()
    kubelet.make_ready(Component.REDIS, Component.MODEL_EXPRESS)
    kubelet.wait_for(Component.TRAINER, 2)
    kubelet.make_ready(Component.INFERENCE)
    wait_until("it is available", lambda: kube.condition("Available"), lambda c: c[0] == "True")
    kube.delete("services", "ws-mx")
    wait_until("the Service is back", lambda: set(kube.list("services")), lambda names: "ws-mx" in names)
    status, reason, message = kube.condition("SecurityEnforced")
    assert (status, reason) == ("False", "NamespacedOperator")
    assert "ClusterRoleBinding to system:auth-delegator" in message
    assert other.status() == {}

    kube.delete(PLURAL, "ws")
    wait_until("no engine is left", lambda: kube.list("statefulsets"), lambda sets: sets == {})
    user = f"system:serviceaccount:{kube.namespace}:ws-operator"
    mine = [entry for entry in kube.server.audit() if entry["user"]["username"] == user]
    assert len(mine) > 50, "the audit log knows what it asked"
    refused = [(e["verb"], e["requestURI"]) for e in mine if e["responseStatus"]["code"] == 403]
    assert refused == []
    log = operator.log.read_text()
    assert re.search(r"\b403\b", log) is None  # identities have digits, too
    assert "permissions" not in log, "Kopf warns of rights that it lacks"
    assert "Traceback" not in log
    assert operator.end() == 0


class _Answers:
    """Says whether the CRD is served, from a script."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.left = list(answers)

    async def is_served(self) -> bool:
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_it_waits_for_a_crd_that_is_not_installed_yet_and_says_who_installs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kopf that may not watch CRDs would never serve one that comes after its start."""
    monkeypatch.setattr("weightsync_operator.startup.CRD_PERIOD_S", 0.01)
    cluster = _Answers(False, False, ApiUnavailable("away"), True)

    async def scenario() -> bool:
        return await crd_is_there(cluster, asyncio.Event())  # type: ignore[arg-type]

    assert asyncio.run(scenario())
    assert caplog.text.count("an administrator applies charts/weightsync/files/crd.yaml") == 1
    assert cluster.left == []


def test_it_ends_while_it_waits_for_the_crd() -> None:
    async def scenario() -> bool:
        stop = asyncio.Event()
        waiting = asyncio.create_task(crd_is_there(_Answers(False, False), stop))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        stop.set()
        return await asyncio.wait_for(waiting, 10)

    assert not asyncio.run(scenario())
