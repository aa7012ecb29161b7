"""Where the lab keeps things: one cache folder for what is worth keeping, `.lab/` in the repository for what is not.

Imports the standard library alone; the only module of the lab that reads WEIGHTSYNC_CACHE.
"""

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAB_SOURCES = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class LabPaths:
    """Folders of the lab; none of them is created by naming it."""

    cache: Path
    """Kept by `down`, removed by `clean`: tools, Docker's data, the node's image store, models."""
    lab: Path
    """Belongs to one checkout: kubeconfig, logs, timings, data that pods write."""

    @property
    def bin(self) -> Path:
        """Links to every tool the lab built."""
        return self.cache / "bin"

    @property
    def store(self) -> Path:
        """One folder a build, named by what went into it."""
        return self.cache / "store"

    @property
    def docker(self) -> Path:
        """Everything of the dockerd that the lab starts."""
        return self.cache / "docker"

    @property
    def models(self) -> Path:
        """Mounted into the node read-only at /var/lib/weightsync/models."""
        return self.cache / "models"

    @property
    def data(self) -> Path:
        """Mounted into the node at /var/lib/weightsync/data, writable for the images' user."""
        return self.lab / "data"

    @property
    def kubeconfig(self) -> Path:
        return self.lab / "kubeconfig"

    @property
    def logs(self) -> Path:
        return self.lab / "logs"

    @property
    def timings(self) -> Path:
        return self.lab / "timings.json"


def lab_paths(repository: Path = REPOSITORY) -> LabPaths:
    """The folders of the checkout at `repository`; $WEIGHTSYNC_CACHE moves the cache (default ~/.cache/weightsync)."""
    cache = os.environ.get("WEIGHTSYNC_CACHE")
    return LabPaths(
        cache=Path(cache).expanduser().resolve() if cache else Path.home() / ".cache" / "weightsync",
        lab=repository / ".lab",
    )
