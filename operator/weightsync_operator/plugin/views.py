"""Text from fetched objects: the tree of children, versions, the last push by phase, and what was verified. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightsync_operator.api.names import LABEL_COMPONENT, LABEL_EPOCH, LABEL_LOST_VERSION, Condition
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.observed import condition, container_states, is_deleting

BAR_WIDTH = 40
_OWNED = (
    *("ServiceAccount", "Secret", "ConfigMap", "ControllerRevision", "Service", "PodDisruptionBudget"),
    *("Deployment", "StatefulSet", "Job", "Pod"),
)
"""Order of the kinds in the tree."""
_TROUBLE: tuple[tuple[str, str], ...] = (
    (Condition.SPEC_VALID, "False"),
    (Condition.FAILED, "True"),
    (Condition.DEGRADED, "True"),
    (Condition.LEDGER_REACHABLE, "False"),
    (Condition.TRANSPORT_VERIFIED, "False"),
    (Condition.SUSPENDED, "True"),
    (Condition.SYNCED, "False"),
    (Condition.SYNCED, "Unknown"),
    (Condition.PROGRESSING, "True"),
)
"""What keeps a fleet from being in sync, the cause before its consequence."""


def status(resource: Manifest, children: Iterable[Manifest]) -> str:
    """Head line, why it is not in sync, and the tree of what belongs to it."""
    shown = resource.get("status") or {}
    lines = [_head(resource, shown), *_why(shown), ""]
    lines += _tree(resource["metadata"]["uid"], list(children))
    return "\n".join(lines)


def _head(resource: Manifest, shown: Mapping[str, Any]) -> str:
    metadata, engines, version = resource["metadata"], shown.get("inference") or {}, shown.get("version") or {}
    trainer = shown.get("trainer") or {}
    wanted = resource["spec"].get("inference", {}).get("replicas", 1)
    return (
        f"WeightSync {metadata['namespace']}/{metadata['name']}: version {version.get('committed', 0)},"
        f" {engines.get('current', 0)} of {wanted} engines hold it, {engines.get('ready', 0)} answer;"
        f" trainer {trainer.get('state', 'Waiting')}, epoch {trainer.get('epoch', 0)}"
    )


def _why(shown: Mapping[str, Any]) -> list[str]:
    conditions = {c["type"]: c for c in shown.get("conditions") or []}
    if not conditions:
        return ["  not looked at yet: does the operator run?"]
    bad = [conditions[type_] for type_, status_ in _TROUBLE if conditions.get(type_, {}).get("status") == status_]
    if not bad:
        return ["  in sync"]
    return [
        f"  {c['type']}={c['status']} {c['reason']}" + (f": {c['message']}" if c.get("message") else "") for c in bad
    ]


def _tree(root_uid: str, children: Sequence[Manifest]) -> list[str]:
    """By controller. Pods of a Deployment belong to its ReplicaSet, which nobody wants to see: they stand below the Deployment."""
    by_owner: dict[str, list[Manifest]] = {}
    known = {child["metadata"]["uid"] for child in children}
    deployments = {_component(child): child["metadata"]["uid"] for child in children if child["kind"] == "Deployment"}
    for child in children:
        owner = _controller(child)
        if owner not in known:
            owner = deployments.get(_component(child), root_uid) if child["kind"] == "Pod" else root_uid
        by_owner.setdefault(str(owner), []).append(child)
    return list(_branches(by_owner, root_uid, ""))


def _component(child: Manifest) -> str:
    return child["metadata"].get("labels", {}).get(LABEL_COMPONENT, "")


def _branches(by_owner: Mapping[str, list[Manifest]], uid: str, indent: str) -> Iterable[str]:
    here = sorted(by_owner.get(uid, []), key=lambda c: (_OWNED.index(c["kind"]), c["metadata"]["name"]))
    for index, child in enumerate(here):
        last = index == len(here) - 1
        yield f"{indent}{'└─ ' if last else '├─ '}{child['kind']} {child['metadata']['name']}{_state(child)}"
        yield from _branches(by_owner, child["metadata"]["uid"], indent + ("   " if last else "│  "))


def _controller(child: Manifest) -> str | None:
    references = child["metadata"].get("ownerReferences") or []
    return next((reference["uid"] for reference in references if reference.get("controller")), None)


def _state(child: Manifest) -> str:
    """How it fares, as far as its kind has a state."""
    words = _STATES.get(child["kind"], lambda _: "")(child)
    if is_deleting(child):
        words = f"{words}, ending" if words else "ending"
    return f": {words}" if words else ""


def _pod(pod: Manifest) -> str:
    shown, restarts = pod.get("status", {}), 0
    for container in shown.get("containerStatuses") or []:
        restarts += container.get("restartCount", 0)
    words = shown.get("phase", "Pending") + (", ready" if condition(pod, "Ready") else "")
    waiting = [state["waiting"].get("reason", "") for state in container_states(pod) if "waiting" in state]
    words += "".join(f", {reason}" for reason in waiting if reason)
    return words + (f", {restarts} restarts" if restarts else "")


def _job(job: Manifest) -> str:
    labels, shown = job["metadata"].get("labels", {}), job.get("status", {})
    lost = labels.get(LABEL_LOST_VERSION)
    what = f"epoch {labels.get(LABEL_EPOCH, '?')}" if lost is None else f"a checkpoint, since version {lost} is lost"
    ended = next((end for end in ("Complete", "Failed") if condition(job, end)), f"{shown.get('active', 0)} active")
    return f"{what}, {ended}"


def _scaled(child: Manifest) -> str:
    shown, wanted = child.get("status", {}), child.get("spec", {}).get("replicas", 1)
    return f"{shown.get('readyReplicas', 0)} of {wanted} ready"


_STATES: Mapping[str, Any] = {"Pod": _pod, "Job": _job, "Deployment": _scaled, "StatefulSet": _scaled}


def versions(resource: Manifest) -> str:
    """Published and committed version, and what each engine holds (the status shows at most 32, laggards first)."""
    shown = resource.get("status") or {}
    version, engines = shown.get("version") or {}, shown.get("inference") or {}
    lines = [f"published {version.get('published', 0)}, committed {version.get('committed', 0)}", ""]
    rows = [
        (replica["name"], str(replica.get("version", "-")), replica["state"], replica.get("reason", ""))
        for replica in shown.get("replicas") or []
    ]
    lines += table(("ENGINE", "VERSION", "STATE", "WHY IT DOES NOT SERVE"), rows)
    hidden = engines.get("replicas", 0) - len(rows)
    return "\n".join(lines + ([f"and {hidden} more, none of them older"] if hidden > 0 else []))


def trace(resource: Manifest) -> str:
    """The last push by phase. The status keeps one; a trainer with `telemetry.traceFolder` keeps files of the last 32."""
    push = (resource.get("status") or {}).get("lastPush")
    if push is None:
        return "no push has ended yet"
    said = f"version {push['version']} (epoch {push['epoch']}, step {push['step']}): {push['outcome']}"
    why = [f"  {push['reason']}"] if push.get("reason") else []
    figures = f"  {push['seconds']:g} s, {push['bytes']} bytes, {push.get('throughput', '')}, pause {push['pauseSeconds']:g} s"
    phases = push.get("phases") or {}
    longest = max(phases.values(), default=0.0)
    width = max(map(len, phases), default=0)
    bars = [f"  {name:<{width}}  {took:8.4f} s  {_bar(took, longest)}".rstrip() for name, took in _in_order(phases)]
    return "\n".join([said, *why, figures, "", *bars])


def _in_order(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    order = ("plan", "convert", "open", "wire", "verify", "commit")
    return sorted(phases.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]))


def _bar(took_s: float, longest_s: float) -> str:
    return "█" * round(BAR_WIDTH * took_s / longest_s) if longest_s > 0 else ""


def verify(resource: Manifest) -> tuple[bool, str]:
    """Whether all that the status can prove is proved, and each proof. `weightsync verify` in a pod measures the memory again."""
    shown = resource.get("status") or {}
    push, conditions = shown.get("lastPush"), {c["type"]: c for c in shown.get("conditions") or []}
    current = shown.get("observedGeneration") == resource["metadata"]["generation"]
    synced, used = _words(conditions, Condition.SYNCED), _words(conditions, Condition.TRANSPORT_VERIFIED)
    proofs = [
        (current, "the status is about the spec as it stands"),
        (push is not None and push["digestOk"], f"every engine measured the last push: {_digest(push)}"),
        (_is_true(conditions, Condition.SYNCED), f"every engine holds the committed version: {synced}"),
        (_is_true(conditions, Condition.TRANSPORT_VERIFIED), f"the fabric was used: {used}"),
    ]
    lines = [f"{'ok ' if held else 'NOT'} {words}" for held, words in proofs]
    return all(held for held, _ in proofs), "\n".join(lines)


def _digest(push: Mapping[str, Any] | None) -> str:
    return "there was none" if push is None else f"version {push['version']}, digest {push['digest'] or 'none'}"


def _is_true(conditions: Mapping[str, Mapping[str, Any]], type_: Condition) -> bool:
    return conditions.get(type_, {}).get("status") == "True"


def _words(conditions: Mapping[str, Mapping[str, Any]], type_: Condition) -> str:
    found = conditions.get(type_)
    return "not known" if found is None else found.get("message") or found["reason"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, as kubectl prints them."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
