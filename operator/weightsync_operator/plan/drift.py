"""Does a live object still hold what was rendered? Pure.

The API server rewrites what it stores: it fills defaults, drops empty values and normalises quantities. None of that is drift;
neither are fields that others added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.names import ANNOTATION_RENDER
from weightsync_operator.plan.overlay import MERGE_KEYS
from weightsync_operator.plan.quantities import exact

_KEYED = {**MERGE_KEYS, "ownerReferences": ("uid",), "ports": ("containerPort", "port", "protocol")}
"""As for an overlay; a Service's ports are keyed by `port`."""
_IDENTITY_DEFAULTS = {"protocol": "TCP"}


def needs_apply(wanted: Mapping[str, Any], live: Mapping[str, Any] | None) -> bool:
    """True when `wanted` (stamped) was never applied, was applied in another form, or was changed by somebody else."""
    if live is None:
        return True
    applied = live["metadata"].get("annotations", {}).get(ANNOTATION_RENDER)
    return applied != wanted["metadata"]["annotations"][ANNOTATION_RENDER] or not covers(wanted, live)


def covers(wanted: Any, live: Any, key: str = "") -> bool:
    """True when every value of `wanted` stands in `live`; more in `live` is no difference."""
    if isinstance(wanted, Mapping):
        there = live if isinstance(live, Mapping) else {}
        return all(covers(value, there.get(name), name) for name, value in wanted.items())
    if isinstance(wanted, list | tuple):
        return _covers_list(list(wanted), live if isinstance(live, list) else [], key)
    if live is None:
        return wanted in (None, "", 0, False)
    return wanted == live or _same_quantity(wanted, live)


def _covers_list(wanted: list[Any], live: list[Any], key: str) -> bool:
    keys = _KEYED.get(key)
    if keys is None or not all(isinstance(member, Mapping) for member in [*wanted, *live]):
        return len(wanted) == len(live) and all(covers(mine, theirs) for mine, theirs in zip(wanted, live, strict=True))
    theirs = {_identity(member, keys): member for member in live}
    return all(covers(member, theirs.get(_identity(member, keys), {})) for member in wanted)


def _identity(member: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(member.get(name, _IDENTITY_DEFAULTS.get(name)) for name in keys)


def _same_quantity(wanted: Any, live: Any) -> bool:
    mine, theirs = exact(wanted), exact(live)
    return mine is not None and mine == theirs
