"""The images that run in the lab: what each is made of, and building one only when that has changed.

Imports the standard library and the lab's own modules.
"""

import io
import json
import os
import tarfile
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from e2e.lab.content import content_key, files_below
from e2e.lab.docker import Docker
from e2e.lab.dockerimages import CONTENT_LABEL, image_key, inspect_image
from e2e.lab.paths import REPOSITORY, LabPaths
from e2e.lab.task import Task
from e2e.lab.thinimage import ThinImage, layers_of
from e2e.lab.tools import tool_path
from e2e.lab.versions import Versions, read_versions

PROJECT_LAYER_TARGET = "project-layer"
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
BASE_FILES = ("Dockerfile", "constraints.txt", "e2e/lab/images")


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
    """The stage that installs; it gets a name so that `tidy_images` leaves it for the next build."""

    @property
    def base_ref(self) -> str:
        """The name of the image below the project's layer."""
        return self.ref.replace(":", "-base:")

    @property
    def dependencies_ref(self) -> str:
        """The name of the stage that installed the base's packages."""
        return self.ref.replace(":", "-dependencies:")

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


def build_image(task: Task, paths: LabPaths, docker: Docker, name: str, base: str) -> bool:
    """Build one of IMAGES on `base` unless it is there with the same content; returns whether it was."""
    image = IMAGES[name]
    build = _Build(task, paths, docker, image, tuple(_build_arguments(image, read_versions(), base)))
    inputs = [name, docker.ask("image", "inspect", "--format", "{{.Id}}", base) or base, *build.arguments]
    if image.tool:
        inputs.append(str(tool_path(image.tool, paths)))
    key = content_key(*inputs, *(REPOSITORY / each for each in image.files))
    if image_key(docker, image.ref) == key:
        return True
    if image.base_target is None:
        build.target(image.ref, image.target, key=key)
    else:
        _build_layered(build, inputs, key)
    return False


@dataclass(frozen=True)
class _Build:
    """One image's build: what every `docker build` of it shares."""

    task: Task
    paths: LabPaths
    docker: Docker
    image: Image
    arguments: tuple[str, ...]

    def target(self, ref: str, target: str | None, *, key: str | None = None) -> None:
        """Build a target of the image's Dockerfile from a context with the image's files alone."""
        image = self.image
        with tempfile.TemporaryFile() as context:
            files = [REPOSITORY / each for each in image.files]
            _write_context(context, files, tool_path(image.tool, self.paths) if image.tool else None)
            context.seek(0)
            words = ["--network", "host", "--file", image.dockerfile, *(["--target", target] if target else [])]
            self.run(ref, [*words, *self.arguments], context, key=key)

    def run(self, ref: str, words: Sequence[str], stdin: IO[bytes], *, key: str | None) -> None:
        """`docker build` with its context or Dockerfile on standard input."""
        self.task.say(f"builds {ref}")
        label = ["--label", f"{CONTENT_LABEL}={key}"] if key else []
        argv = ["docker", "build", "--tag", ref, *label, *words, "-"]
        self.task.run(argv, env=self.docker.environment(), stdin=stdin, cure="read the log")


def _build_layered(build: _Build, inputs: Sequence[str], key: str) -> None:
    """The base where its own inputs changed, then the project's layer, then the one upon the other.

    This is what the Dockerfile's last target does. Building that target would make the classic builder read the base's 5 GB
    each time, to see that its cache holds.
    """
    image = build.image
    base_key = content_key(*inputs, dependencies_of_project(), *(REPOSITORY / each for each in BASE_FILES))
    if image_key(build.docker, image.base_ref) != base_key:
        build.target(image.dependencies_ref, image.dependencies_target)
        build.target(image.base_ref, image.base_target, key=base_key)
    build.target(image.layer_ref, PROJECT_LAYER_TARGET)
    dockerfile = f"FROM {image.base_ref}\nCOPY --from={image.layer_ref} / /\n"
    with tempfile.TemporaryFile() as text:
        text.write(dockerfile.encode())
        text.seek(0)
        build.run(image.ref, [], text, key=key)


def dependencies_of_project() -> str:
    """The part of pyproject.toml that the heavy layers depend on."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = {name: lines for name, lines in table["project"]["optional-dependencies"].items() if name != "dev"}
    return json.dumps([table["project"]["dependencies"], extras, table["tool"]["uv"]["override-dependencies"]])


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
