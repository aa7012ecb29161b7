"""What `up`, `down`, `status`, `load` and `clean` do: the phases of a lab in the order of their needs.

Imports the standard library, rich and the lab's own modules.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from e2e.lab.docker import Docker, ensure_docker, find_docker, require_docker, stop_own_docker
from e2e.lab.dockerimages import ensure_base_image, registry_reachable, tidy_images
from e2e.lab.errors import LabError
from e2e.lab.hoststate import restore_host_state, save_host_state
from e2e.lab.images import IMAGES, build_image
from e2e.lab.nodeimage import build_node_image
from e2e.lab.packages import BUILD_PACKAGES, ensure_packages
from e2e.lab.paths import LAB_SOURCES, LabPaths
from e2e.lab.phases import Phase, run_phases, summary
from e2e.lab.providers import Capability, Provider
from e2e.lab.providers.existing import ExistingProvider, find_kubeconfig
from e2e.lab.providers.kind import KindProvider
from e2e.lab.task import Task
from e2e.lab.tools import TOOLS, build_tool

EMULATED_LABEL = "weightsync.dev/emulated-devices=true"
"""Without it the operator's fabric profile `auto` would take the plug-in's devices for real ones."""
DEVICE_PLUGIN = LAB_SOURCES / "deviceplugin" / "daemonset.yaml"
DEVICES_TIMEOUT_S = 60
CLUSTER_TOOLS = ("kube", "helm", "kind", "coredns", "pause", "rootfs", "modelexpress")
REGISTRY_TOOLS = ("kube", "helm", "kind", "modelexpress")


@dataclass(frozen=True)
class Lab:
    """One checkout's lab; every method is safe to repeat."""

    paths: LabPaths
    console: Console
    provider_name: str = "kind"
    given_kubeconfig: Path | None = None

    def up(self) -> None:
        """Everything: packages, tools, Docker, images, the cluster with its devices, images on the node."""
        phases = self._existing_phases() if self.provider_name == "existing" else self._kind_phases()
        run_phases(phases, self.paths, self.console)
        self.console.print(f"Up: {self._summary()}", highlight=False)
        self.console.print(f"export KUBECONFIG={self.paths.kubeconfig}", highlight=False, soft_wrap=True)

    def build(self, names: Sequence[str]) -> None:
        """Build tools and images by name (all of them without names), and put nothing on a cluster."""
        unknown = sorted(set(names) - TOOLS.keys() - IMAGES.keys())
        if unknown:
            raise LabError(
                f"no tool or image is called {', '.join(unknown)}", cure=f"one of {', '.join([*TOOLS, *IMAGES])}"
            )
        tools = [name for name in names if name in TOOLS] if names else list(TOOLS)
        phases = [self._packages(), *(self._tool(name) for name in tools)]
        images = [name for name in names if name in IMAGES] if names else list(IMAGES)
        if images:
            phases += [phase for phase in self._base_phases() if phase.name not in {each.name for each in phases}]
            phases += [self._image(name, built_tools=tuple(tools)) for name in images]
        run_phases(phases, self.paths, self.console)

    def load(self, names: Sequence[str]) -> None:
        """Build the project's images (or those named) where their content changed, and put them on the node."""
        chosen = list(names) or list(IMAGES)
        phases = []
        for name in chosen:
            if name not in IMAGES:
                raise LabError(f"no image is called {name}", cure=f"one of {', '.join(IMAGES)}")
            phases.append(self._image(name, needs=()))
            phases.append(Phase(f"load {name}", 90, self._load_task(name), (f"image {name}",)))
        run_phases(phases, self.paths, self.console)

    def down(self) -> None:
        """Delete the cluster, stop the lab's own dockerd, and put the machine's settings back. The cache stays."""
        task = Task("down", self.paths.logs / "down.log")
        docker = find_docker(self.paths)
        if self.provider_name == "existing":
            self.provider(docker).down(task)
            return
        if docker is not None:
            KindProvider(self.paths, docker, registry=False).down(task)
            if docker.ours and docker.ask("network", "inspect", "kind") is not None:
                task.run(["docker", "network", "rm", "kind"], env=docker.environment())
        ours = docker is None or docker.ours
        if ours and os.geteuid() == 0:
            stop_own_docker(task, self.paths)
        restore_host_state(self._host_state, remove_chains=ours)
        self.console.print(f"Down. The cache stays in {self.paths.cache}", highlight=False, soft_wrap=True)

    def clean(self) -> None:
        """Remove the cache folder and .lab/; refuses while a cluster or the lab's dockerd still uses them."""
        docker = find_docker(self.paths)
        if self.paths.kubeconfig.exists() or (docker is not None and docker.ours):
            raise LabError("the lab is still up", cure="run `python -m e2e.lab down` first")
        for folder in (self.paths.cache, self.paths.lab):
            self.console.print(f"removes {folder}", highlight=False, soft_wrap=True)
            shutil.rmtree(folder, ignore_errors=True)

    def status(self) -> None:
        """Print what is there: Docker, the cluster's pods and devices, the times of the last `up`."""
        docker = find_docker(self.paths)
        where = (
            "none"
            if docker is None
            else f"{docker.host or 'default socket'}{' (the lab started it)' if docker.ours else ''}"
        )
        self.console.print(f"docker   {where}\ncache    {self.paths.cache}", highlight=False, soft_wrap=True)
        if not self.paths.kubeconfig.exists():
            self.console.print("cluster  none (run `python -m e2e.lab up`)", highlight=False)
            return
        self.console.print(f"cluster  KUBECONFIG={self.paths.kubeconfig}", highlight=False, soft_wrap=True)
        self.console.print(f"up took  {self._summary()}", highlight=False, soft_wrap=True)
        kubectl = [str(self.paths.bin / "kubectl"), "--kubeconfig", str(self.paths.kubeconfig)]
        subprocess.run([*kubectl, "get", "pods", "--all-namespaces", "--output", "wide"], check=False)

    def provider(self, docker: Docker | None = None) -> Provider:
        """The provider chosen, for tests: it needs a cluster that is up."""
        if self.provider_name == "existing":
            return ExistingProvider(self.paths, find_kubeconfig(self.given_kubeconfig))
        found = docker or require_docker(self.paths)
        return KindProvider(self.paths, found, registry=registry_reachable(found))

    @property
    def _host_state(self) -> Path:
        return self.paths.cache / "host-state.json"

    def _summary(self) -> str:
        return summary(json.loads(self.paths.timings.read_text())) if self.paths.timings.exists() else "no timings"

    def _kind_phases(self) -> list[Phase]:
        tools = [self._tool(name) for name in self._tools()]
        made = ("kube", "kind", "coredns", "pause", "rootfs") if not self._registry_known() else ("kube", "kind")
        node = Phase("node image", 120, self._node_image, ("base image", *made))
        cluster = Phase("cluster", 90, self._cluster, ("node image",))
        images = {name: self._image(name, built_tools=tuple(self._tools())) for name in IMAGES}
        loads = [Phase(f"load {name}", 180 if name == "runtime" else 30, self._load_task(name),
                       ("cluster", f"image {name}")) for name in IMAGES]  # fmt: skip
        devices = Phase("devices", DEVICES_TIMEOUT_S, self._devices, ("load deviceplugin",))
        tidy = Phase("tidy", 60, self._tidy, ("node image", *(f"image {name}" for name in IMAGES)))
        early = [phase for phase in tools if phase.name in ("rootfs", "kind", "kube")]
        late = [phase for phase in tools if phase not in early]
        return [
            self._packages(), *self._docker_phases(), *early, self._base(), images["runtime"], *late, node, cluster,
            *(images[name] for name in IMAGES if name != "runtime"), *loads, devices, tidy,
        ]  # fmt: skip

    def _existing_phases(self) -> list[Phase]:
        provider = self.provider()
        return [self._packages(), self._tool("kube"), self._tool("helm"), Phase("cluster", 30, provider.up, ("kube",))]

    def _packages(self) -> Phase:
        def install(task: Task) -> bool:
            return ensure_packages(task, BUILD_PACKAGES, say="to build the lab's tools; no service is started")

        return Phase("packages", 90, install)

    def _docker_phases(self) -> list[Phase]:
        def start(task: Task) -> bool:
            return ensure_docker(task, self.paths, before_start=lambda: save_host_state(self._host_state))

        return [Phase("docker", 90, start, ("packages",))]

    def _base_phases(self) -> list[Phase]:
        return [*self._docker_phases(), self._tool("rootfs"), self._base()]

    def _tools(self) -> Sequence[str]:
        return REGISTRY_TOOLS if self._registry_known() else CLUSTER_TOOLS

    def _registry_known(self) -> bool:
        """Whether a registry is known to answer before Docker is there; a wrong no builds a few tools too many."""
        docker = find_docker(self.paths)
        return registry_reachable(docker) if docker else False

    def _tool(self, name: str) -> Phase:
        return Phase(name, TOOLS[name].budget_s, lambda task: build_tool(name, task, self.paths).cached, ("packages",))

    def _base(self) -> Phase:
        def ensure(task: Task) -> bool:
            docker = require_docker(self.paths)
            return ensure_base_image(task, self.paths, docker, registry=registry_reachable(docker)).cached

        return Phase("base image", 30, ensure, ("docker", *(() if self._registry_known() else ("rootfs",))))

    def _image(self, name: str, *, built_tools: Sequence[str] = (), needs: tuple[str, ...] | None = None) -> Phase:
        def build(task: Task) -> bool:
            docker = require_docker(self.paths)
            base = ensure_base_image(task, self.paths, docker, registry=registry_reachable(docker))
            return build_image(task, self.paths, docker, name, base.ref)

        tool = IMAGES[name].tool
        wanted = ("base image", *((tool,) if tool in built_tools and tool is not None else ()))
        return Phase(f"image {name}", IMAGES[name].budget_s, build, wanted if needs is None else needs)

    def _node_image(self, task: Task) -> bool:
        docker = require_docker(self.paths)
        if registry_reachable(docker):
            return True
        base = ensure_base_image(task, self.paths, docker, registry=False)
        return build_node_image(task, self.paths, docker, base.ref)

    def _tidy(self, task: Task) -> bool:
        tidy_images(task, require_docker(self.paths))
        return False

    def _cluster(self, task: Task) -> bool:
        save_host_state(self._host_state)
        return self.provider().up(task)

    def _load_task(self, name: str) -> Callable[[Task], bool]:
        def load(task: Task) -> bool:
            provider = self.provider()
            if Capability.LOAD_IMAGE not in provider.capabilities:
                raise LabError(
                    f"images cannot be put on a cluster of provider {provider.name}", cure="push them to a registry"
                )
            return provider.load_image(task, IMAGES[name].ref)

        return load

    def _devices(self, task: Task) -> bool:
        """Apply the device plug-in, mark the node as one that pretends, and wait until it offers what the plug-in registers."""
        kubectl = [self.paths.bin / "kubectl", "--kubeconfig", self.paths.kubeconfig]
        before = task.capture([*kubectl, "get", "node", "--output", "jsonpath={.items[*].status.allocatable}"])
        task.run([*kubectl, "label", "node", "--all", "--overwrite", EMULATED_LABEL])
        task.run([*kubectl, "apply", "--server-side", "--filename", DEVICE_PLUGIN])
        condition = "jsonpath={.status.allocatable.nvidia\\.com/gpu}=8"
        task.run([*kubectl, "wait", "node", "--all", f"--for={condition}", f"--timeout={DEVICES_TIMEOUT_S}s"])
        return "nvidia.com/gpu" in before
