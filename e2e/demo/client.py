"""A pod that asks the service what its users would ask: through the Service's name, and each engine by its address.

The pod holds nothing but Python. It also has the example's data folder, to hold the trainer back until the untrained service
was heard. Imports the standard library and the demo's kubectl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from e2e.demo.kubectl import Kubectl
from e2e.lab.errors import LabError
from e2e.lab.waiting import wait_until

POD = "weightsync-demo-client"
DATA_ON_NODE = "/var/lib/weightsync/data"
ASK_TIMEOUT_S = 240.0

ASK = """
import json, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor

def ask(request):
    data = json.dumps(request["body"]).encode()
    wanted = urllib.request.Request(request["url"], data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(wanted, timeout=120) as answer:
            return {"status": answer.status, "body": json.load(answer)}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read().decode()[:300]}
    except OSError as error:
        return {"status": 0, "body": str(error)}

lanes = json.load(sys.stdin)
with ThreadPoolExecutor(len(lanes)) as pool:
    print(json.dumps(list(pool.map(lambda lane: [ask(request) for request in lane], lanes))))
"""
"""Lanes of requests in, lanes of answers out; lanes run beside each other, the requests of one after each other."""

HOLD = """
import pathlib, shutil, sys
folder = pathlib.Path("/data") / sys.stdin.read()
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
(folder / "hold").touch()
print("{}")
"""
RELEASE = """
import pathlib, sys
(pathlib.Path("/data") / sys.stdin.read() / "hold").unlink(missing_ok=True)
print("{}")
"""

Request = Mapping[str, Any]


class Client:
    """The asking pod, once it runs."""

    def __init__(self, kubectl: Kubectl, *, image: str) -> None:
        self._kubectl = kubectl
        self._image = image

    def start(self) -> None:
        """Bring the pod up, a new one. Raises LabError when it does not run in time."""
        self.end()
        self._kubectl.apply(pod(self._image))
        wait_until(
            f"pod {POD} runs",
            lambda: (self._kubectl.get("pod", POD) or {}).get("status", {}),
            lambda status: status.get("phase") == "Running",
            timeout_s=90.0,
            cure=f"kubectl describe pod {POD}: is the image loaded, the data folder there?",
            interval_s=0.5,
        )

    def end(self) -> None:
        """Remove the pod."""
        self._kubectl.delete("pod", POD)

    def hold(self, example: str) -> None:
        """Empty the example's data folder, and make its trainer wait before the first push."""
        self._kubectl.python(POD, HOLD, stdin=example)

    def release(self, example: str) -> None:
        """Let the trainer begin."""
        self._kubectl.python(POD, RELEASE, stdin=example)

    def ask(self, lanes: Sequence[Sequence[Request]]) -> list[list[dict[str, Any]]]:
        """The bodies of the answers. Raises LabError with the first answer that is not a 200."""
        answers = self._kubectl.python(POD, ASK, stdin=json.dumps(lanes), timeout_s=ASK_TIMEOUT_S)
        for lane, requests in zip(answers, lanes, strict=True):
            for answer, request in zip(lane, requests, strict=True):
                if answer["status"] != 200:
                    raise LabError(
                        f"{request['url']} answered {answer['status']}: {answer['body']}",
                        cure="kubectl get ws, kubectl get pods",
                    )
        return [[answer["body"] for answer in lane] for lane in answers]


def pod(image: str) -> dict[str, Any]:
    """The manifest of the asking pod: no token, no capability, not root."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "client",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "args": ["sleep", "infinity"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                }
            ],
            "volumes": [{"name": "data", "hostPath": {"path": DATA_ON_NODE, "type": "Directory"}}],
        },
    }
