"""helm itself against a real API server: what an install, an upgrade and an uninstall do to the operator's Lease."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from e2e.lab.tools import ensure_tool
from tests.controlplane.conftest import ROOT
from tests.controlplane.kube import MERGE, Kube

Helm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def helm(kube: Kube) -> Helm:
    """helm as the administrator, in the test's namespace; nothing waits for pods, which nobody runs."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(ensure_tool("helm")), f"--kubeconfig={kube.server.kubeconfig}", f"--namespace={kube.namespace}"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)

    return run


def _lease_path(kube: Kube, name: str = "") -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{kube.namespace}/leases" + (f"/{name}" if name else "")


@pytest.mark.failure_mode(69)
@pytest.mark.failure_mode(45)
def test_an_upgrade_leaves_the_leases_holder_alone_and_an_uninstall_takes_the_lease_away(
    kube: Kube, helm: Helm
) -> None:
    """Seen to fail with a `holderIdentity` in the template."""
    release, values = "upgraded", "--set=crds.install=false"
    chart = str(ROOT / "charts/weightsync")
    done = helm("install", release, chart, values)
    assert done.returncode == 0, done.stderr
    path = _lease_path(kube, f"{release}-operator")
    spec = {"holderIdentity": "pod_1", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"}
    held = kube.request("PATCH", path, {"spec": spec}, MERGE)["spec"]

    done = helm("upgrade", release, chart, values, "--set=operator.replicas=2")
    assert done.returncode == 0, done.stderr
    assert kube.request("GET", path)["spec"] == held

    done = helm("uninstall", release)
    assert done.returncode == 0, done.stderr
    assert kube.request("GET", _lease_path(kube))["items"] == []


def test_a_lease_that_somebody_made_is_taken_over_as_the_documentation_says(kube: Kube, helm: Helm) -> None:
    release, chart = "adopted", str(ROOT / "charts/weightsync")
    name = f"{release}-operator"
    lease: dict[str, Any] = {"metadata": {"name": name}}
    kube.request("POST", _lease_path(kube), lease)
    refused = helm("install", release, chart, "--set=crds.install=false")
    assert "cannot be imported into the current release" in refused.stderr
    metadata = {
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": release, "meta.helm.sh/release-namespace": kube.namespace},
    }
    kube.request("PATCH", _lease_path(kube, name), {"metadata": metadata}, MERGE)
    done = helm("install", release, chart, "--set=crds.install=false")
    assert done.returncode == 0, done.stderr
    done = helm("uninstall", release)
    assert done.returncode == 0, done.stderr
