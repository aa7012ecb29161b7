"""Mutations of valid WeightSyncs, drawn from the CRD's own schema: every field, just inside and just outside its bounds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.controlplane.builders import MINIMAL, merged

CRD = Path(__file__).parents[2] / "charts/weightsync/files/crd.yaml"
FEW = frozenset({"replicas", "nodes"})
"""Numbers of pods: the largest ones that are valid would make thousands."""
BASES: tuple[Mapping[str, Any], ...] = (
    MINIMAL,
    merged(MINIMAL, {"trainer": {"nodes": 2}, "inference": {"replicas": 2, "maxUnavailable": 2}, "transfer": {"commit": "staged"}}),
    merged(
        MINIMAL,
        {
            "suspend": True,
            "trainer": {"podTemplate": {"spec": {"containers": [{"name": "trainer", "env": [{"name": "A", "value": "1"}]}]}}},
            "inference": {"podTemplate": {"metadata": {"labels": {"team": "a"}}, "spec": {"nodeSelector": {"a": "b"}}}},
        },
    ),
)  # fmt: skip

Place = tuple[str, ...]
JUNK: tuple[Any, ...] = (None, "", "x", "\u00e4\n", -1, 0, 2**63, 1.5, True, [], ["x"], {}, {"x": {"y": 1}})
POD_FIELDS: tuple[tuple[Place, Any], ...] = (
    (("spec", "nodeSelectr"), {"a": "b"}), (("spec", "nodeSelector"), ["a"]), (("spec", "nodeSelector"), {"a": 1}),
    (("spec", "containers"), {}), (("spec", "containers"), [{}]), (("spec", "containers"), [{"name": "Trainer!"}]),
    (("spec", "containers"), [{"name": "side"}]), (("spec", "containers"), [{"name": "side", "image": "i"}]),
    (("spec", "containers"), [{"name": "trainer", "env": [{"name": "A"}, {"name": "A"}]}]), (("spec", "containers"), ["x"]),
    (("spec", "containers"), [{"name": "trainer", "resources": {"limits": {"cpu": "many"}}}]), (("spec", "containers"), None),
    (("spec", "containers"), [{"name": "trainer", "ports": [{"containerPort": 0}]}]), (("spec", "volumes"), [{"name": "v"}]),
    (("spec", "volumes"), [{"name": "v", "emptyDir": {}}, {"name": "v", "emptyDir": {}}]), (("spec", "volumes"), "v"),
    (("spec", "tolerations"), [{"operator": "Perhaps"}]), (("spec", "restartPolicy"), "Sometimes"), (("spec", "hostNetwork"), "no"),
    (("spec", "terminationGracePeriodSeconds"), -1), (("spec", "priorityClassName"), 7), (("spec", "$patch"), "delete"),
    (("spec", "securityContext"), {"runAsUser": -5}), (("spec",), None), (("spec",), []), (("metadata",), None), (("metadata",), 3),
    (("metadata", "labels"), {"a b": "c"}), (("metadata", "labels"), {"a": "x" * 64}), (("metadata", "labels"), ["a"]),
    (("metadata", "labels"), {"app.kubernetes.io/name": "x"}), (("metadata", "annotations"), {"a": None}),
    (("status",), {"phase": "x"}),
)  # fmt: skip


def schema_places() -> dict[Place, Mapping[str, Any]]:
    """Each field of `spec` by its path; lists and maps are followed to their elements ("0" and "key")."""
    crd = yaml.safe_load(CRD.read_text())
    (version,) = crd["spec"]["versions"]
    return dict(_walk((), version["schema"]["openAPIV3Schema"]["properties"]["spec"]))


def _walk(place: Place, schema: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    if place:
        yield place, schema
    for name, inner in (schema.get("properties") or {}).items():
        yield from _walk((*place, name), inner)
    if isinstance(schema.get("items"), Mapping):
        yield from _walk((*place, "0"), schema["items"])
    if isinstance(schema.get("additionalProperties"), Mapping):
        yield from _walk((*place, "key"), schema["additionalProperties"])


def _values(place: Place, schema: Mapping[str, Any]) -> Sequence[Any]:
    """Values of the right type around the field's bounds."""
    match schema.get("type"):
        case "integer" | "number":
            low, high = schema.get("minimum", 0), schema.get("maximum", 2**31)
            inside = [low, low + 1, low + 3] + ([] if FEW & set(place) else [high])
            return [value for value in inside if value <= high] + [low - 1, high + 1]
        case "string":
            longest = schema.get("maxLength", 64)
            return [*schema.get("enum", ()), "x", "a-b.c", "x" * longest, "x" * (longest + 1), "/abs/path", "1Gi", " "]
        case "boolean":
            return [True, False]
        case "array":
            return [[], ["x"], ["x"] * (schema.get("maxItems", 8) + 1), [{}]]
        case _:
            return [{}, {"unknown": 1}, {"x": "y"}]


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    """A spec with one to three mutations; some are still valid."""
    spec = copy.deepcopy(dict(draw(st.sampled_from(BASES))))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("value", "value", "value", "junk", "drop", "unknown", "pod", "pod")))
        if kind == "pod":
            role = draw(st.sampled_from(sorted({place[0] for place in PLACES if place[-1] == "podTemplate"})))
            place, value = draw(st.sampled_from(POD_FIELDS))
            _set(spec, (role, "podTemplate", *place), value)
            continue
        place = draw(st.sampled_from(sorted(PLACES)))
        if kind == "drop":
            _drop(spec, place)
        elif kind == "unknown":
            _set(spec, (*place[:-1], "unknownField"), 1)
        else:
            _set(spec, place, draw(st.sampled_from(JUNK if kind == "junk" else _values(place, PLACES[place]))))
    return spec


def _set(spec: dict[str, Any], place: Place, value: Any) -> None:
    """Put a value at a place, making the maps and lists on the way; what stands in the way of them is replaced."""
    here: Any = spec
    for step, following in zip(place, (*place[1:], ""), strict=True):
        last = following == ""
        if isinstance(here, list):
            here[:] = here[:1] or [None]
            if last:
                here[0] = copy.deepcopy(value)
                return
            here[0] = _container(here[0], following)
            here = here[0]
            continue
        here[step] = copy.deepcopy(value) if last else _container(here.get(step), following)
        here = here[step]


def _container(there: Any, following: str) -> Any:
    wanted = list if following == "0" else dict
    return there if isinstance(there, wanted) else wanted()


def _drop(spec: dict[str, Any], place: Place) -> None:
    here: Any = spec
    for step in place[:-1]:
        here = here.get(step) if isinstance(here, dict) else None
    if isinstance(here, dict):
        here.pop(place[-1], None)


PLACES = schema_places()
