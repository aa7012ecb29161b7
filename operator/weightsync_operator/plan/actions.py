"""What a pass may do to the cluster. Records only; `apply.py` carries them out in order."""

from __future__ import annotations

import dataclasses

from weightsync_operator.plan.build.context import Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apply:
    """Server-side apply of a stamped manifest."""

    manifest: Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """Let the API server judge manifests of a revision without storing them."""

    revision: str
    manifests: tuple[Manifest, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delete:
    """Delete exactly this object; foreground keeps it until all that it owns is gone."""

    kind: str
    name: str
    uid: str
    foreground: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict:
    """Ask for a pod to be evicted, which its budget may refuse for now."""

    name: str
    uid: str


Action = Apply | DryRun | Delete | Evict
