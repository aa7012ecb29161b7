"""One file pins the lab's versions; whatever must repeat one says the same."""

import re
import tomllib
from pathlib import Path

import pytest

from e2e.lab.errors import LabError
from e2e.lab.paths import LAB_SOURCES, REPOSITORY
from e2e.lab.versions import VERSIONS_FILE, read_versions

VERSIONS = read_versions()


def module_version(program: str, module: str) -> str:
    text = (LAB_SOURCES / "go" / program / "go.mod").read_text()
    found = re.search(rf"^(?:require )?\s*{re.escape(module)} v(\S+)", text, re.MULTILINE)
    assert found, f"{program}/go.mod does not require {module}"
    return found.group(1)


def test_the_kubernetes_sources_are_of_the_pinned_version() -> None:
    assert module_version("kube", "k8s.io/kubernetes") == VERSIONS.kubernetes


def test_the_staging_modules_of_kubernetes_are_of_its_release() -> None:
    release = "0." + VERSIONS.kubernetes.split(".", 1)[1]
    text = (LAB_SOURCES / "go" / "kube" / "go.mod").read_text()
    replaced = re.findall(r"^\s+(k8s\.io/\S+) => (k8s\.io/\S+) v(\S+)$", text, re.MULTILINE)
    assert len(replaced) > 20
    assert {version for _, _, version in replaced} == {release}


def test_the_coredns_image_is_tagged_with_the_version_inside() -> None:
    assert module_version("coredns", "github.com/coredns/coredns") == VERSIONS.coredns_tag.removeprefix("v")


@pytest.mark.parametrize(
    ("argument", "pinned"),
    [
        ("BASE_IMAGE", VERSIONS.registry_base),
        ("RUST_IMAGE", VERSIONS.registry_rust),
        ("MODELEXPRESS_VERSION", VERSIONS.modelexpress),
        ("MODELEXPRESS_FEATURES", VERSIONS.modelexpress_features),
        ("UV_VERSION", VERSIONS.uv),
        ("HATCHLING_VERSION", VERSIONS.hatchling),
    ],
)
def test_the_dockerfiles_defaults_are_the_pinned_versions(argument: str, pinned: str) -> None:
    defaults = re.findall(rf"^ARG {argument}=(\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert defaults == [pinned]


def test_server_and_client_of_modelexpress_share_a_minor_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (client,) = [line for line in project["optional-dependencies"]["runtime"] if line.startswith("modelexpress==")]
    assert client.split("==")[1].split(".")[:2] == VERSIONS.modelexpress.split(".")[:2]


def test_the_images_constraints_hold_the_projects_own_pins() -> None:
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extra in ("operator", "runtime", "vllm-cpu"):
        for line in project["optional-dependencies"][extra]:
            name, _, version = line.partition("==")
            assert not version or pinned[name] == version, (
                f"{line} is pinned to {pinned[name]}: make constraints.txt again"
            )


def test_a_missing_version_is_told_by_its_key(tmp_path: Path) -> None:
    broken = tmp_path / "versions.toml"
    broken.write_text(VERSIONS_FILE.read_text().replace("[helm]", "[other]"))
    with pytest.raises(LabError, match="no key 'helm'"):
        read_versions(broken)
