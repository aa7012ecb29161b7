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
_NEEDED = (("metadata",), ("metadata", "labels"), ("spec",), ("spec", "containers"))
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
        _refuse_other_shape(merged.get(key), value, here)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = _merge_maps(_as_map(merged.get(key)), value, here)
        elif isinstance(value, list) and key in MERGE_KEYS:
            merged[key] = _merge_lists(merged.get(key) or [], value, MERGE_KEYS[key], here)
        else:
            merged[key] = value
    return merged


def _refuse_other_shape(rendered: Any, value: Any, path: str) -> None:
    """A map or list of the operator's can be added to or deleted, not turned into something else."""
    for shape, words in ((Mapping, "an object"), (list, "a list")):
        if isinstance(rendered, shape) and value is not None and not isinstance(value, shape):
            raise SpecError(path, f"must be {words}, not {type(value).__name__}")


def _as_map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _merge_lists(base: list[Any], over: list[Any], keys: tuple[str, ...], path: str) -> list[Any]:
    merged = [dict(member) for member in base]
    places = {_identity(member, keys): index for index, member in enumerate(merged)}
    for index, member in enumerate(over):
        here = f"{path}[{index}]"
        if not isinstance(member, Mapping):
            raise SpecError(here, f"must be an object with {' and '.join(keys)}, not {type(member).__name__}")
        if keys[0] not in member:
            raise SpecError(f"{here}.{keys[0]}", "is missing: the list is merged by it")
        for key in keys:
            if isinstance(member.get(key), Mapping | list):
                raise SpecError(f"{here}.{key}", "must be a name or a number: the list is merged by it")
        identity = _identity(member, keys)
        if identity in places:
            merged[places[identity]] = _merge_maps(merged[places[identity]], member, here)
        else:
            places[identity] = len(merged)
            merged.append(_merge_maps({}, member, here))
    return merged


def _identity(member: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(member.get(key, _KEY_DEFAULTS.get(key)) for key in keys)


def _is_deleted(overlay: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    """True when the overlay has a null at this path."""
    *above, last = path
    here: Mapping[str, Any] = overlay
    for key in above:
        here = _as_map(here.get(key))
    return last in here and here[last] is None


def _refuse_reserved(overlay: Mapping[str, Any], field: str) -> None:
    for path in _NEEDED:
        if _is_deleted(overlay, path):
            raise SpecError(
                f"{field}.{'.'.join(path)}", "the operator needs what it put there; delete single fields inside"
            )
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
        for index, container in enumerate(_as_list(spec.get(kind))):
            _refuse_env(_as_map(container), f"{field}.spec.{kind}[{index}]")


def _refuse_env(container: Mapping[str, Any], path: str) -> None:
    if _is_deleted(container, ("env",)):
        raise SpecError(f"{path}.env", "the operator sets variables here itself; delete single ones by name")
    for index, variable in enumerate(_as_list(container.get("env"))):
        name = str(_as_map(variable).get("name", ""))
        if re.match(RESERVED_ENV_PATTERN, name):
            raise SpecError(f"{path}.env[{index}]", f"the operator sets {name} itself; leave it out")
