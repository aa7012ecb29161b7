"""A stream of requests to the engines' Service from a pod in the cluster, and what became of each."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from e2e.demo.kubectl import Kubectl, Manifest

ASKER = Path(__file__).with_name("asker.py")
RETRIED = {
    "abort",
    "503",
    "ECONNREFUSED",
    "ECONNRESET",
    "EPIPE",
    "EHOSTUNREACH",
    "RemoteDisconnected",
    "IncompleteRead",
}
"""What a client of a fleet asks again after: an engine that is behind, that ends, or that has ended."""
NOTICE_S = 3.5
"""An engine that was no member of a push learns of its version with its next heartbeat, each third of a lease of 9 s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Try:
    """One request of one user; times in seconds of the client's clock."""

    user: int
    began: float
    ended: float
    result: str
    """HTTP status, the name of an error, or "abort"."""
    version: str
    """`X-Weight-Version`: one version, or the first and the last one; empty where nothing was answered."""

    @property
    def versions(self) -> list[int]:
        return [int(number) for number in self.version.split("-") if number]


class Stream:
    """One client in a pod, asking until it is stopped."""

    def __init__(self, kubectl: Kubectl, *, service: str, port: int, image: str) -> None:
        self._kubectl = kubectl
        kubectl.apply({"apiVersion": "v1", "kind": "ConfigMap", **_code()})
        kubectl.apply(_pod(image, service, port))

    def tries(self) -> list[Try]:
        """All so far."""
        lines = self._kubectl.run("logs", ASKER.stem).splitlines()
        return [Try(**json.loads(line)) for line in lines if line.startswith("{")]

    def wait_answers(self, more: int, timeout_s: float = 120.0) -> None:
        """Until so many more requests are answered. Raises AssertionError with the last tries when they are not."""
        wanted, deadline = len(_answers(self._tries_or_none())) + more, time.monotonic() + timeout_s
        while len(_answers(self._tries_or_none())) < wanted:
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{more} more answers: not within {timeout_s:.0f} s; last {self._tries_or_none()[-3:]}"
                )
            time.sleep(1.0)

    def stop(self) -> None:
        self._kubectl.delete("pod", ASKER.stem)
        self._kubectl.delete("configmap", ASKER.stem)

    def _tries_or_none(self) -> list[Try]:
        pod = self._kubectl.get("pod", ASKER.stem) or {}
        return self.tries() if pod.get("status", {}).get("phase") == "Running" else []


def unanswered(tries: Sequence[Try]) -> list[Try]:
    """The tries of users who got no answer, but the last one's, who may still ask; and those that no retry explains."""
    answered = {t.user for t in tries if t.result == "200"}
    return [
        t for t in tries if (t.result != "200" and t.result not in RETRIED) or t.user not in {*answered, tries[-1].user}
    ]


def stale(tries: Sequence[Try]) -> list[tuple[Try, Try]]:
    """Pairs of an answer and one by older weights that was asked for later than `NOTICE_S` after it."""
    answers = _answers(tries)
    return [
        (newer, older)
        for i, newer in enumerate(answers)
        for older in answers[i + 1 :]
        if older.began > newer.ended + NOTICE_S and older.versions[0] < newer.versions[0]
    ]


def _answers(tries: Sequence[Try]) -> list[Try]:
    return [t for t in tries if t.result == "200"]


def _code() -> Manifest:
    return {"metadata": {"name": ASKER.stem}, "data": {ASKER.name: ASKER.read_text()}}


def _pod(image: str, service: str, port: int) -> Manifest:
    container = {
        "name": "asker",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", f"/asker/{ASKER.name}", service, str(port)],
        "volumeMounts": [{"name": "asker", "mountPath": "/asker"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": ASKER.stem},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "asker", "configMap": {"name": ASKER.stem}}],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001},
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
        },
    }
