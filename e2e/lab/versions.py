"""Reads versions.toml, the only place where the lab pins a version. Imports the standard library alone."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from e2e.lab.errors import LabError
from e2e.lab.paths import LAB_SOURCES

VERSIONS_FILE = LAB_SOURCES / "versions.toml"


@dataclass(frozen=True, kw_only=True)
class Versions:
    """The pinned versions, without a leading v unless it is part of an image's tag."""

    kubernetes: str
    etcd_tag: str
    pause_tags: tuple[str, ...]
    coredns_tag: str
    kind: str
    helm: str
    modelexpress: str
    modelexpress_features: str
    debian_suite: str
    uv: str
    hatchling: str
    registry_base: str
    registry_rust: str
    registry_node: str


def read_versions(path: Path = VERSIONS_FILE) -> Versions:
    """Parse the version file; raises LabError naming the key that is missing."""
    table = tomllib.loads(path.read_text())
    try:
        kubernetes, images = table["kubernetes"], table["registry_images"]
        return Versions(
            kubernetes=kubernetes["version"],
            etcd_tag=kubernetes["etcd_tag"],
            pause_tags=tuple(kubernetes["pause_tags"]),
            coredns_tag=kubernetes["coredns_tag"],
            kind=table["kind"]["version"],
            helm=table["helm"]["version"],
            modelexpress=table["modelexpress"]["version"],
            modelexpress_features=table["modelexpress"]["features"],
            debian_suite=table["debian"]["suite"],
            uv=table["image_build"]["uv"],
            hatchling=table["image_build"]["hatchling"],
            registry_base=images["base"],
            registry_rust=images["rust"],
            registry_node=images["node"],
        )
    except KeyError as error:
        raise LabError(f"{path} has no key {error}", cure="add it; every version of the lab is pinned there") from None
