"""One resource for all cluster tests: chart installed, model there, SmolLM2 pushed every few seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from e2e.cluster.stream import Stream
from e2e.demo.kubectl import Kubectl, Manifest
from e2e.demo.model import ensure_model
from e2e.demo.setup import install_chart
from e2e.demo.timeline import Step
from e2e.lab.docker import require_docker
from e2e.lab.lab import Lab
from e2e.lab.paths import REPOSITORY, lab_paths
from e2e.lab.providers import Provider

EXAMPLE = REPOSITORY / "examples" / "smollm2" / "weightsync.yaml"
PUSHER = Path(__file__).with_name("pusher.py")
NAMESPACE = "weightsync-e2e"
NAME = "smollm2"
ENGINE_START_S = 300.0
"""An engine, from its process to its first answer, while two trainer ranks keep two cores busy."""


def wait_for(what: str, fetch: Callable[[], Any], timeout_s: float) -> Any:
    """The first true value of `fetch`; fails with the last one seen when none came in time."""
    deadline, last = time.monotonic() + timeout_s, None
    while time.monotonic() < deadline:
        last = fetch()
        if last:
            return last
        time.sleep(1.0)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s; last seen {last!r}")


class Resource:
    """The WeightSync under test, and what the tests do to it."""

    def __init__(self, kubectl: Kubectl, provider: Provider) -> None:
        self.kubectl = kubectl
        self.provider = provider

    def get(self) -> Manifest:
        return self.kubectl.get("weightsync", NAME) or {}

    @property
    def status(self) -> dict[str, Any]:
        return self.get().get("status", {})

    @property
    def committed(self) -> int:
        return self.status.get("version", {}).get("committed", 0)

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})

    @property
    def kubectl_namespace(self) -> str:
        return NAMESPACE

    def pods(self, component: str) -> list[Manifest]:
        return self.kubectl.list("pods", f"app.kubernetes.io/instance={NAME},app.kubernetes.io/component={component}")

    def engines(self) -> list[Manifest]:
        return self.pods("inference")

    def trainer_pods(self) -> list[Manifest]:
        return self.pods("trainer")

    def trainer_pod(self, rank: int) -> str:
        index = "batch.kubernetes.io/job-completion-index"
        return next(
            pod["metadata"]["name"] for pod in self.trainer_pods() if pod["metadata"]["labels"][index] == str(rank)
        )

    def component_pod(self, component: str) -> Manifest:
        return self.pods(component)[0]

    def suspend(self, suspend: bool) -> None:
        self.change_spec(suspend=suspend)

    def change_spec(self, **fields: Any) -> None:
        """Lay fields over the spec."""
        self.kubectl.run("patch", "weightsync", NAME, "--type=merge", f"--patch={json.dumps({'spec': fields})}")

    def events(self, reason: str) -> list[str]:
        """What the resource's events of this reason say."""
        uid = self.get()["metadata"]["uid"]
        selector = f"involvedObject.uid={uid},reason={reason}"
        answer = self.kubectl.run("get", "events", f"--field-selector={selector}", "--output=json")
        return [event["message"] for event in json.loads(answer)["items"]]

    def engine_images(self) -> frozenset[str]:
        """What the engines' pods run."""
        return frozenset(pod["spec"]["containers"][0]["image"] for pod in self.engines())

    def another_name_of(self, image: str) -> str:
        """A second name of an image on the node: what changes is the name alone."""
        images = ["ctr", "--namespace", "k8s.io", "images"]
        known = self.provider.node_exec([*images, "ls", "--quiet"]).split()
        full = next(name for name in known if name.endswith(f"/{image}"))
        self.provider.node_exec([*images, "tag", "--force", full, f"{full}-renamed"])
        return f"{image}-renamed"

    def engine_state(self, pod: str) -> dict[str, Any]:
        """What the engine itself says, asked from inside its pod."""
        script = (
            "import json, urllib.request as u;"
            "t = open('/var/run/weightsync/endpoint-token').read().strip();"
            "q = u.Request('http://127.0.0.1:8000/weightsync/v1/state', headers={'Authorization': 'Bearer ' + t});"
            "print(json.dumps(json.load(u.urlopen(q, timeout=10))))"
        )
        return self.kubectl.python(pod, script, container="engine")

    def wait_in_sync(self, *, above: int, replicas: int = 2, timeout_s: float = ENGINE_START_S) -> dict[str, Any]:
        """Wait until a version greater than `above` is committed and every replica is ready with it."""

        def in_sync() -> dict[str, Any] | None:
            status = self.status
            ready = status.get("inference", {}).get("ready", 0)
            synced = next((c["status"] for c in status.get("conditions", []) if c["type"] == "Synced"), "")
            newer = status.get("version", {}).get("committed", 0) > above
            return status if newer and ready == replicas and synced == "True" else None

        try:
            return wait_for(f"a version above {above} on {replicas} replicas", in_sync, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.diagnosis()}") from None

    def kill(self, pod: str, container: str) -> None:
        """kill -9 of a container's processes, from the node."""
        self.provider.signal_container(namespace=NAMESPACE, pod=pod, container=container, signal_name="KILL")

    def diagnosis(self) -> str:
        """What a person would look at first."""
        parts = [json.dumps(self.status, indent=1), self.kubectl.run("get", "pods", "-o", "wide")]
        for pod in self.kubectl.list("pods", f"app.kubernetes.io/instance={NAME}"):
            parts.append(f"===== {pod['metadata']['name']}")
            parts.append(self.kubectl.run("logs", pod["metadata"]["name"], "--tail=25", "--all-containers"))
        return "\n".join(parts)


