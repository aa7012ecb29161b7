"""The chart: what it installs, with which rights, and what its schema refuses."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.controlplane.conftest import helm_template
from weightsync_operator.cluster import RESOURCES
from weightsync_operator.listing import LISTED, WATCHED
from weightsync_operator.settings import Settings

ROOT = Path(__file__).parents[2]
Manifests = list[dict[str, Any]]


def _one(manifests: Manifests, kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def _cluster_role(chart: Manifests) -> dict[str, Any]:
    """The operator's own; the other is for the ModelExpress of each resource."""
    return _one([manifest for manifest in chart if not _is_for_modelexpress(manifest)], "ClusterRole")


def _is_for_modelexpress(manifest: dict[str, Any]) -> bool:
    return manifest["metadata"]["name"].endswith("-token-review")


def test_what_all_accounts_may_is_to_ask_whose_a_token_is(chart: Manifests) -> None:
    role, binding = (_one(list(filter(_is_for_modelexpress, chart)), k) for k in ("ClusterRole", "ClusterRoleBinding"))
    assert role["rules"] == [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    ]
    assert [(subject["kind"], subject["name"]) for subject in binding["subjects"]] == [
        ("Group", "system:serviceaccounts")
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def _verbs(chart: Manifests) -> dict[tuple[str, str], set[str]]:
    verbs: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rule in [*_cluster_role(chart)["rules"], *_one(chart, "Role")["rules"]]:
        for resource in itertools.product(rule["apiGroups"], rule["resources"]):
            verbs[resource] |= set(rule["verbs"])
    return verbs


def test_the_chart_holds_what_the_operator_needs_and_nothing_else(chart: Manifests) -> None:
    kinds = sorted(manifest["kind"] for manifest in chart)
    own = ["CustomResourceDefinition", "Deployment", "Lease", "Secret", "ServiceAccount"]
    assert kinds == sorted([*own, *(["ClusterRole", "ClusterRoleBinding"] * 2), "Role", "RoleBinding"])


@pytest.mark.failure_mode(44)
@pytest.mark.failure_mode(45)
def test_the_crd_is_a_template_that_goes_with_the_release_unless_it_is_to_be_kept(chart: Manifests) -> None:
    """Helm never upgrades what lies in crds/, and never removes it."""
    assert not (ROOT / "charts/weightsync/crds").exists()
    assert "annotations" not in _one(chart, "CustomResourceDefinition")["metadata"]
    kept = list(yaml.safe_load_all(helm_template("--set=crds.keep=true").stdout))
    crd = _one([manifest for manifest in kept if manifest], "CustomResourceDefinition")
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_the_templated_crd_is_the_generated_one(chart: Manifests) -> None:
    generated = yaml.safe_load((ROOT / "charts/weightsync/files/crd.yaml").read_text())
    assert _one(chart, "CustomResourceDefinition")["spec"] == generated["spec"]


def test_the_operator_runs_confined(chart: Manifests) -> None:
    pod = _one(chart, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.failure_mode(69)
def test_the_release_makes_the_lease_and_says_nothing_about_its_holder(chart: Manifests) -> None:
    """A `spec` in the template would take the Lease from its holder with each upgrade."""
    lease, deployment = _one(chart, "Lease"), _one(chart, "Deployment")
    assert "spec" not in lease
    environ = {
        entry["name"]: entry["value"] for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environ["WEIGHTSYNC_LEASE"] == f"{lease['metadata']['namespace']}/{lease['metadata']['name']}"
    (rule,) = _one(chart, "Role")["rules"]
    assert (rule["resourceNames"], rule["verbs"]) == ([lease["metadata"]["name"]], ["get", "patch"])


@pytest.mark.failure_mode(44)
def test_an_update_of_the_operator_brings_the_new_pod_up_before_the_old_one_ends(chart: Manifests) -> None:
    """The new pod stands by, and ready, until the old one lets the Lease go."""
    deployment = _one(chart, "Deployment")["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    (container,) = deployment["template"]["spec"]["containers"]
    probes = {probe: container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")}
    assert probes == {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_two_operators_go_to_two_nodes_and_a_drain_takes_one_at_a_time() -> None:
    two = [document for document in yaml.safe_load_all(helm_template("--set=operator.replicas=2").stdout) if document]
    labels = _one(two, "Deployment")["spec"]["selector"]["matchLabels"]
    budget = _one(two, "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, labels)
    affinity = _one(two, "Deployment")["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == labels


def test_the_operator_starts_with_the_charts_environment(chart: Manifests, tmp_path: Path) -> None:
    (container,) = _one(chart, "Deployment")["spec"]["template"]["spec"]["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    key = tmp_path / "key"
    key.write_text("x" * 64)
    settings = Settings.load({**environ, "WEIGHTSYNC_OPERATOR_KEY_FILE": str(key)})
    assert settings.defaults.runtime_image == "weightsync/runtime:dev"


def test_no_right_is_a_wildcard(chart: Manifests) -> None:
    for rule in _cluster_role(chart)["rules"]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


def test_every_kind_that_is_used_may_be_used_and_every_watch_may_be_held(chart: Manifests) -> None:
    verbs = _verbs(chart)
    for api_version, plural in RESOURCES.values():
        group = api_version.rpartition("/")[0]
        assert (group, plural) in verbs, plural
    for kind in LISTED:
        api_version, plural = RESOURCES[kind]
        needed = {"list", "watch"} if kind in WATCHED else {"list"}
        assert needed == verbs[api_version.rpartition("/")[0], plural] & {"list", "watch"}, plural
    assert verbs["", "secrets"] == {"get", "create", "patch"}, "no list: other people's Secrets stay unread"


def test_every_right_has_its_reason_beside_it() -> None:
    text = (ROOT / "charts/weightsync/templates/rbac.yaml").read_text()
    rules = text.split("rules:\n")[1].split("---")[0].splitlines()
    first_lines = [index for index, line in enumerate(rules) if line.strip().startswith("- apiGroups")]
    uncommented = [rules[index + 1] for index in first_lines if not _commented(rules, index)]
    assert uncommented == ["    resources: [deployments, statefulsets]", "    resources: [poddisruptionbudgets]"], (
        "as the rule above"
    )


def _commented(lines: list[str], index: int) -> bool:
    return index > 0 and lines[index - 1].strip().startswith("#")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("images.pullPolicy=Sometimes", "pullPolicy"),
        ("images.runtime=", "runtime"),
        ("image.runtime=x", "image"),
        ("crds.keep=perhaps", "keep"),
        ("operator.replicas=-1", "replicas"),
    ],
)
def test_bad_values_are_refused_by_name(option: str, words: str) -> None:
    rendered = helm_template(f"--set={option}")
    assert rendered.returncode != 0
    assert words in rendered.stderr
