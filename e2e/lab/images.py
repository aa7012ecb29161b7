"""The images that run in the lab: what each is made of, and building one only when that has changed.

Imports the standard library and the lab's own modules.
"""

import functools
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.lab.content import content_key, files_below
from e2e.lab.docker import Docker
from e2e.lab.errors import LabError
from e2e.lab.paths import REPOSITORY, LabPaths
from e2e.lab.task import Task
from e2e.lab.thinimage import ThinImage, layers_of
from e2e.lab.tools import tool_path
from e2e.lab.versions import Versions, read_versions

CONTENT_LABEL = "weightsync.dev/content"
LOCAL_BASE = "weightsync/base:dev"
PROJECT_LAYER_TARGET = "project-layer"
REGISTRY_ENV = "WEIGHTSYNC_LAB_REGISTRY"
REGISTRY_TIMEOUT_S = 20.0
PROJECT_FILES = (
    "Dockerfile",
    "pyproject.toml",
    "README.md",
    "constraints.txt",
    "operator",
    "runtime",
    "examples/smollm2",
    "e2e/lab/images",
)


@dataclass(frozen=True)
class Image:
    """One image of the lab. Paths are relative to the repository."""

    ref: str
    budget_s: float
    dockerfile: str
    files: tuple[str, ...]
    target: str | None = None
    tool: str | None = None
    """A tool of the store whose binary joins the context."""
    base_target: str | None = None
    """The target below the project's layer, for images that consist of a heavy base and that layer."""
    dependencies_target: str | None = None
    """The stage that installs; it gets a name of its own so that `tidy_images` leaves it for the next build."""

    @property
    def base_ref(self) -> str:
        """The name of the image below the project's layer."""
        return self.ref.replace(":", "-base:")

    @property
    def layer_ref(self) -> str:
        """The name of an image that is the project's layer alone."""
        return self.ref.replace(":", "-layer:")


IMAGES: Mapping[str, Image] = {
    "redis": Image(
        "weightsync/redis:dev", 60, "e2e/lab/images/redis.Dockerfile", ("e2e/lab/images/redis.Dockerfile",)
    ),
    "deviceplugin": Image(
        "weightsync/deviceplugin:dev", 60, "e2e/lab/deviceplugin/Dockerfile", ("e2e/lab/deviceplugin", "constraints.txt")
    ),
    "modelexpress": Image(
        "weightsync/modelexpress:dev", 60, "Dockerfile", ("Dockerfile",), target="modelexpress", tool="modelexpress"
    ),
    "operator": Image(
        "weightsync/operator:dev", 120, "Dockerfile", PROJECT_FILES, target="operator", base_target="operator-base",
        dependencies_target="operator-dependencies",
    ),
    "runtime": Image(
        "weightsync/runtime:dev", 300, "Dockerfile", PROJECT_FILES, target="runtime", base_target="runtime-base",
        dependencies_target="runtime-dependencies",
    ),
}  # fmt: skip


