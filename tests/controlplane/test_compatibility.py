"""What an older release made stays as it is: hashes by which running pods are known, and every field that a manifest may use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.controlplane.builders import make_context
from weightsync_operator.api.crd import custom_resource_definition
from weightsync_operator.plan.hashing import digest
from weightsync_operator.plan.render import preflight_pod, render, revision_of

SNAPSHOT = Path(__file__).parents[1] / "golden" / "crd-v1alpha1.yaml"

STAGED_RDMA: dict[str, Any] = {
    "model": {"name": "org/Tiny-1.0", "hostPath": None, "persistentVolumeClaim": {"claimName": "c", "subPath": "x"}},
    "fabric": {"profile": "hca-shared", "resourceName": "rdma/ib", "count": 8, "ucx": {"UCX_IB_GID_INDEX": "3"}},
    "redis": {"image": "mine/redis:1", "resources": {"requests": {"memory": "1Gi"}}},
    "trainer": {
        "nodes": 2,
        "gpusPerNode": 8,
        "env": [{"name": "STEPS", "value": "24"}],
        "podTemplate": {"spec": {"nodeSelector": {"gpu": "h100"}}},
    },
    "inference": {"replicas": 3, "gpus": 2, "parallelism": {"tp": 2}, "engineArgs": ["--enforce-eager"]},
    "transfer": {"commit": "staged", "staging": "device", "quorum": 2, "format": "bf16"},
}

RELEASED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "minimal": (
        {},
        {
            "revision": "28dbe212f4",
            "session": "0b6e0f0e1111-789e345d",
            "trainer": "f8b5a0ddc9",
            "engine pods": "49977f40fb239c15",
            "trainer pods": "dbd2136aa750a05c",
            "preflight": "ws-preflight-42c8ed5ca6",
        },
    ),
    "emulated": (
        {"fabric": {"profile": "emulated"}, "inference": {"replicas": 2}},
        {
            "revision": "258cad42c3",
            "session": "0b6e0f0e1111-789e345d",
            "trainer": "f8b5a0ddc9",
            "engine pods": "3aad9ded584f49b2",
            "trainer pods": "ac052b668dc1cde3",
            "preflight": "ws-preflight-42c8ed5ca6",
        },
    ),
    "staged over RDMA": (
        STAGED_RDMA,
        {
            "revision": "8f614ad5d4",
            "session": "0b6e0f0e1111-8519403f",
            "trainer": "77028ebad2",
            "engine pods": "62f8e9f8ce528f20",
            "trainer pods": "32065d2bb235523d",
            "preflight": "ws-preflight-4b837a9b9c",
        },
    ),
}
"""Specs of 0.1.0 with what its operator made of them. Never edit a value here: each change is a restart of somebody's fleet."""


def _made(over: dict[str, Any]) -> dict[str, str]:
    ctx = make_context(**over)
    rendered = render(ctx)

    def pods(manifest: dict[str, Any]) -> str:
        """The contract has a version of its own, by which its name changes."""
        return digest(json.dumps(manifest, sort_keys=True).replace(rendered.contract_name, "contract"), 16)

    return {
        "revision": revision_of(ctx.spec, "auth"),
        "session": rendered.session,
        "trainer": rendered.trainer_hash,
        "engine pods": pods(rendered.engines),
        "trainer pods": pods(rendered.trainer),
        "preflight": preflight_pod(ctx, rendered)["metadata"]["name"],
    }


@pytest.mark.failure_mode(44)
@pytest.mark.failure_mode(51)
@pytest.mark.failure_mode(68)
@pytest.mark.parametrize("case", RELEASED)
def test_a_spec_of_the_first_release_is_what_it_was(case: str) -> None:
    """A new field with a default is no change of a spec that does not name it.

    Seen to fail with `later` a plain default.
    """
    over, made = RELEASED[case]
    assert _made(over) == made


