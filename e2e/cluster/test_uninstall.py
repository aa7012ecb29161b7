"""`helm uninstall` after the resources are gone: nothing of the release is left in the cluster."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import pytest

from e2e.cluster.conftest import wait_for
from e2e.demo.kubectl import Kubectl
from e2e.demo.setup import OPERATOR, OPERATOR_NAMESPACE, RELEASE
from e2e.lab.paths import lab_paths
from e2e.lab.providers import Provider

CLUSTER_WIDE = "customresourcedefinitions,clusterroles,clusterrolebindings"
NAMESPACED = "deployments,replicasets,pods,services,secrets,serviceaccounts,roles,rolebindings,leases,configmaps"
PRESENT_IN_ANY_NAMESPACE = {"configmap/kube-root-ca.crt", "serviceaccount/default"}


@pytest.mark.failure_mode(64)
def test_uninstalling_the_chart_leaves_nothing(lab_cluster: tuple[Kubectl, Provider]) -> None:
    """Seen to fail with `crds.keep: true`, which leaves the CRD."""
    paths = lab_paths()
    kubectl = Kubectl(program=paths.bin / "kubectl", kubeconfig=paths.kubeconfig, namespace=OPERATOR_NAMESPACE)

    def left() -> list[str]:
        everywhere = kubectl.run("get", CLUSTER_WIDE, "-l", OPERATOR, "-o", "name").split()
        here = kubectl.run("get", NAMESPACED, "-o", "name").split()
        return sorted({*everywhere, *here} - PRESENT_IN_ANY_NAMESPACE)

    before = left()
    assert any("customresourcedefinition" in name for name in before), before
    assert any(name.startswith("deployment") for name in before), before
    helm = [str(paths.bin / "helm"), "--kubeconfig", str(paths.kubeconfig), "uninstall", RELEASE]
    subprocess.run([*helm, "--namespace", OPERATOR_NAMESPACE, "--wait", "--timeout", "120s"], check=True)
    with suppress(AssertionError):  # the next line says what is left
        wait_for("the operator's pods are gone", lambda: not left(), 60)
    assert left() == []