@functools.cache
def registry_reachable(docker: Docker) -> bool:
    """Whether a container registry gives the pinned base image; WEIGHTSYNC_LAB_REGISTRY=0 or 1 decides instead of a probe."""
    said = os.environ.get(REGISTRY_ENV)
    if said is not None:
        return said == "1"
    argv = ["docker", "manifest", "inspect", read_versions().registry_base]
    environment = {**os.environ, **docker.environment()}
    try:
        return (
            subprocess.run(
                argv, env=environment, check=False, capture_output=True, timeout=REGISTRY_TIMEOUT_S
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        return False


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


def build_image(task: Task, paths: LabPaths, docker: Docker, name: str, base: str) -> bool:
    """Build one of IMAGES on `base` unless it is there with the same content; returns whether it was."""
    image, versions = IMAGES[name], read_versions()
    arguments = _build_arguments(image, versions, base)
    files = [REPOSITORY / each for each in image.files]
    tool = [str(tool_path(image.tool, paths))] if image.tool else []
    key = content_key(
        name, docker.ask("image", "inspect", "--format", "{{.Id}}", base) or base, *arguments, *tool, *files
    )
    if image_key(docker, image.ref) == key:
        return True
    targets = {image.ref: image.target}
    if image.base_target:
        targets |= {image.base_ref: image.base_target, image.layer_ref: PROJECT_LAYER_TARGET}
        targets |= {image.ref.replace(":", "-dependencies:"): image.dependencies_target}
    label = ["--label", f"{CONTENT_LABEL}={key}"]
    for ref, target in reversed(targets.items()):  # the image itself last: its label says that all are there
        task.say(f"builds {ref}")
        argv = ["docker", "build", "--network", "host", "--file", image.dockerfile, "--tag", ref, *arguments]
        argv += [*(label if ref == image.ref else []), *(["--target", target] if target else []), "-"]
        with tempfile.TemporaryFile() as context:
            _write_context(context, files, tool_path(image.tool, paths) if image.tool else None)
            context.seek(0)
            task.run(argv, env=docker.environment(), stdin=context, cure="read the log")
    return False


def _build_arguments(image: Image, versions: Versions, base: str) -> list[str]:
    values = {"BASE_IMAGE": base}
    if image.dockerfile == "Dockerfile":
        values |= {
            "RUST_IMAGE": base,  # unused: the server comes from the lab's own build
            "MODELEXPRESS": "prebuilt" if image.tool else "none",
            "MODELEXPRESS_VERSION": versions.modelexpress,
            "UV_VERSION": versions.uv,
            "HATCHLING_VERSION": versions.hatchling,
        }
    return [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]


def _write_context(out: io.IOBase, files: Sequence[Path], binary: Path | None) -> None:
    """A build context with just these files, and the machine's CA bundle where one is named by SSL_CERT_FILE."""
    with tarfile.open(fileobj=out, mode="w") as archive:  # pyright: ignore[reportArgumentType]
        for each in files:
            for path in files_below(each):
                _add(archive, path, str(path.relative_to(REPOSITORY)))
        if binary is not None:
            _add(archive, binary, binary.name)
        bundle = os.environ.get("SSL_CERT_FILE")
        if bundle:
            _add(archive, Path(bundle), "ca-bundle.crt")


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file with neither owner nor time, so that the same bytes make the same layer."""
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
    with path.open("rb") as data:
        archive.addfile(info, data)


def tidy_images(task: Task, docker: Docker) -> None:
    """Remove what earlier builds left without a name (5 GB a change of the runtime's dependencies), in our own daemon alone."""
    if docker.ours:
        task.run(["docker", "image", "prune", "--force"], env=docker.environment())


def inspect_image(docker: Docker, ref: str) -> dict[str, Any]:
    """What `docker image inspect` says; raises LabError when there is no such image."""
    said = docker.ask("image", "inspect", ref)
    if said is None:
        raise LabError(f"image {ref} is not there", cure="run `python -m e2e.lab up`, or build it")
    return json.loads(said)[0]


def image_id(docker: Docker, ref: str) -> str:
    """The digest of an image's configuration, which the node shows too. Raises LabError when there is no such image."""
    return inspect_image(docker, ref)["Id"]


def thin_image(docker: Docker, ref: str) -> ThinImage | None:
    """An image of IMAGES as its base and the project's layer; None for one that is not made so."""
    image = next((each for each in IMAGES.values() if each.ref == ref and each.base_target), None)
    if image is None:
        return None
    (top,) = layers_of(inspect_image(docker, image.layer_ref))
    return ThinImage(
        name=f"docker.io/{ref}",
        inspected=inspect_image(docker, ref),
        base_layers=tuple(layers_of(inspect_image(docker, image.base_ref))),
        top_layer=top,
        layer_ref=image.layer_ref,
        base_ref=image.base_ref,
    )
