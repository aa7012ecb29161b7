"""What images Docker has, and the base image of all the lab's own.

Imports the standard library and the lab's own modules.
"""

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from e2e.lab.content import content_key
from e2e.lab.docker import Docker
from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths
from e2e.lab.task import Task
from e2e.lab.tools import tool_path
from e2e.lab.versions import read_versions

CONTENT_LABEL = "weightsync.dev/content"
LOCAL_BASE = "weightsync/base:dev"
REGISTRY_ENV = "WEIGHTSYNC_LAB_REGISTRY"
REGISTRY_TIMEOUT_S = 20.0


@functools.cache
def registry_reachable(docker: Docker) -> bool:
    """Whether a container registry gives the pinned base image; WEIGHTSYNC_LAB_REGISTRY=0 or 1 decides instead of a probe."""
    said = os.environ.get(REGISTRY_ENV)
    if said is not None:
        return said == "1"
    argv = ["docker", "manifest", "inspect", read_versions().registry_base]
    environment = {**os.environ, **docker.environment()}
    try:
        answer = subprocess.run(argv, env=environment, check=False, capture_output=True, timeout=REGISTRY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0


@dataclass(frozen=True)
class BaseImage:
    """What every other image is built on."""

    ref: str
    cached: bool


def ensure_base_image(task: Task, paths: LabPaths, docker: Docker, *, registry: bool) -> BaseImage:
    """The registry's base image, or a Debian made by debootstrap and imported once."""
    if registry:
        return BaseImage(read_versions().registry_base, cached=True)
    root = tool_path("rootfs", paths)
    key = content_key(str(root))
    if image_key(docker, LOCAL_BASE) == key:
        return BaseImage(LOCAL_BASE, cached=True)
    task.say("imports the Debian root as an image")
    changes = ["--change", f"LABEL {CONTENT_LABEL}={key}", "--change", 'CMD ["bash"]']
    task.run(["docker", "import", *changes, root, LOCAL_BASE], env=docker.environment())
    return BaseImage(LOCAL_BASE, cached=False)


def image_key(docker: Docker, ref: str) -> str | None:
    """The content key that an image was built from; None when there is no such image."""
    return docker.ask("image", "inspect", "--format", f'{{{{index .Config.Labels "{CONTENT_LABEL}"}}}}', ref)


def inspect_image(docker: Docker, ref: str) -> dict[str, Any]:
    """What `docker image inspect` says; raises LabError when there is no such image."""
    said = docker.ask("image", "inspect", ref)
    if said is None:
        raise LabError(f"image {ref} is not there", cure="run `python -m e2e.lab up`, or build it")
    return json.loads(said)[0]


def image_id(docker: Docker, ref: str) -> str:
    """The digest of an image's configuration, which the node shows too. Raises LabError when there is no such image."""
    return inspect_image(docker, ref)["Id"]


def tidy_images(task: Task, docker: Docker) -> None:
    """Remove what earlier builds left without a name (5 GB a change of the runtime's dependencies), in our own daemon alone."""
    if docker.ours:
        task.run(["docker", "image", "prune", "--force"], env=docker.environment())
