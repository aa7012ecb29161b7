"""Provider `kind`: one real kubelet in a container of the local Docker daemon.

The node's image store is a folder of the cache, so that a new cluster finds every image that an earlier one had: loading the
runtime image into an empty node takes a minute and more. Imports the standard library and the lab's own modules.
"""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e.lab.docker import Docker
from e2e.lab.dockerimages import image_id
from e2e.lab.errors import LabError
from e2e.lab.images import thin_image
from e2e.lab.nodeimage import NODE_IMAGE, NODE_SOURCES, control_plane_refs
from e2e.lab.paths import LabPaths
from e2e.lab.providers import Capability
from e2e.lab.task import Task
from e2e.lab.thinimage import ThinImage, only_layer
from e2e.lab.versions import read_versions
from e2e.lab.waiting import wait_until

CLUSTER = "weightsync"
NODE = f"{CLUSTER}-control-plane"
NODE_FOLDER = "/var/lib/weightsync"
STORE_FOLDER = "/var/lib/containerd"
CONTENT_FOLDER = f"{STORE_FOLDER}/io.containerd.content.v1.content/blobs"
IMPORT = ("ctr", "--namespace", "k8s.io", "images", "import", "--all-platforms", "-")
READY_TIMEOUT_S = 180
COME_BACK_S = 60.0
SYSTEM_WORKLOADS = ("daemonset/kube-proxy", "deployment/coredns")
# One node, whose disk is busy while images are written: a lost lease would restart the controllers, and nothing here outlives
# the machine, so etcd need not wait for the disk. The form is kubeadm's v1beta3, which kind writes for the pinned version.
CONTROL_PLANE_PATCH = {
    "kind": "ClusterConfiguration",
    "etcd": {"local": {"extraArgs": {"unsafe-no-fsync": "true"}}},
    "controllerManager": {"extraArgs": {"leader-elect": "false"}},
    "scheduler": {"extraArgs": {"leader-elect": "false"}},
}
IMAGE_USER = 10001
# A probe's process may end between being listed and being signalled: one that is gone is no failure, one that refuses is.
SIGNAL_EACH = """signal=$1; shift
for pid; do if kill -s "$signal" "$pid" 2>/dev/null; then echo "$pid"; elif [ -d "/proc/$pid" ]; then exit 1; fi; done"""


