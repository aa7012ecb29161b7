"""A cluster that runs already: used when it answers as a whole one, made anew when it does not. kind and kubectl are scripts."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.lab.docker import Docker
from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths
from e2e.lab.providers import kind
from e2e.lab.task import Task

FORBIDDEN = 'daemonsets is forbidden: User "kubernetes-admin" cannot get resource "daemonsets"'


@dataclass(frozen=True)
class DockerWithANode(Docker):
    """Knows one container, and it runs. `mounted` is the folder that the container sees as data."""

    mounted: Path

    def ask(self, *words: str) -> str | None:
        if words[:2] == ("container", "inspect"):
            return "running"
        if words[:3] == ("exec", kind.NODE, "stat"):
            return "a file" if (self.mounted / Path(words[3]).name).exists() else None
        return None


class Stage:
    """A provider whose programs write down what they are called with; kubectl is refused `refusals` times first."""

    def __init__(self, folder: Path, *, refusals: int = 0, mounted: Path | None = None) -> None:
        self.paths = LabPaths(cache=folder / "cache", lab=folder / "lab")
        self.paths.bin.mkdir(parents=True)
        self.calls = folder / "calls"
        self.calls.touch()
        self._script("kind", f'echo "kind $1" >> {self.calls}; test "$1" != create')
        count = f"grep -c kubectl {self.calls}"
        refuse = f"if [ $({count}) -le {refusals} ]; then echo '{FORBIDDEN}' >&2; exit 1; fi"
        self._script("kubectl", f"echo kubectl >> {self.calls}; {refuse}; echo successfully rolled out")
        docker = DockerWithANode(host="", ours=False, mounted=mounted or self.paths.data)
        self.provider = kind.KindProvider(self.paths, docker, registry=True)
        self.task = Task("cluster", self.paths.logs / "cluster.log")

    def _script(self, name: str, body: str) -> None:
        program = self.paths.bin / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    def kind_commands(self) -> list[str]:
        return [line.removeprefix("kind ") for line in self.calls.read_text().splitlines() if line.startswith("kind")]


def test_a_cluster_that_refuses_its_administrator_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """Seen to fail where `up` returned once kind had exported the kubeconfig."""
    stage = Stage(tmp_path, refusals=2)
    assert stage.provider.up(stage.task)
    assert stage.kind_commands() == ["export"]
    assert stage.calls.read_text().splitlines().count("kubectl") == 2 + len(kind.SYSTEM_WORKLOADS)


@pytest.fixture
def no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` gets as far as `kind create`, at which the script fails: behind everything that these tests are about."""
    monkeypatch.setattr(kind.KindProvider, "_node_image", lambda self, task: "image")
    monkeypatch.setattr(kind.KindProvider, "_prepare_store", lambda self, task, image: tmp_path)


@pytest.mark.usefixtures("no_images")
def test_a_cluster_of_another_checkout_is_made_anew(tmp_path: Path) -> None:
    """Seen to fail where only the cluster's answers counted: pods would read and write the other checkout's folders."""
    stage = Stage(tmp_path, mounted=tmp_path / "other")
    with pytest.raises(LabError, match="create"):
        stage.provider.up(stage.task)
    assert stage.kind_commands() == ["export", "delete", "create"]


@pytest.mark.usefixtures("no_images")
def test_a_cluster_that_never_answers_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "COME_BACK_S", 0.2)
    stage = Stage(tmp_path, refusals=1000)
    with pytest.raises(LabError, match="create"):
        stage.provider.up(stage.task)
    assert stage.kind_commands() == ["export", "delete", "create"]
    assert FORBIDDEN in stage.task.log_path.read_text()
