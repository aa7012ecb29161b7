"""podTemplate is merged as Kubernetes merges, and cannot break what gang and fence depend on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.controlplane.builders import make_context
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.overlay import overlay_pod_template
from weightsync_operator.plan.render import render

BASE = {
    "metadata": {"labels": {"a": "1"}},
    "spec": {
        "containers": [
            {
                "name": "main",
                "image": "i",
                "args": ["x"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
            },
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "tolerations": [{"key": "old"}],
        "terminationGracePeriodSeconds": 10,
    },
}


def _overlay(overlay: dict[str, Any]) -> dict[str, Any]:
    return overlay_pod_template(BASE, overlay, "spec.trainer.podTemplate")


def test_lists_with_keys_merge_by_them() -> None:
    merged = _overlay(
        {
            "spec": {
                "containers": [
                    {"name": "main", "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
                    {"name": "side", "image": "s"},
                ],
                "volumes": [{"name": "data", "hostPath": {"path": "/d"}}],
            }
        }
    )
    main, side = merged["spec"]["containers"]
    assert main["image"] == "i"
    assert side == {"name": "side", "image": "s"}
    assert main["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}]
    assert [volume["name"] for volume in merged["spec"]["volumes"]] == ["tmp", "data"]


def test_lists_without_keys_are_replaced() -> None:
    merged = _overlay({"spec": {"tolerations": [{"key": "new"}], "containers": [{"name": "main", "args": ["y", "z"]}]}})
    assert merged["spec"]["tolerations"] == [{"key": "new"}]
    assert merged["spec"]["containers"][0]["args"] == ["y", "z"]


def test_null_deletes_a_field_and_maps_merge() -> None:
    merged = _overlay({"metadata": {"annotations": {"x": "y"}}, "spec": {"terminationGracePeriodSeconds": None}})
    assert "terminationGracePeriodSeconds" not in merged["spec"]
    assert merged["metadata"] == {"labels": {"a": "1"}, "annotations": {"x": "y"}}


def test_the_rendered_template_is_not_changed() -> None:
    _overlay({"spec": {"containers": [{"name": "main", "image": "other"}]}})
    assert BASE["spec"]["containers"][0]["image"] == "i"


@pytest.mark.parametrize(
    ("overlay", "field"),
    [
        ({"spec": {"$patch": "replace"}}, "spec.$patch"),
        ({"spec": {"volumes": [{"name": "tmp", "$patch": "delete"}]}}, "spec.volumes[0].$patch"),
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.containers[0].name"),
        ({"spec": {"containers": ["main"]}}, "spec.containers[0]"),
        ({"spec": {"restartPolicy": "Always"}}, "spec.restartPolicy"),
        ({"spec": {"subdomain": "elsewhere"}}, "spec.subdomain"),
        ({"metadata": {"labels": {"app.kubernetes.io/instance": "x"}}}, "metadata.labels.app.kubernetes.io/instance"),
        (
            {"spec": {"containers": [{"name": "main", "env": [{"name": "WEIGHTSYNC_EPOCH", "value": "9"}]}]}},
            "spec.containers[0].env[0]",
        ),
    ],
)
def test_what_must_not_be_overridden_is_refused_with_its_path(overlay: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as refused:
        _overlay(overlay)
    assert refused.value.field == f"spec.trainer.podTemplate.{field}"


def test_a_refused_overlay_refuses_the_whole_render() -> None:
    with pytest.raises(SpecError, match=r"spec\.inference\.podTemplate\.spec\.hostname"):
        render(make_context(inference={"podTemplate": {"spec": {"hostname": "x"}}}))


@pytest.mark.parametrize(
    ("overlay", "path"),
    [
        ({"spec": None}, "spec"),
        ({"spec": []}, "spec"),
        ({"metadata": None}, "metadata"),
        ({"metadata": {"labels": None}}, "metadata.labels"),
        ({"metadata": {"labels": ["a"]}}, "metadata.labels"),
        ({"spec": {"containers": None}}, "spec.containers"),
        ({"spec": {"containers": {}}}, "spec.containers"),
        ({"spec": {"containers": 3}}, "spec.containers"),
        ({"spec": {"containers": [{"name": ["main"]}]}}, "spec.containers[0].name"),
        ({"spec": {"containers": [{"name": "main", "env": None}]}}, "spec.containers[0].env"),
        ({"spec": {"containers": [{"name": "main", "env": "A=1"}]}}, "spec.containers[0].env"),
        ({"spec": {"volumes": "v"}}, "spec.volumes"),
    ],
)
def test_what_takes_the_operators_own_fields_away_is_refused_with_its_path(overlay: dict[str, Any], path: str) -> None:
    """The fuzz found the first two: a traceback at every pass. Without its variables a gang would not know its epoch."""
    with pytest.raises(SpecError) as refused:
        _overlay(overlay)
    assert refused.value.field == f"spec.trainer.podTemplate.{path}"
