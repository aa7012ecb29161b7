"""kubectl as a library: the demo talks to the cluster as its users do. Imports the standard library and the lab's error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from e2e.lab.errors import LabError

Manifest = dict[str, Any]
EXEC_TRIES = 3


class Kubectl:
    """One cluster and one namespace."""

    def __init__(self, *, program: Path, kubeconfig: Path, namespace: str) -> None:
        self._base = [str(program), "--kubeconfig", str(kubeconfig), "--namespace", namespace]

    def run(self, *words: str, stdin: str | None = None, timeout_s: float = 60.0) -> str:
        """What the command prints. Raises LabError with kubectl's last line when it fails or takes too long."""
        shown = " ".join(words)[:100]
        try:
            answer = subprocess.run(
                [*self._base, *words], input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"`kubectl {shown}` took more than {timeout_s:.0f} s", cure="is the node alive?") from None
        if answer.returncode != 0:
            said = answer.stderr.strip().splitlines() or ["(nothing said)"]
            raise LabError(f"`kubectl {shown}` ended with {answer.returncode}: {said[-1]}", cure="look at the cluster")
        return answer.stdout

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, or None where there is none."""
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, selector: str) -> list[Manifest]:
        """Objects with these labels."""
        return json.loads(self.run("get", kind, "-l", selector, "-o", "json"))["items"]

    def apply(self, manifest: Manifest) -> None:
        self.run("apply", "-f", "-", stdin=json.dumps(manifest))

    def delete(self, kind: str, name: str, *, timeout_s: float = 120.0) -> None:
        """Delete and wait until it is gone; nothing to delete is no error."""
        self.run(
            "delete",
            kind,
            name,
            "--ignore-not-found",
            "--wait",
            f"--timeout={timeout_s:.0f}s",
            timeout_s=timeout_s + 10,
        )

    def python(
        self, pod: str, script: str, *, stdin: str = "", container: str | None = None, timeout_s: float = 60.0
    ) -> Any:
        """Run a Python script in a pod and return the JSON that it prints last. The script may be run again.

        `kubectl exec` now and then ends with 0 and none of the output, when the stream closes before it was read: another try.
        """
        where = [pod] if container is None else [pod, "-c", container]
        for _ in range(EXEC_TRIES):
            printed = self.run("exec", "-i", *where, "--", "python", "-c", script, stdin=stdin, timeout_s=timeout_s)
            if printed.strip():
                return json.loads(printed.strip().splitlines()[-1])
        raise LabError(
            f"`kubectl exec {pod}` gave no output, {EXEC_TRIES} times",
            cure=f"kubectl logs {pod}; is it being replaced?",
        )
