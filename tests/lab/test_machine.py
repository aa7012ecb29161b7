"""What the lab reads from the machine, and what it takes back from it."""

from pathlib import Path

import pytest

from e2e.lab import docker
from e2e.lab.docker import lacks_sys_resource
from e2e.lab.errors import LabError
from e2e.lab.hoststate import docker_rule_removals
from e2e.lab.packages import missing_packages
from e2e.lab.paths import LabPaths
from e2e.lab.task import Task

RULES = """\
-P FORWARD DROP
-N DOCKER
-N DOCKER-USER
-N OTHER
-A FORWARD -j DOCKER-USER
-A FORWARD -i weightsync0 ! -o weightsync0 -j ACCEPT
-A FORWARD -i br-1234 -j ACCEPT
-A FORWARD -i eth0 -j OTHER
-A DOCKER-USER -j RETURN
-A OTHER -j ACCEPT
"""


@pytest.mark.parametrize(
    ("bounding_set", "lacks"),
    [
        pytest.param("000001fffeffffff", True, id="bit 24 is off"),
        pytest.param("000001ffffffffff", False, id="all on"),
        pytest.param("0000000001000000", False, id="bit 24 alone"),
        pytest.param("0000000000000000", True, id="none"),
    ],
)
def test_reads_whether_sys_resource_is_in_the_bounding_set(bounding_set: str, lacks: bool) -> None:
    status = f"Name:\tx\nCapEff:\t000001ffffffffff\nCapBnd:\t{bounding_set}\nCapAmb:\t0000000000000000\n"
    assert lacks_sys_resource(status) is lacks


def test_a_status_without_a_bounding_set_is_an_error() -> None:
    with pytest.raises(LabError, match="CapBnd"):
        lacks_sys_resource("Name:\tx\n")


def test_removes_dockers_rules_and_leaves_those_of_others() -> None:
    assert docker_rule_removals(RULES) == [
        ["-D", "FORWARD", "-j", "DOCKER-USER"],
        ["-D", "FORWARD", "-i", "weightsync0", "!", "-o", "weightsync0", "-j", "ACCEPT"],
        ["-D", "FORWARD", "-i", "br-1234", "-j", "ACCEPT"],
        ["-F", "DOCKER"],
        ["-F", "DOCKER-USER"],
        ["-X", "DOCKER"],
        ["-X", "DOCKER-USER"],
    ]


def test_a_pidfile_of_another_program_is_nobody_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = LabPaths(cache=tmp_path, lab=tmp_path / "lab")
    paths.docker.mkdir()
    (paths.docker / "docker.pid").write_text("1")
    stopped: list[int] = []
    monkeypatch.setattr(docker.os, "kill", lambda pid, signal: stopped.append(pid))
    docker.stop_own_docker(Task("stop", tmp_path / "stop.log"), paths)
    assert stopped == []


def test_names_the_packages_that_are_not_installed() -> None:
    assert missing_packages(["base-files", "no-such-package-here"]) == ["no-such-package-here"]