@pytest.mark.failure_mode(44)
def test_no_field_of_the_released_crd_is_gone_or_narrower() -> None:
    """The snapshot is replaced at a release: cp charts/weightsync/files/crd.yaml tests/golden/crd-v1alpha1.yaml."""
    released = yaml.safe_load(SNAPSHOT.read_text())
    assert list(_breaks(_root(released), _root(custom_resource_definition()), "")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "string"}, "type"),
        ({"maximum": 3}, "maximum"),
        ({"minimum": 2}, "minimum"),
        ({"enum": ["a"]}, "enum"),
        ({"default": 9}, "default"),
        ({"pattern": "^x$"}, "pattern"),
        ({"required": ["inner"]}, "required"),
        ({"properties": {}}, "gone"),
        ({"x-kubernetes-validations": [{"rule": "self.inner > 1"}]}, "rule"),
    ],
)
def test_what_breaks_a_manifest_is_noticed(change: dict[str, Any], words: str) -> None:
    node = {
        "type": "integer",
        "minimum": 1,
        "maximum": 9,
        "enum": ["a", "b"],
        "default": 1,
        "properties": {"inner": {}},
    }
    assert list(_breaks(node, node, "spec")) == []
    (found,) = _breaks(node, {**node, **change}, "spec")
    assert words in found


def test_what_is_only_wider_is_no_break() -> None:
    node: dict[str, Any] = {"type": "integer", "maximum": 9, "enum": ["a"], "properties": {"inner": {}}}
    wider = {
        "type": "integer",
        "maximum": 10,
        "enum": ["a", "b"],
        "properties": {"inner": {}, "fresh": {}},
        "x-kubernetes-validations": [{"rule": "!has(self.fresh) || self.inner > 1"}],
    }
    assert list(_breaks(node, wider, "spec")) == []


def _root(crd: dict[str, Any]) -> dict[str, Any]:
    (version,) = crd["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


def _breaks(old: dict[str, Any], new: dict[str, Any], path: str) -> Iterator[str]:
    """What a manifest that `old` takes could meet under `new`."""
    if not _kept(old.get("default"), new.get("default")):
        yield f"{path}: default was {old.get('default')!r} and is {new.get('default')!r}"
    for name in ("type", "pattern", "format", "x-kubernetes-list-type", "x-kubernetes-int-or-string"):
        if old.get(name) != new.get(name) and not (name == "pattern" and name not in new):
            yield f"{path}: {name} was {old.get(name)!r} and is {new.get(name)!r}"
    for name in ("maximum", "maxLength", "maxItems", "maxProperties"):
        if name in new and new[name] < old.get(name, -1):
            yield f"{path}: {name} fell from {old[name]} to {new[name]}"
    for name in ("minimum", "minLength", "minItems"):
        if new.get(name, 0) > old.get(name, 0):
            yield f"{path}: {name} rose from {old.get(name, 0)} to {new[name]}"
    if missing := set(old.get("enum", ())) - set(new.get("enum", old.get("enum", ()))):
        yield f"{path}: enum lost {sorted(missing)}"
    if more := set(new.get("required", ())) - set(old.get("required", ())) & set(old.get("properties", ())):
        yield f"{path}: required now {sorted(more)}"
    yield from _stricter_rules(old, new, path)
    for name, child in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            yield f"{path}.{name}: gone"
        else:
            yield from _breaks(child, new["properties"][name], f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(old.get(name), dict):
            yield from _breaks(old[name], new.get(name, {}), f"{path}[]")


def _stricter_rules(old: dict[str, Any], new: dict[str, Any], path: str) -> Iterator[str]:
    """A new rule may speak only where a field or a value takes part that the old schema did not know."""
    known = {rule["rule"] for rule in old.get("x-kubernetes-validations", ())}
    fresh = set(_words(new)) - set(_words(old))
    for rule in new.get("x-kubernetes-validations", ()):
        if rule["rule"] not in known and not any(word in rule["rule"] for word in fresh):
            yield f"{path}: a new rule about fields that were there: {rule['rule']}"


def _words(node: dict[str, Any]) -> Iterator[str]:
    """Fields and enum values of a node and what is in it, as a rule writes them."""
    yield from (f"'{value}'" for value in node.get("enum", ()))
    for name, child in node.get("properties", {}).items():
        yield f".{name}"
        yield from _words(child)


def _kept(old: Any, new: Any) -> bool:
    """A default of an object may come to hold those of new fields."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(name in new and _kept(value, new[name]) for name, value in old.items())
    return old == new
