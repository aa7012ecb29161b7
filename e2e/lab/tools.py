"""The programs that the lab builds from published source packages: what goes into each, how it is built, its links in bin/.

Imports the standard library and the lab's own modules.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from e2e.lab.content import Built, build_once, content_key
from e2e.lab.errors import LabError
from e2e.lab.paths import LAB_SOURCES, LabPaths, lab_paths
from e2e.lab.task import Task
from e2e.lab.versions import Versions, read_versions

GO_SOURCES = LAB_SOURCES / "go"
KUBE_BINARY = "weightsync-kube"
KUBE_LINKS = ("kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd")
STRIPPED = "-s -w"


@dataclass(frozen=True)
class BuildInputs:
    """What a builder works with: `out` is its empty folder."""

    task: Task
    paths: LabPaths
    versions: Versions
    out: Path


@dataclass(frozen=True)
class Tool:
    """One build of the store; `binary` is the file in it that `ensure_tool` returns."""

    binary: str
    budget_s: float
    inputs: Callable[[Versions], tuple[str | Path, ...]]
    build: Callable[[BuildInputs], None]
    links: Mapping[str, str] = field(default_factory=dict)
    """Name in bin/ -> file in the build."""


def go_environment(paths: LabPaths) -> dict[str, str]:
    """Go's caches inside the lab's, so that `clean` removes them; static binaries, without the checkout's git state."""
    return {
        "GOMODCACHE": str(paths.cache / "go" / "mod"),
        "GOCACHE": str(paths.cache / "go" / "build"),
        "GOFLAGS": "-buildvcs=false -modcacherw",
        "CGO_ENABLED": "0",
    }


def require_program(name: str, cure: str) -> None:
    """Raise LabError with `cure` unless `name` is on PATH."""
    if shutil.which(name) is None:
        raise LabError(f"{name} is not on PATH", cure=cure)


def _go(inputs: BuildInputs, *words: str | Path, gobin: Path | None = None) -> None:
    require_program("go", "install Go 1.26 or newer (Debian 12's golang is too old) and run the same command again")
    env = go_environment(inputs.paths) | ({"GOBIN": str(gobin)} if gobin else {})
    inputs.task.run(["nice", "-n", "5", "go", *words], env=env, cure="is the Go module proxy reachable? read the log")


def _build_kube(inputs: BuildInputs) -> None:
    version = inputs.versions.kubernetes
    major, minor, _ = version.split(".")
    package = "k8s.io/component-base/version"
    stamps = f"-X {package}.gitVersion=v{version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    out = inputs.out / KUBE_BINARY
    _go(inputs, "build", "-C", GO_SOURCES / "kube", "-ldflags", f"{STRIPPED} {stamps}", "-o", out, ".")


def _build_coredns(inputs: BuildInputs) -> None:
    _go(inputs, "build", "-C", GO_SOURCES / "coredns", "-ldflags", STRIPPED, "-o", inputs.out / "coredns", ".")


def _build_pause(inputs: BuildInputs) -> None:
    _go(inputs, "build", "-C", GO_SOURCES / "pause", "-ldflags", STRIPPED, "-o", inputs.out / "pause", ".")


def _build_kind(inputs: BuildInputs) -> None:
    """kind itself, and the files of its node base image, which are part of its module."""
    module = f"sigs.k8s.io/kind@v{inputs.versions.kind}"
    _go(inputs, "install", "-ldflags", STRIPPED, module, gobin=inputs.out)
    files = inputs.paths.cache / "go" / "mod" / module / "images" / "base" / "files"
    shutil.copytree(files, inputs.out / "base-files", symlinks=True)


def _build_helm(inputs: BuildInputs) -> None:
    _go(inputs, "install", "-ldflags", STRIPPED, f"helm.sh/helm/v3/cmd/helm@v{inputs.versions.helm}", gobin=inputs.out)


