"""Lays a user's podTemplate over a rendered one: maps merge, lists merge by the keys of Kubernetes' OpenAPI, null deletes.

Pure. What a gang or the fence of a push depends on cannot be overridden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.names import RESERVED_LABEL_PREFIXES
from weightsync_operator.api.spec import RESERVED_ENV_PATTERN
from weightsync_operator.plan.errors import SpecError

MERGE_KEYS: Mapping[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
    "imagePullSecrets": ("name",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "resourceClaims": ("name",),
    "claims": ("name",),
    "schedulingGates": ("name",),
}
"""Lists of a pod that merge by key; every other list (args, tolerations, envFrom, ...) is replaced as a whole."""

_KEY_DEFAULTS = {"protocol": "TCP"}
_FORBIDDEN_FIELDS = ("restartPolicy", "hostname", "subdomain", "setHostnameAsFQDN")


def overlay_pod_template(rendered: Mapping[str, Any], overlay: Mapping[str, Any], field: str) -> dict[str, Any]:
    """`overlay` over `rendered`, both PodTemplateSpecs. Raises SpecError with the path below `field`."""
    _refuse_reserved(overlay, field)
    return _merge_maps(rendered, overlay, field)


def _merge_maps(base: Mapping[str, Any], over: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        here = f"{path}.{key}"
        if key.startswith("$"):
            raise SpecError(
                here, "patch directives are refused; null deletes a field, a list without merge key is replaced"
            )
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = _merge_maps(_as_map(merged.get(key)), value, here)
        elif isinstance(value, list) and key in MERGE_KEYS:
            merged[key] = _merge_lists(merged.get(key) or [], value, MERGE_KEYS[key], here)
        else:
            merged[key] = value
    return merged


def _as_map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _merge_lists(base: list[Any], over: list[Any], keys: tuple[str, ...], path: str) -> list[Any]:
    merged = [dict(member) for member in base]
    places = {_identity(member, keys): index for index, member in enumerate(merged)}
    for index, member in enumerate(over):
        here = f"{path}[{index}]"
        if not isinstance(member, Mapping):
            raise SpecError(here, f"must be an object with {' and '.join(keys)}, not {type(member).__name__}")
        if keys[0] not in member:
            raise SpecError(f"{here}.{keys[0]}", "is missing: the list is merged by it")
        identity = _identity(member, keys)
        if identity in places:
            merged[places[identity]] = _merge_maps(merged[places[identity]], member, here)
        else:
            places[identity] = len(merged)
            merged.append(_merge_maps({}, member, here))
    return merged


def _identity(member: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(member.get(key, _KEY_DEFAULTS.get(key)) for key in keys)


def _refuse_reserved(overlay: Mapping[str, Any], field: str) -> None:
    labels = _as_map(_as_map(overlay.get("metadata")).get("labels"))
    for label in labels:
        if label.startswith(RESERVED_LABEL_PREFIXES):
            raise SpecError(
                f"{field}.metadata.labels.{label}", "the operator finds its pods by this label; choose another"
            )
    spec = _as_map(overlay.get("spec"))
    for name in _FORBIDDEN_FIELDS:
        if name in spec:
            raise SpecError(f"{field}.spec.{name}", "the operator sets this field itself; leave it out")
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(spec.get(kind) or []):
            _refuse_env(_as_map(container), f"{field}.spec.{kind}[{index}]")


def _refuse_env(container: Mapping[str, Any], path: str) -> None:
    for index, variable in enumerate(container.get("env") or []):
        name = str(_as_map(variable).get("name", ""))
        if re.match(RESERVED_ENV_PATTERN, name):
            raise SpecError(f"{path}.env[{index}]", f"the operator sets {name} itself; leave it out")
