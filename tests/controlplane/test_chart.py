"""The chart: what it installs, with which rights, and what its schema refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.controlplane.conftest import helm_template
from weightsync_operator.cluster import RESOURCES
from weightsync_operator.handlers import WATCHED
from weightsync_operator.settings import Settings

ROOT = Path(__file__).parents[2]
Manifests = list[dict[str, Any]]


def _one(manifests: Manifests, kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def _verbs(chart: Manifests) -> dict[tuple[str, str], set[str]]:
    rules = _one(chart, "ClusterRole")["rules"]
    return {(g, r): set(rule["verbs"]) for rule in rules for g in rule["apiGroups"] for r in rule["resources"]}


def test_the_chart_holds_what_the_operator_needs_and_nothing_else(chart: Manifests) -> None:
    kinds = sorted(manifest["kind"] for manifest in chart)
    assert kinds == sorted(
        ["CustomResourceDefinition", "Secret", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Deployment"]
    )


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
def test_there_are_never_two_operators(chart: Manifests) -> None:
    spec = _one(chart, "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_the_operator_starts_with_the_charts_environment(chart: Manifests, tmp_path: Path) -> None:
    (container,) = _one(chart, "Deployment")["spec"]["template"]["spec"]["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    key = tmp_path / "key"
    key.write_text("x" * 64)
    settings = Settings.load({**environ, "WEIGHTSYNC_OPERATOR_KEY_FILE": str(key)})
    assert settings.defaults.runtime_image == "weightsync/runtime:dev"


def test_no_right_is_a_wildcard(chart: Manifests) -> None:
    for rule in _one(chart, "ClusterRole")["rules"]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


def test_every_kind_that_is_used_may_be_used_and_every_watch_may_be_held(chart: Manifests) -> None:
    verbs = _verbs(chart)
    for api_version, plural in RESOURCES.values():
        group = api_version.rpartition("/")[0]
        assert (group, plural) in verbs, plural
    for group, _, plural in WATCHED:
        assert {"list", "watch"} <= verbs[group, plural], plural
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
        ("operator.replicas=2", "replicas"),
    ],
)
def test_bad_values_are_refused_by_name(option: str, words: str) -> None:
    rendered = helm_template(f"--set={option}")
    assert rendered.returncode != 0
    assert words in rendered.stderr
