"""The kind node image for machines without a container registry, and the control plane's images that run on it.

Imports the standard library and the lab's own modules.
"""

import shutil
import tempfile
from pathlib import Path

from e2e.lab.content import content_key
from e2e.lab.docker import Docker
from e2e.lab.dockerimages import CONTENT_LABEL, image_key
from e2e.lab.paths import LAB_SOURCES, LabPaths
from e2e.lab.task import Task
from e2e.lab.tools import tool_path
from e2e.lab.versions import Versions, read_versions

NODE_SOURCES = LAB_SOURCES / "node"
NODE_IMAGE = "weightsync/node:dev"
KUBERNETES_PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy")


def control_plane_refs(versions: Versions) -> dict[str, tuple[str, ...]]:
    """Target of node/Dockerfile -> the names under which kubeadm and containerd ask for it."""
    tag = f"v{versions.kubernetes}"
    programs = [f"registry.k8s.io/{name}:{tag}" for name in KUBERNETES_PROGRAMS]
    return {
        "kubernetes": (*programs, f"registry.k8s.io/etcd:{versions.etcd_tag}"),
        "coredns": (f"registry.k8s.io/coredns/coredns:{versions.coredns_tag}",),
        "pause": tuple(f"registry.k8s.io/pause:{each}" for each in versions.pause_tags),
    }


def build_node_image(task: Task, paths: LabPaths, docker: Docker, base: str) -> bool:
    """Build NODE_IMAGE and the control plane's images unless they are there; returns whether they were."""
    versions = read_versions()
    tools = [tool_path(name, paths) for name in ("kube", "coredns", "pause", "kind")]
    base_id = docker.ask("image", "inspect", "--format", "{{.Id}}", base) or base
    refs = {**control_plane_refs(versions), "node": (NODE_IMAGE,)}
    key = content_key(base_id, str(refs), NODE_SOURCES, *(str(each) for each in tools))
    if all(image_key(docker, ref) == key for names in refs.values() for ref in names):
        return True
    with tempfile.TemporaryDirectory(prefix="weightsync-node-") as folder:
        context = Path(folder)
        shutil.copytree(NODE_SOURCES, context, dirs_exist_ok=True)
        for tool in tools[:3]:
            (context / tool.name).hardlink_to(tool) if _same_device(tool, context) else shutil.copy(tool, context)
        shutil.copytree(tools[3].parent / "base-files", context / "base-files")
        for target, names in refs.items():
            task.say(f"builds {names[0]}")
            tags = [word for name in names for word in ("--tag", name)]
            task.run(
                ["docker", "build", "--network", "host", "--target", target, *tags, "--build-arg", f"BASE_IMAGE={base}",
                 "--build-arg", f"KUBERNETES_VERSION={versions.kubernetes}", "--label", f"{CONTENT_LABEL}={key}", folder],
                env=docker.environment(),
            )  # fmt: skip
    return False


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev
