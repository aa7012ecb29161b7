"""Drift is what somebody changed, never what the API server normalised or somebody added."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.controlplane.builders import make_context
from weightsync_operator.plan.drift import covers, needs_apply
from weightsync_operator.plan.render import render, stamped


def _engines() -> dict[str, Any]:
    return stamped(render(make_context()).engines)


def test_a_child_as_applied_needs_nothing() -> None:
    assert not needs_apply(_engines(), copy.deepcopy(_engines()))


def test_a_missing_child_needs_an_apply() -> None:
    assert needs_apply(_engines(), None)


@pytest.mark.failure_mode(37)
def test_a_hand_edit_is_drift() -> None:
    live = copy.deepcopy(_engines())
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "evil"
    assert needs_apply(_engines(), live)


@pytest.mark.failure_mode(37)
def test_a_removed_list_member_is_drift() -> None:
    live = copy.deepcopy(_engines())
    live["spec"]["template"]["spec"]["containers"][0]["env"].pop()
    assert needs_apply(_engines(), live)


def test_another_render_needs_an_apply_even_if_it_only_takes_something_away() -> None:
    wanted, live = _engines(), copy.deepcopy(_engines())
    del wanted["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    assert needs_apply(stamped({**wanted, "metadata": {**wanted["metadata"], "annotations": {}}}), live)


def test_fields_of_others_are_no_drift() -> None:
    live = copy.deepcopy(_engines())
    live["metadata"]["annotations"]["somebody"] = "else"
    live["spec"]["minReadySeconds"] = 3
    live["spec"]["template"]["spec"]["containers"].insert(0, {"name": "injected", "image": "mesh"})
    live["spec"]["template"]["spec"]["containers"][1]["env"].insert(0, {"name": "INJECTED", "value": "1"})
    assert not needs_apply(_engines(), live)


@pytest.mark.parametrize(
    ("wanted", "live", "same"),
    [
        ({"a": ""}, {}, True),
        ({"a": 0, "b": False, "c": [], "d": {}}, {}, True),
        ({"a": "x"}, {}, False),
        ({"cpu": "1000m"}, {"cpu": "1"}, True),
        ({"memory": "1024Mi"}, {"memory": "1Gi"}, True),
        ({"memory": "1.5Gi"}, {"memory": "1536Mi"}, True),
        ({"memory": "1Gi"}, {"memory": "1G"}, False),
        ({"args": ["a", "b"]}, {"args": ["b", "a"]}, False),
        ({"args": ["a"]}, {"args": ["a", "b"]}, False),
        ({"flag": True}, {"flag": 1}, True),
        ({"ports": [{"port": 1, "protocol": "TCP"}]}, {"ports": [{"port": 1, "protocol": "TCP", "nodePort": 3}]}, True),
        ({"ports": [{"port": 1}]}, {"ports": [{"port": 2, "protocol": "TCP"}, {"port": 1, "protocol": "TCP"}]}, True),
        ({"ports": [{"port": 1}]}, {"ports": [{"port": 2, "protocol": "TCP"}]}, False),
    ],
)
def test_what_the_api_server_normalises_is_the_same(wanted: dict, live: dict, same: bool) -> None:
    assert covers(wanted, live) is same
