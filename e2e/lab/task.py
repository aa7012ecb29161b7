"""What a phase is given to work with: commands whose output goes to the phase's log, and a word on where it stands.

Imports the standard library alone.
"""

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from e2e.lab.errors import LabError

LOG_TAIL_LINES = 12
_running: set[subprocess.Popen[bytes]] = set()
_running_lock = threading.Lock()


class Task:
    """One phase's log and its commands. Used from one thread; `say` may be read from another."""

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self.detail = ""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text("")

    def say(self, detail: str) -> None:
        """Set what the progress line shows behind the name."""
        self.detail = detail
        self._append(f"== {detail}\n")

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int | None = None,
        cure: str = "read the log",
    ) -> None:
        """Run a command to its end, its output appended to the log (or sent to `stdout`); `env` adds to this process's.

        Raises LabError with the command, its status, the end of the log and `cure` when it fails.
        """
        words = [str(word) for word in argv]
        self._append(f"$ {shlex.join(words)}\n")
        with self.log_path.open("ab") as log:
            process = _start(words, {**os.environ, **(env or {})}, cwd, stdin, stdout or log, log, cure)
        with _running_lock:
            _running.add(process)
        try:
            status = process.wait()
        finally:
            with _running_lock:
                _running.discard(process)
        if status != 0:
            raise LabError(
                f"`{shlex.join(words[:6])}` ended with {status}: {self.tail()}", cure=f"{cure} ({self.log_path})"
            )

    def capture(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cure: str = "read the log"
    ) -> str:
        """Like `run`, but returns what the command printed to its standard output."""
        read_end, write_end = os.pipe()
        chunks: list[bytes] = []
        with os.fdopen(read_end, "rb") as reader:
            thread = threading.Thread(target=lambda: chunks.append(reader.read()))
            thread.start()
            with os.fdopen(write_end, "wb") as writer:
                try:
                    self.run(argv, env=env, stdout=writer, cure=cure)
                finally:
                    writer.close()
                    thread.join()
        return b"".join(chunks).decode()

    def tail(self) -> str:
        """The last lines of the log in one line."""
        return " | ".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _append(self, text: str) -> None:
        with self.log_path.open("a") as log:
            log.write(text)


def _start(
    words: list[str],
    env: Mapping[str, str],
    cwd: Path | None,
    stdin: IO[bytes] | int,
    stdout: IO[bytes] | int,
    stderr: IO[bytes],
    cure: str,
) -> subprocess.Popen[bytes]:
    try:
        # A group of its own: an interrupt of the lab ends it with its children, by stop_running().
        return subprocess.Popen(words, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr, process_group=0)
    except FileNotFoundError:
        raise LabError(f"{words[0]} is not on PATH", cure=cure) from None


def stop_running() -> None:
    """End the process group of every command that a Task still runs; for an interrupt by the user."""
    with _running_lock:
        for process in _running:
            os.killpg(process.pid, signal.SIGTERM)