def pushing_manifest() -> Manifest:
    """The example with a trainer that only pushes, and without end."""
    manifest = yaml.safe_load(EXAMPLE.read_text())
    manifest["metadata"]["namespace"] = NAMESPACE
    trainer = manifest["spec"]["trainer"]
    trainer["command"], trainer["args"] = ["python", "/pusher/pusher.py"], ["/models/smollm2"]
    trainer["podTemplate"] = {
        "spec": {
            "containers": [{"name": "trainer", "volumeMounts": [{"name": "pusher", "mountPath": "/pusher"}]}],
            "volumes": [{"name": "pusher", "configMap": {"name": PUSHER.stem}}],
        }
    }
    # Four attempts of a push outlast the start of an engine, also where two of them and the trainer share two slow cores.
    manifest["spec"]["transfer"] = {"timeoutSeconds": 120}
    return manifest


@pytest.fixture(scope="session")
def lab_cluster() -> tuple[Kubectl, Provider]:
    """The lab's cluster with operator and model; `python -m e2e.lab up` made it."""
    paths = lab_paths()
    if not paths.kubeconfig.exists():
        pytest.fail("there is no cluster: run `make lab-up` first (`make test` does)", pytrace=False)
    console, started = Console(stderr=True), time.monotonic()
    ensure_model(Step(console, "model", 120, started), docker=require_docker(paths), paths=paths)
    install_chart(Step(console, "chart", 120, started), paths)
    kubectl = Kubectl(program=paths.bin / "kubectl", kubeconfig=paths.kubeconfig, namespace=NAMESPACE)
    return kubectl, Lab(paths, console).provider()


@pytest.fixture(scope="module")
def namespace(lab_cluster: tuple[Kubectl, Provider]) -> Iterator[tuple[Kubectl, Provider]]:
    """An empty namespace of this module's own."""
    kubectl, _ = lab_cluster
    kubectl.delete("namespace", NAMESPACE)
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    yield lab_cluster
    kubectl.delete("namespace", NAMESPACE)


@pytest.fixture(scope="module")
def resource(namespace: tuple[Kubectl, Provider]) -> Resource:
    """The resource, applied; the first test waits for it."""
    kubectl, provider = namespace
    code = {"metadata": {"name": PUSHER.stem}, "data": {PUSHER.name: PUSHER.read_text()}}
    kubectl.apply({"apiVersion": "v1", "kind": "ConfigMap", **code})
    kubectl.apply(pushing_manifest())
    return Resource(kubectl, provider)


@pytest.fixture
def stream(resource: Resource) -> Iterator[Stream]:
    """A client that asks the engines while the test runs."""
    (image,) = resource.engine_images()
    stream = Stream(resource.kubectl, service=f"{NAME}-inference", port=8000, image=image)
    yield stream
    stream.stop()