def _build_modelexpress(inputs: BuildInputs) -> None:
    """The published crate, unoptimised: it holds metadata, no weights pass through it, and -O takes three times as long."""
    require_program("cargo", "install Rust 1.90 or newer (Debian 12's is too old) and run the same command again")
    require_program("protoc", "install protobuf-compiler")
    target = inputs.out / "target"  # of this build alone: cargo goes on when the process that called it was killed
    inputs.task.run(
        ["nice", "-n", "5", "cargo", "install", "modelexpress-server", "--bin", "modelexpress-server",
         "--version", inputs.versions.modelexpress, "--locked", "--no-default-features",
         "--features", inputs.versions.modelexpress_features, "--debug", "--root", inputs.out],
        env={"CARGO_TARGET_DIR": str(target), "CARGO_PROFILE_DEV_DEBUG": "0", "CARGO_PROFILE_DEV_STRIP": "symbols",
             "CARGO_INCREMENTAL": "0"},
        cure="is the crate registry reachable? read the log",
    )  # fmt: skip
    shutil.rmtree(target)


def debian_mirror(suite: str) -> str:
    """The mirror that this machine's apt uses for Debian's `suite`, so that no address is written down here."""
    argv = ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(COMPONENT)", "Created-By: Packages"]
    listed = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        site, codename, component = line.split()
        if codename == suite and component == "main":
            return site
    raise LabError(
        f"apt has no source for Debian {suite} main", cure="add one to /etc/apt/sources.list and run apt-get update"
    )


def _build_rootfs(inputs: BuildInputs) -> None:
    """A minimal Debian as a tar file: the base of every image where no registry gives one."""
    suite = inputs.versions.debian_suite
    root = inputs.out / "root"
    cure = "is Debian's mirror reachable? read the log"
    inputs.task.run(["debootstrap", "--variant=minbase", suite, root, debian_mirror(suite)], cure=cure)
    for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / name)
        (root / name).mkdir()
    inputs.task.run(["tar", "-C", root, "-cf", inputs.out / "root.tar", "."])
    shutil.rmtree(root)


TOOLS: Mapping[str, Tool] = {
    "kube": Tool(
        KUBE_BINARY, 420, lambda v: (v.kubernetes, GO_SOURCES / "kube"), _build_kube,
        dict.fromkeys(KUBE_LINKS, KUBE_BINARY),
    ),
    "modelexpress": Tool(
        "bin/modelexpress-server", 480, lambda v: (v.modelexpress, v.modelexpress_features), _build_modelexpress,
        {"modelexpress-server": "bin/modelexpress-server"},
    ),
    "rootfs": Tool("root.tar", 90, lambda v: (v.debian_suite,), _build_rootfs),
    "kind": Tool("kind", 60, lambda v: (v.kind,), _build_kind, {"kind": "kind"}),
    "coredns": Tool("coredns", 120, lambda v: (GO_SOURCES / "coredns",), _build_coredns),
    "pause": Tool("pause", 20, lambda v: (GO_SOURCES / "pause",), _build_pause),
    "helm": Tool("helm", 240, lambda v: (v.helm,), _build_helm, {"helm": "helm"}),
}  # fmt: skip


def build_tool(name: str, task: Task, paths: LabPaths) -> Built:
    """Build one of TOOLS unless the store has it, and link it in bin/. Returns the build's folder."""
    tool, versions = TOOLS[name], read_versions()
    paths.store.mkdir(parents=True, exist_ok=True)
    paths.bin.mkdir(parents=True, exist_ok=True)
    key = content_key(name, *tool.inputs(versions))
    built = build_once(paths.store, name, key, lambda out: tool.build(BuildInputs(task, paths, versions, out)))
    for link, target in tool.links.items():
        _link(paths.bin / link, built.path / target)
    return built


def tool_path(name: str, paths: LabPaths) -> Path:
    """Where the current build of a tool is, or would be."""
    tool = TOOLS[name]
    return paths.store / f"{name}-{content_key(name, *tool.inputs(read_versions()))}" / tool.binary


def ensure_tool(name: str) -> Path:
    """The tool's file, built first when it is missing (not when WEIGHTSYNC_LAB_BUILD=0: then LabError). For test fixtures."""
    paths = lab_paths()
    path = tool_path(name, paths)
    if path.exists():
        return path
    if os.environ.get("WEIGHTSYNC_LAB_BUILD") == "0":
        raise LabError(
            f"{path} is not built", cure=f"run `python -m e2e.lab build {name}`, or unset WEIGHTSYNC_LAB_BUILD"
        )
    return build_tool(name, Task(name, paths.logs / f"{name}.log"), paths).path / TOOLS[name].binary


def _link(link: Path, target: Path) -> None:
    """Point `link` at `target` in one step, so that a reader never finds it missing."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)
