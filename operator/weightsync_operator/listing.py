"""What is known of children: lists by resource and kind, asked for again only when something of that kind may have changed.

A pass that asked for all of them each time spent nine of its eleven requests on what had not changed; a restart of a thousand
resources took eleven thousand. Kept are bytes: a thousand resources' children as dictionaries would be half a gigabyte.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence

from weightsync_operator.api.names import LABEL_INSTANCE, LABEL_MANAGED_BY, MANAGED_BY
from weightsync_operator.cluster import RESOURCES, Cluster
from weightsync_operator.fence import clock
from weightsync_operator.plan.build.auth import secret_name
from weightsync_operator.plan.build.context import Manifest

Key = tuple[str, str]
"""(namespace, name) of a WeightSync."""

LISTED = (
    *("ConfigMap", "Service", "ServiceAccount", "Pod", "Deployment"),
    *("StatefulSet", "ControllerRevision", "Job", "PodDisruptionBudget", "NetworkPolicy"),
)
"""Kinds of children that every resource has, or may have, and that are found by their labels."""
WATCHED = frozenset(LISTED) - {"ServiceAccount", "ControllerRevision"}
"""Kinds whose changes `changed` is told of; reading the names of the others is enough, and the next look finds them missing."""
SECRET = "Secret"
"""Read by its name, so that the operator may not list Secrets."""
OURS = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
"""Selects the children of all resources."""
UNWATCHED_S = 45.0
"""Age at which a list of a kind that is not watched is asked for again; less than the time between two looks."""
WATCHED_S = 300.0
"""The same of a watched kind. A watch loses no change; but a child whose label a hand changes leaves one list for another."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a question was asked: by `clock()`, and after how many changes."""

    at: float
    changes: int


@dataclasses.dataclass
class _Answer:
    """The last list of one kind of one resource's children."""

    raw: bytes = b""
    """Empty when it has to be asked for."""
    asked_at: float = 0.0
    changed: int = 0
    """The last change; an answer to a question from before it is not kept."""


class Listings:
    """Of all resources. Losing it costs requests, never correctness."""

    def __init__(self) -> None:
        self._answers: dict[Key, dict[str, _Answer]] = {}
        self._unwatched: set[tuple[str, str | None]] = set()
        """(kind, namespace or None for all) whose watch is down."""
        self._changes = 0

    def now(self) -> Moment:
        """To be taken before a question, and handed over with its answer."""
        return Moment(clock(), self._changes)

    def changed(self, key: Key, kind: str) -> None:
        """An event or a write of our own: the next pass asks again."""
        self._changes += 1
        answer = self._answer(key, kind)
        answer.raw, answer.changed = b"", self._changes

    def watched(self, kind: str, namespace: str | None, *, well: bool) -> None:
        """Whether changes are told, in one namespace or in all; while they are not, nothing is remembered."""
        if well:
            self._unwatched.discard((kind, namespace))
        else:
            self._unwatched.add((kind, namespace))

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        self._answers.pop(key, None)

    def fill(
        self, kind: str, namespace: str | None, asked: Moment, found: Mapping[Key, Sequence[bytes]]
    ) -> Collection[Key]:
        """Take over the whole list of a kind, each child packed, in one namespace or in all.

        Returns the keys of which it says something new.
        """
        news = []
        for key in {*found, *(key for key in self._answers if namespace in (None, key[0]))}:
            answer, raw = self._answer(key, kind), _joined(found.get(key, ()))
            if raw != answer.raw:
                news.append(key)
            if answer.changed <= asked.changes:
                answer.raw, answer.asked_at = raw, asked.at
        return news

    def remembers(self, key: Key, kind: str) -> bool:
        """Whether `list` needs no request."""
        if not self._unwatched.isdisjoint({(kind, None), (kind, key[0])}):
            return False
        answer, lasts_s = self._answer(key, kind), WATCHED_S if kind in WATCHED else UNWATCHED_S
        return bool(answer.raw) and clock() - answer.asked_at <= lasts_s

    async def list(self, cluster: Cluster, key: Key, kind: str, *, fresh: bool = False) -> list[Manifest]:
        """The children of one kind, without `managedFields`; `fresh` ones are asked for in any case."""
        answer = self._answer(key, kind)
        if not fresh and self.remembers(key, kind):
            return json.loads(answer.raw)
        asked = self.now()
        found = await _ask(cluster, key, kind)
        if answer.changed <= asked.changes:
            answer.raw, answer.asked_at = _joined([pack(kind, child) for child in found]), asked.at
        return found

    def _answer(self, key: Key, kind: str) -> _Answer:
        return self._answers.setdefault(key, {}).setdefault(kind, _Answer())


async def _ask(cluster: Cluster, key: Key, kind: str) -> list[Manifest]:
    namespace, name = key
    if kind == SECRET:
        found = await cluster.get(kind, namespace, secret_name(name))
        return [] if found is None else [found]
    return await cluster.list(kind, namespace, f"{OURS},{LABEL_INSTANCE}={name}")


def pack(kind: str, child: Manifest) -> bytes:
    """`kind` is filled in, which a list leaves out; a third of a child is the account of who owns which field."""
    metadata = {name: value for name, value in child["metadata"].items() if name != "managedFields"}
    slim = {**child, "apiVersion": RESOURCES[kind][0], "kind": kind, "metadata": metadata}
    return json.dumps(slim, separators=(",", ":")).encode()


def _joined(packed: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(packed) + b"]"
