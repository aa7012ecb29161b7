"""What ran where: every result says the command, the commit and the machine that it came from. Standard library only."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def about() -> dict[str, Any]:
    """Of this process, for the head of its report."""
    return {
        "command": _command(),
        "commit": os.environ.get("WEIGHTSYNC_COMMIT") or commit_of(Path.cwd()),
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "loop_seconds": round(loop_seconds(), 3),
        "python": platform.python_version(),
    }


def loop_seconds() -> float:
    """Of two million additions, the least of three times: what two runs can be compared by, since a machine that is shared with
    others is at times half as fast.
    """
    return min(timeit.repeat("for i in range(2_000_000): total += i", "total = 0", number=1, repeat=3))


def _command() -> str:
    """As typed, but for folders, which are places on one machine."""
    words = [Path(sys.executable).name, *sys.orig_argv[1:]]
    return " ".join(
        "DIR" if before in ("--out", "--against") else word for before, word in zip(["", *words], words, strict=False)
    )


def save(name: str, report: dict[str, Any], folder: Path) -> Path:
    """Write a report as JSON and return its place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def peak_bytes() -> int:
    """The most memory that this process ever had resident (VmHWM), which a new program begins at zero."""
    return _status_kib("VmHWM") * 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def commit_of(checkout: Path) -> str:
    """The commit that is checked out there, with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "HEAD") + "+" * bool(changed)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
