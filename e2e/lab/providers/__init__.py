"""Where a lab's cluster comes from: one protocol, two providers. Imports the standard library and the lab's own modules."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from e2e.lab.task import Task


class Capability(StrEnum):
    """What a test may ask of a provider; one that lacks it makes the test skip by that name."""

    LOAD_IMAGE = "load-image"
    """Images of the local Docker daemon can be put on the nodes; elsewhere they must be pullable."""
    NODE_EXEC = "node-exec"
    """Commands run on the node, outside every pod: signals to a container's processes, a kubelet restart."""
    NODE_FOLDERS = "node-folders"
    """The lab's models and data folders are mounted into the node at /var/lib/weightsync."""


class Provider(Protocol):
    """A cluster that the lab can use. `up` and `down` are safe to repeat."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> frozenset[Capability]: ...

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig; the file exists once `up` has returned."""
        ...

    def up(self, task: Task) -> bool:
        """Make the cluster usable; returns whether it was already."""
        ...

    def down(self, task: Task) -> None:
        """Remove what `up` made; a cluster that was there before stays."""
        ...

    def load_image(self, task: Task, ref: str) -> bool:
        """Put an image of the local Docker daemon on the node; returns whether it was there. Needs LOAD_IMAGE."""
        ...

    def node_exec(self, argv: Sequence[str]) -> str:
        """Run a command on the node and return what it prints; raises LabError when it fails. Needs NODE_EXEC."""
        ...

    def signal_container(self, *, namespace: str, pod: str, container: str, signal_name: str) -> tuple[int, ...]:
        """Send a signal (KILL, STOP, CONT, TERM) to every process of a container, from the node. Needs NODE_EXEC.

        Returns the pids as the node sees them; raises LabError when no such container runs.
        """
        ...
