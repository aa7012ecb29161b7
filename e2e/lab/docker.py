"""Finds a Docker daemon, or starts the lab's own beside none, and stops that one again.

The lab's daemon keeps everything under <cache>/docker, has its own bridge, and outlives the process that started it. Imports
the standard library and the lab's own modules.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from e2e.lab.errors import LabError
from e2e.lab.packages import DOCKER_PACKAGES, ensure_packages
from e2e.lab.paths import LAB_SOURCES, LabPaths
from e2e.lab.task import Task
from e2e.lab.waiting import wait_until

BRIDGE = "weightsync0"
BRIDGE_ADDRESS = "172.29.0.1/24"
NETWORK_POOL = (
    "base=172.30.0.0/16,size=24"  # kind's network; 172.17/16, Docker's own first choice, may be another daemon's
)
CAP_SYS_RESOURCE = 24
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
MAX_SOCKET_PATH_BYTES = 107
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Docker:
    """A daemon that answers."""

    host: str
    """A value for DOCKER_HOST; empty means the client's own default."""
    ours: bool

    def environment(self) -> dict[str, str]:
        """What docker, kind and the classic builder read. BuildKit needs a plug-in that Debian's client has not."""
        return {"DOCKER_BUILDKIT": "0"} | ({"DOCKER_HOST": self.host} if self.host else {})

    def ask(self, *words: str) -> str | None:
        """What a docker command prints, or None when it fails (no such image, no such container)."""
        answer = subprocess.run(
            ["docker", *words], check=False, env={**os.environ, **self.environment()}, capture_output=True, text=True
        )
        return answer.stdout.strip() if answer.returncode == 0 else None


def _answers(docker: Docker) -> bool:
    return shutil.which("docker") is not None and bool(docker.ask("version", "--format", "{{.Server.Version}}"))


def _own(paths: LabPaths) -> Docker:
    return Docker(f"unix://{paths.docker / 'docker.sock'}", ours=True)


def find_docker(paths: LabPaths) -> Docker | None:
    """The daemon of DOCKER_HOST or the default socket, else the lab's own when it runs, else None."""
    for docker in (Docker(os.environ.get("DOCKER_HOST", ""), ours=False), _own(paths)):
        if _answers(docker):
            return Docker(docker.host, ours=docker.host == _own(paths).host)
    return None


def require_docker(paths: LabPaths) -> Docker:
    """Like `find_docker`, but raises LabError where nothing answers."""
    docker = find_docker(paths)
    if docker is None:
        raise LabError(
            "no Docker daemon answers", cure="run `python -m e2e.lab up`, which starts one, or start your own"
        )
    return docker


def lacks_sys_resource(status_text: str) -> bool:
    """Whether the capability bounding set in a /proc/PID/status text lacks CAP_SYS_RESOURCE."""
    for line in status_text.splitlines():
        if line.startswith("CapBnd:"):
            return not int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1
    raise LabError("/proc/self/status has no CapBnd line", cure="is this Linux?")


def ensure_docker(task: Task, paths: LabPaths, *, before_start: Callable[[], None]) -> bool:
    """Make sure that a daemon answers, by installing and starting one where needed; returns whether one did already.

    `before_start` is called when the machine is about to be changed by a daemon of the lab.
    """
    if find_docker(paths) is not None:
        return True
    if os.geteuid() != 0:
        raise LabError("no Docker daemon answers and this is not root", cure="start Docker, or set DOCKER_HOST")
    ensure_packages(task, DOCKER_PACKAGES, say="to run the cluster's node as a container")
    before_start()
    task.say(f"starts dockerd with its data in {paths.docker}")
    _make_bridge(task)
    _start_dockerd(paths)
    return False


def _make_bridge(task: Task) -> None:
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        task.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        task.run(["ip", "address", "add", BRIDGE_ADDRESS, "dev", BRIDGE])
    task.run(["ip", "link", "set", BRIDGE, "up"])


def _dockerd_argv(paths: LabPaths) -> list[str]:
    argv = [
        "dockerd", "--host", _own(paths).host, "--data-root", str(paths.docker / "data"),
        "--exec-root", str(paths.docker / "exec"), "--pidfile", str(paths.docker / "docker.pid"),
        "--bridge", BRIDGE, "--default-address-pool", NETWORK_POOL,
    ]  # fmt: skip
    if lacks_sys_resource(Path("/proc/self/status").read_text()):
        wrapper = LAB_SOURCES / "runc-without-sys-resource"
        argv += ["--add-runtime", f"without-sys-resource={wrapper}", "--default-runtime", "without-sys-resource"]
    return argv


def _start_dockerd(paths: LabPaths) -> None:
    socket_path = paths.docker / "docker.sock"
    if len(str(socket_path)) > MAX_SOCKET_PATH_BYTES:
        raise LabError(f"{socket_path} is too long for a socket", cure="set WEIGHTSYNC_CACHE to a shorter path")
    paths.docker.mkdir(parents=True, exist_ok=True)
    log_path = paths.docker / "dockerd.log"
    with log_path.open("ab") as log:
        # A session of its own: it must not end with the shell, the test or the make that started it.
        process = subprocess.Popen(
            _dockerd_argv(paths), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd="/"
        )

    def state() -> str:
        if process.poll() is not None:
            last = log_path.read_text(errors="replace").splitlines()[-3:]
            raise LabError(f"dockerd ended with {process.returncode}: {' | '.join(last)}", cure=f"read {log_path}")
        return "answers" if _answers(_own(paths)) else "does not answer"

    cure = f"read {log_path}"
    wait_until("dockerd", state, lambda said: said == "answers", timeout_s=START_TIMEOUT_S, cure=cure, interval_s=0.2)


def stop_own_docker(task: Task, paths: LabPaths) -> None:
    """Stop the lab's dockerd by its pid, wait until it is gone, then remove its mounts and its bridge. The data stays."""
    pid = _own_pid(paths)
    if pid is not None:
        task.say(f"stops dockerd, pid {pid}")
        os.kill(pid, signal.SIGTERM)
        wait_until(
            "dockerd's end", lambda: _own_pid(paths), lambda left: left is None, timeout_s=STOP_TIMEOUT_S,
            cure=f"read {paths.docker / 'dockerd.log'}",
        )  # fmt: skip
        _remove_empty_cgroups()
    for mount in sorted(_mounts_below(paths.docker), reverse=True):
        task.run(["umount", mount])
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        task.run(["ip", "link", "delete", BRIDGE])


def _remove_empty_cgroups() -> None:
    """dockerd leaves its (now empty) parent groups behind, one a hierarchy; one that is in use refuses to go."""
    for top in (CGROUPS / "docker", *CGROUPS.glob("*/docker")):
        if not top.is_dir():
            continue
        for folder in sorted((path for path in (top, *top.rglob("*")) if path.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()


def _own_pid(paths: LabPaths) -> int | None:
    """The pid of the lab's dockerd; None when its pidfile is missing or names another program."""
    try:
        pid = int((paths.docker / "docker.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return pid if str(paths.docker / "docker.pid").encode() in command else None


def _mounts_below(folder: Path) -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        target = line.split()[1].encode().decode("unicode_escape")
        if Path(target).is_relative_to(folder):
            yield target
