"""`python -m weightsync_operator` as a process of its own: started, asked, frozen, killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.controlplane.builders import DEFAULTS, KEY
from tests.controlplane.kube import tail, wait_until
from tests.fixtures.servers import free_port

EXIT_DEADLINE_S = 10.0
"""The grace period of the chart: later, SIGKILL ends it."""


@dataclasses.dataclass
class OperatorProcess:
    """A running operator."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def page(self, path: str) -> tuple[int, str]:
        """Status and text of one of its pages; status 0 while it does not answer. Raises AssertionError when it ended."""
        assert self.process.poll() is None, f"the operator ended with {self.process.returncode}:\n{tail(self.log)}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_ready(self, words: str = "leads") -> None:
        what = f"the operator {words}"
        wait_until(what, lambda: self.page("/readyz"), lambda answer: answer == (200, f"{words}\n"))

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM, and its exit code. Raises AssertionError when it does not end in time."""
        self.process.terminate()
        try:
            return self.process.wait(EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"SIGTERM did not end the operator in {EXIT_DEADLINE_S:.0f} s:\n{tail(self.log)}"
            ) from None


@contextlib.contextmanager
def start_operator(kubeconfig: Path, folder: Path, ledger_port: int, **environment: str) -> Iterator[OperatorProcess]:
    """An operator with the rights of `kubeconfig`; whatever still runs of it at the end is killed."""
    folder.mkdir(exist_ok=True)
    (folder / "key").write_bytes(KEY)
    port, log = free_port(), folder / "log"
    environ = {
        "WEIGHTSYNC_IMAGE_RUNTIME": DEFAULTS.runtime_image,
        "WEIGHTSYNC_IMAGE_REDIS": DEFAULTS.redis_image,
        "WEIGHTSYNC_IMAGE_MODELEXPRESS": DEFAULTS.model_express_image,
        "WEIGHTSYNC_OPERATOR_KEY_FILE": str(folder / "key"),
        "WEIGHTSYNC_PORT": str(port),
        "WEIGHTSYNC_LEDGER_ADDRESS": f"127.0.0.1:{ledger_port}",
        "KUBECONFIG": str(kubeconfig),
        **environment,
    }
    command = [sys.executable, "-m", "weightsync_operator"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=out, stderr=out)
    try:
        yield OperatorProcess(process, port, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
