"""Debian packages that the lab needs on the machine itself: says what is missing, and installs it where it may.

Imports the standard library and the lab's own modules.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from e2e.lab.errors import LabError
from e2e.lab.task import Task

BUILD_PACKAGES = ("debootstrap", "protobuf-compiler", "openssl", "ca-certificates", "redis-server", "build-essential")
DOCKER_PACKAGES = ("docker.io", "iptables", "iproute2")
POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICES = "#!/bin/sh\n# Written by WeightSync's lab while it installs packages: start no service.\nexit 101\n"


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those of `names` that dpkg does not call installed."""
    argv = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Abbrev}\n", *names]
    listed = subprocess.run(argv, check=False, capture_output=True, text=True).stdout
    present = {line.split()[0] for line in listed.splitlines() if line.split()[1:] == ["ii"]}
    return [name for name in names if name not in present]


def ensure_packages(task: Task, names: Sequence[str], *, say: str) -> bool:
    """Install what is missing of `names`; returns whether nothing was. `say` tells the user what they are for.

    Raises LabError with the list where the lab may not install: not root, or not Debian or Ubuntu. No service is started.
    """
    if shutil.which("dpkg-query") is None:
        raise LabError(
            f"this is no Debian or Ubuntu, so {', '.join(names)} cannot be installed", cure=f"install them: {say}"
        )
    missing = missing_packages(names)
    if not missing:
        return True
    if os.geteuid() != 0:
        raise LabError(
            f"{', '.join(missing)} are not installed and this is not root", cure=f"apt-get install them: {say}"
        )
    task.say(f"installs {' '.join(missing)} ({say})")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    with _services_held():
        task.run(["apt-get", "update"], env=environment, cure="is Debian's mirror reachable? read the log")
        argv = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        task.run(argv, env=environment, cure="read the log")
    return False


@contextmanager
def _services_held() -> Iterator[None]:
    """Keep packages such as redis-server and docker.io from starting their services; the lab runs its own."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text(NO_SERVICES)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