class KindProvider:
    """One cluster a machine, named `weightsync`; `registry` says whether kind can pull its own node image."""

    name = "kind"
    capabilities = frozenset(Capability)

    def __init__(self, paths: LabPaths, docker: Docker, *, registry: bool) -> None:
        self._paths = paths
        self._docker = docker
        self._registry = registry
        self.kubeconfig = paths.kubeconfig

    def up(self, task: Task) -> bool:
        """Create the cluster on its image store and wait for the node, DNS and the Service proxy."""
        if self._node_state() == "running":
            self._kind(task, "export", "kubeconfig", "--name", CLUSTER, "--kubeconfig", self.kubeconfig)
            if self._mounts_this_checkout() and self._is_whole(task):
                return True
        self.down(task)  # a node that Docker or the machine stopped does not always come back whole
        self._make_folders()
        image = self._node_image(task)
        config = self._paths.lab / "kind.json"
        config.write_text(json.dumps(self._config(image, self._prepare_store(task, image)), indent=2))
        task.say("creates the cluster")
        argv = [
            "create",
            "cluster",
            "--config",
            config,
            "--kubeconfig",
            self.kubeconfig,
            "--wait",
            f"{READY_TIMEOUT_S}s",
        ]
        self._kind(task, *argv)
        # The second one would have no node of its own.
        task.run([*self._kubectl, "scale", "deployment/coredns", "--replicas=1"])
        for workload in SYSTEM_WORKLOADS:
            task.say(f"waits for {workload}")
            task.run([*self._kubectl, "rollout", "status", workload, f"--timeout={READY_TIMEOUT_S}s"])
        return False

    def down(self, task: Task) -> None:
        """Delete the cluster and its kubeconfig; the image store stays in the cache."""
        if self._node_state() is not None:
            self._kind(task, "delete", "cluster", "--name", CLUSTER, "--kubeconfig", self.kubeconfig)
        self.kubeconfig.unlink(missing_ok=True)

    def load_image(self, task: Task, ref: str) -> bool:
        """Stream an image from Docker into the node, unless the node has the same one under this name.

        Of an image that is a heavy base and the project's layer, only that layer is sent to a node that has the base.
        """
        thin = thin_image(self._docker, ref)
        wanted = thin.image_id if thin else image_id(self._docker, ref)
        if self._node_image_id(ref) == wanted:
            return True
        if thin:
            self._load_thin(task, ref, thin)
        else:
            self._load_whole(task, ref)
        if self._node_image_id(ref) != wanted:
            raise LabError(
                f"{ref} is on the node as {self._node_image_id(ref)}, not {wanted}", cure=f"read {task.log_path}"
            )
        return False

    def _load_whole(self, task: Task, ref: str) -> None:
        task.say(f"loads {ref}")
        self._pipe_images(task, [ref], ["docker", "exec", "--interactive", NODE, *IMPORT])

    def _load_thin(self, task: Task, ref: str, thin: ThinImage) -> None:
        sizes_bytes = self._layer_sizes(thin.base_layers)
        if sizes_bytes is None:
            self._load_whole(task, thin.base_ref)
            sizes_bytes = self._layer_sizes(thin.base_layers)
        if sizes_bytes is None:
            raise LabError(
                f"the node does not keep the layers of {ref} uncompressed", cure="use Docker's classic image store"
            )
        task.say(f"loads the project's layer of {ref}")
        environment = {**os.environ, **self._docker.environment()}
        saved = subprocess.run(
            ["docker", "save", thin.layer_ref], env=environment, capture_output=True, check=True
        ).stdout
        with tempfile.TemporaryFile() as archive:
            thin.write_archive(archive, base_sizes_bytes=sizes_bytes, layer=only_layer(saved))
            archive.seek(0)
            task.run(["docker", "exec", "--interactive", NODE, *IMPORT], env=self._docker.environment(), stdin=archive)

    def _layer_sizes(self, digests: Sequence[str]) -> dict[str, int] | None:
        """The bytes of each layer in the node's content store; None when one is missing."""
        paths = [f"{CONTENT_FOLDER}/{digest.replace(':', '/')}" for digest in digests]
        words = ["docker", "exec", NODE, "stat", "--format", "%s", *paths]
        environment = {**os.environ, **self._docker.environment()}
        answer = subprocess.run(words, env=environment, check=False, capture_output=True, text=True)
        if answer.returncode != 0:
            return None
        return dict(zip(digests, map(int, answer.stdout.split()), strict=True))

    def node_exec(self, argv: Sequence[str]) -> str:
        words = ["docker", "exec", NODE, *argv]
        environment = {**os.environ, **self._docker.environment()}
        answer = subprocess.run(words, env=environment, check=False, capture_output=True, text=True)
        if answer.returncode != 0:
            raise LabError(
                f"`{' '.join(argv)}` on the node ended with {answer.returncode}: {answer.stderr.strip()}",
                cure="does `docker ps` show the node?",
            )
        return answer.stdout

    def signal_container(self, *, namespace: str, pod: str, container: str, signal_name: str) -> tuple[int, ...]:
        labels = {"pod.namespace": namespace, "pod.name": pod, "container.name": container}
        filters = ",".join(f'labels."io.kubernetes.{name}"=={value}' for name, value in labels.items())
        ctr = ["ctr", "--namespace", "k8s.io"]
        known = set(self.node_exec([*ctr, "containers", "ls", "--quiet", filters]).split())
        running = {line.split()[0] for line in self.node_exec([*ctr, "tasks", "ls"]).splitlines() if "RUNNING" in line}
        pids: list[int] = []
        for container_id in sorted(known & running):
            listed = self.node_exec([*ctr, "tasks", "ps", container_id]).splitlines()[1:]
            pids += [int(line.split()[0]) for line in listed]
        signalled = self.node_exec(["sh", "-c", SIGNAL_EACH, "sh", signal_name, *map(str, pids)]).split()
        if not signalled:
            raise LabError(
                f"no running container {namespace}/{pod}/{container} on the node", cure="look at its pod's status"
            )
        return tuple(map(int, signalled))

    @property
    def _kubectl(self) -> list[str | Path]:
        return [self._paths.bin / "kubectl", "--kubeconfig", self.kubeconfig, "--namespace", "kube-system"]

    def _mounts_this_checkout(self) -> bool:
        """Whether the node sees this checkout's data folder: a cluster of another one, or of one that was removed, does not."""
        self._make_folders()
        with tempfile.NamedTemporaryFile(dir=self._paths.data) as marker:
            return self._docker.ask("exec", NODE, "stat", f"{NODE_FOLDER}/data/{Path(marker.name).name}") is not None

    def _is_whole(self, task: Task) -> bool:
        """Whether a cluster that was there before answers its administrator and runs its system workloads, within a deadline.

        An API server that has just come back refuses even the administrator until it has read its roles.
        """
        task.say("waits for the cluster that runs already")

        def refusal() -> str | None:
            for workload in SYSTEM_WORKLOADS:
                words = [*self._kubectl, "rollout", "status", workload, "--watch=false", "--request-timeout=5s"]
                answer = subprocess.run(words, check=False, capture_output=True, text=True)
                if answer.returncode != 0 or "successfully rolled out" not in answer.stdout:
                    return (answer.stderr or answer.stdout).strip()
            return None

        try:
            wait_until(
                "the cluster", refusal, lambda why: why is None, timeout_s=COME_BACK_S, cure="wait", interval_s=0.5
            )
        except LabError as error:
            task.say(f"makes the cluster anew: {error}")
            return False
        return True

    def _node_state(self) -> str | None:
        """Docker's word for the node's container; None when there is none."""
        return self._docker.ask("container", "inspect", "--format", "{{.State.Status}}", NODE)

    def _node_image_id(self, ref: str) -> str | None:
        words = ["docker", "exec", NODE, "crictl", "inspecti", ref]
        environment = {**os.environ, **self._docker.environment()}
        answer = subprocess.run(words, env=environment, check=False, capture_output=True, text=True)
        return json.loads(answer.stdout)["status"]["id"] if answer.returncode == 0 else None

    def _kind(self, task: Task, *words: str | Path) -> None:
        task.run([self._paths.bin / "kind", *words], env=self._docker.environment(), cure="read the log")

    def _node_image(self, task: Task) -> str:
        """The node image, pulled where a registry gives it."""
        if not self._registry:
            return NODE_IMAGE
        ref = read_versions().registry_node
        if self._docker.ask("image", "inspect", ref) is None:
            task.say(f"pulls {ref}")
            task.run(["docker", "pull", ref], env=self._docker.environment())
        return ref

    def _prepare_store(self, task: Task, image: str) -> Path:
        """The node's image store: control plane put in when it is new, leftovers of the last cluster removed.

        One folder an origin of the node image, since a store belongs to its containerd. `.prepared` says what was put in.
        """
        origin = "pulled" if self._registry else "built"
        store = self._paths.cache / "node-store" / origin
        prepared = store / ".prepared"
        refs = (
            [image]
            if self._registry
            else [ref for each in control_plane_refs(read_versions()).values() for ref in each]
        )
        wanted = "\n".join(f"{ref} {image_id(self._docker, ref)}" for ref in refs)
        store.mkdir(parents=True, exist_ok=True)
        if prepared.exists():
            task.say("forgets what the last cluster ran")
            self._store_helper(task, store, image, "prune")
        if prepared.exists() and prepared.read_text() == wanted:
            return store
        if self._registry:
            task.say("copies the node image's own store")
            shutil.rmtree(store)
            store.mkdir()
            self._store_helper(task, store, image, "copy")
        else:
            task.say("imports the control plane's images")
            self._store_helper(task, store, image, "import", saved=refs)
        prepared.write_text(wanted)
        return store

    def _store_helper(self, task: Task, store: Path, image: str, step: str, *, saved: Sequence[str] = ()) -> None:
        """Run node/store.sh on a store that no node uses; `saved` images of Docker go to its standard input."""
        run = [
            "docker", "run", "--rm", "--interactive", "--privileged", "--network", "none",
            "--volume", f"{store}:{STORE_FOLDER if step != 'copy' else '/store'}",
            "--volume", f"{NODE_SOURCES / 'store.sh'}:/store.sh:ro", "--entrypoint", "/store.sh", image, step,
        ]  # fmt: skip
        self._pipe_images(task, saved, run) if saved else task.run(run, env=self._docker.environment())

    def _pipe_images(self, task: Task, refs: Sequence[str], reader: Sequence[str]) -> None:
        """`docker save REFS | READER`, failing when either does."""
        pipe = f"set -o pipefail; {shlex.join(['docker', 'save', *refs])} | {shlex.join(reader)}"
        task.run(["bash", "-c", pipe], env=self._docker.environment())

    def _config(self, image: str, store: Path) -> dict[str, Any]:
        """kind's configuration of the cluster. Without a registry the node image carries a static network of its own."""
        mounts = [
            {"hostPath": str(store), "containerPath": STORE_FOLDER},
            {"hostPath": str(self._paths.models), "containerPath": f"{NODE_FOLDER}/models", "readOnly": True},
            {"hostPath": str(self._paths.data), "containerPath": f"{NODE_FOLDER}/data"},
        ]
        return {
            "kind": "Cluster",
            "apiVersion": "kind.x-k8s.io/v1alpha4",
            "name": CLUSTER,
            "networking": {"disableDefaultCNI": not self._registry},
            "kubeadmConfigPatches": [] if self._registry else [json.dumps(CONTROL_PLANE_PATCH)],
            "nodes": [{"role": "control-plane", "image": image, "extraMounts": mounts}],
        }

    def _make_folders(self) -> None:
        """The folders that pods see; data belongs to the images' user where the lab may say so."""
        self._paths.models.mkdir(parents=True, exist_ok=True)
        self._paths.data.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(self._paths.data, IMAGE_USER, IMAGE_USER)
        else:
            self._paths.data.chmod(0o777)
