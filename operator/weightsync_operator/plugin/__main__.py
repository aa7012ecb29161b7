"""The command `kubectl-weightsync`, which kubectl finds on PATH as `kubectl weightsync`.

It reads objects with the rights of the kubeconfig and needs neither the operator nor Redis' password; `logs` is kubectl's own.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from kubernetes.aio.config import kube_config
from kubernetes.aio.config.config_exception import ConfigException

from weightsync_operator.api.names import LABEL_COMPONENT, LABEL_INSTANCE, LABEL_MANAGED_BY, MANAGED_BY, Component
from weightsync_operator.cluster import ApiError, ApiUnavailable, Cluster
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plugin import views

CHILDREN = (
    *("ServiceAccount", "ConfigMap", "ControllerRevision", "Service", "PodDisruptionBudget", "Deployment"),
    *("StatefulSet", "Job", "Pod"),
)
"""Kinds in the tree. Secrets are not read: who may see a status need not see passwords."""
ROLES: Mapping[str, str] = {
    "trainer": Component.TRAINER,
    "inference": Component.INFERENCE,
    "redis": Component.REDIS,
    "mx": Component.MODEL_EXPRESS,
    "preflight": Component.PREFLIGHT,
    "restore": Component.RESTORE,
}

_options = [
    click.argument("name"),
    click.option("-n", "--namespace", help="Namespace; else that of the context."),
    click.option("--context", help="Context of the kubeconfig; else its current one."),
    click.option("--kubeconfig", help="Path; else $KUBECONFIG, else ~/.kube/config."),
]


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look at a WeightSync: its parts, its versions, its last push."""


@main.command()
@_common
def status(name: str, **where: str | None) -> None:
    """The tree of its children with their states, and why it is not in sync."""
    resource, children = _read(name, where, children=True)
    click.echo(views.status(resource, children))


@main.command()
@_common
def versions(name: str, **where: str | None) -> None:
    """Published and committed version, and what each engine holds."""
    click.echo(views.versions(_read(name, where)[0]))


@main.command()
@_common
def trace(name: str, **where: str | None) -> None:
    """The last push by phase, as the status keeps it."""
    click.echo(views.trace(_read(name, where)[0]))


@main.command()
@_common
def verify(name: str, **where: str | None) -> None:
    """What the status proves about the weights that are served; exit code 1 when something is not proved."""
    proved, text = views.verify(_read(name, where)[0])
    click.echo(text)
    sys.exit(0 if proved else 1)


@main.command()
@_common
@click.argument("role", type=click.Choice(list(ROLES)), default="trainer")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@click.option("--tail", default=100, show_default=True, help="Lines of each pod.")
def logs(name: str, role: str, follow: bool, tail: int, **where: str | None) -> None:
    """Logs of all pods of one role, by kubectl."""
    command = ["kubectl", *(f"--{key}={value}" for key, value in where.items() if value), "logs", "--prefix"]
    command += ["--selector", f"{LABEL_INSTANCE}={name},{LABEL_COMPONENT}={ROLES[role]}", f"--tail={tail}"]
    command += ["--all-containers", "--max-log-requests=64", *(["--follow"] if follow else [])]
    try:
        os.execvp("kubectl", command)
    except FileNotFoundError as error:
        raise click.ClickException("kubectl is not on PATH: logs are read by it") from error


def _read(name: str, where: dict[str, str | None], *, children: bool = False) -> tuple[Manifest, list[Manifest]]:
    """The resource, and if asked for everything that carries its label. Ends with one line when it cannot be read."""
    try:
        return asyncio.run(_fetch(name, where, children))
    except ConfigException as error:
        raise click.ClickException(f"kubeconfig: {error}") from error
    except (ApiError, ApiUnavailable) as error:
        raise click.ClickException(str(error)) from error


async def _fetch(name: str, where: dict[str, str | None], children: bool) -> tuple[Manifest, list[Manifest]]:
    kubeconfig = where["kubeconfig"] or os.environ.get("KUBECONFIG") or str(Path.home() / ".kube/config")
    namespace = where["namespace"] or _namespace(kubeconfig, where["context"])
    async with await Cluster.connect(kubeconfig, context=where["context"], user_agent="kubectl-weightsync") as cluster:
        resource = await cluster.get("WeightSync", namespace, name)
        if resource is None:
            raise click.ClickException(f"there is no WeightSync {name} in namespace {namespace}")
        if not children:
            return resource, []
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_INSTANCE}={name}"
        lists = await asyncio.gather(*(cluster.list(kind, namespace, selector) for kind in CHILDREN))
        return resource, [child for found in lists for child in found]


def _namespace(kubeconfig: str, context: str | None) -> str:
    contexts, current = kube_config.list_kube_config_contexts(config_file=kubeconfig)
    listed: list[Any] = list(contexts or [])
    chosen: Any = next((each for each in listed if each["name"] == context), current)
    return chosen["context"].get("namespace") or "default"


if __name__ == "__main__":
    main()
