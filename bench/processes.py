"""CPU seconds of the processes that a bench started, so that what is measured can be told from what plays beside it. Linux."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> dict[str, float]:
    """Since its start, of this process (`bench`) and of each child that runs, by the name of its program."""
    found = defaultdict(float, bench=time.process_time())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            words = stat.with_name("cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == os.getpid():
            found[_name(words)] += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return dict(found)


def spent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """CPU seconds between two looks."""
    return {name: round(seconds - before.get(name, 0.0), 1) for name, seconds in sorted(after.items())}


def _name(words: list[str]) -> str:
    """`kube-apiserver` of a binary of many commands, `weightsync_operator` of a module, else the program."""
    if "-m" in words:
        return words[words.index("-m") + 1]
    program = Path(words[0]).name
    return words[1] if program == "weightsync-kube" and len(words) > 1 else program
