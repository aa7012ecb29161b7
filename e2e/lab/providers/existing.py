"""Provider `existing`: a cluster that somebody else made and keeps. Its nodes are out of reach and images must be pullable.

Imports the standard library and the lab's own modules.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths
from e2e.lab.providers import Capability
from e2e.lab.task import Task


class ExistingProvider:
    """Uses a kubeconfig and changes nothing about the cluster itself."""

    name = "existing"
    capabilities: frozenset[Capability] = frozenset()

    def __init__(self, paths: LabPaths, kubeconfig: Path) -> None:
        self._paths = paths
        self.kubeconfig = kubeconfig

    def up(self, task: Task) -> bool:
        """Check that the cluster answers."""
        argv = [self._paths.bin / "kubectl", "--kubeconfig", self.kubeconfig, "get", "nodes", "--request-timeout=20s"]
        task.run(argv, cure=f"does {self.kubeconfig} name a cluster that answers?")
        return True

    def down(self, task: Task) -> None:
        task.say("leaves the existing cluster as it is")

    def load_image(self, task: Task, ref: str) -> bool:
        task.say(f"{ref} is not loaded: an existing cluster pulls its images")
        return True

    def node_exec(self, argv: Sequence[str]) -> str:
        self._refuse(f"run `{argv[0]}`")

    def signal_container(self, *, namespace: str, pod: str, container: str, signal_name: str) -> tuple[int, ...]:
        self._refuse(f"send {signal_name} to {namespace}/{pod}/{container}")

    def _refuse(self, what: str) -> NoReturn:
        raise LabError(f"cannot {what} on a node of an existing cluster", cure="use the provider kind for this test")


def find_kubeconfig(given: Path | None) -> Path:
    """The kubeconfig of `--kubeconfig`, else of $KUBECONFIG; raises LabError when there is none."""
    path = given or (Path(os.environ["KUBECONFIG"]) if os.environ.get("KUBECONFIG") else None)
    if path is None or not path.exists():
        raise LabError(f"no kubeconfig ({path})", cure="give --kubeconfig or set KUBECONFIG for the provider existing")
    return path
