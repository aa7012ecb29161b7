"""The CRD on a real API server takes what is good and refuses what is bad, by the words of the field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.controlplane.builders import MINIMAL, merged
from tests.controlplane.kube import Kube
from weightsync_operator.api.names import API_VERSION, PLURAL

GOOD: dict[str, dict[str, Any]] = {
    "minimal": {},
    "example": {
        "model": {"name": "smollm2", "hostPath": "/var/lib/weightsync/models/smollm2"},
        "fabric": {"profile": "emulated"},
        "trainer": {"nodes": 2, "gpusPerNode": 1, "env": [{"name": "STEPS", "value": "24"}]},
        "inference": {
            "replicas": 2,
            "gpus": 1,
            "parallelism": {"tp": 1},
            "engineArgs": ["--max-model-len", "512", "--enforce-eager"],
        },
    },
    "claim": {"model": {"hostPath": None, "persistentVolumeClaim": {"claimName": "models", "subPath": "a/b"}}},
    "path": {"model": {"hostPath": None, "path": "/opt/model"}},
    "rdma": {"fabric": {"profile": "hca-shared", "resourceName": "rdma/ib", "count": 8, "ucx": {"UCX_TLS": "rc"}}},
    "none": {"inference": {"replicas": 0, "gpus": 0}},
    "template": {"trainer": {"podTemplate": {"spec": {"anything": {"goes": ["here"]}}}}},
    "staged": {
        "inference": {"replicas": 3},
        "transfer": {
            "commit": "staged",
            "staging": "pinnedHost",
            "stagingBudgetGiB": 64,
            "quorum": 3,
            "verify": "sampled",
            "prefixCache": "keep",
        },
    },
    "a quorum, and no engine yet": {"inference": {"replicas": 0}, "transfer": {"quorum": 2}},
    "resources": {"redis": {"resources": {"requests": {"cpu": 1, "memory": "1Gi"}}}},
}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model source": ({"model": {"hostPath": None}}, "exactly one of path, hostPath and persistentVolumeClaim"),
    "two model sources": ({"model": {"path": "/opt/model"}}, "exactly one of path, hostPath and persistentVolumeClaim"),
    "no trainer": ({"trainer": None}, "spec.trainer"),
    "no command": ({"trainer": {"command": []}}, "spec.trainer.command"),
    "negative replicas": ({"inference": {"replicas": -1}}, "spec.inference.replicas"),
    "too many replicas": ({"inference": {"replicas": 501}}, "spec.inference.replicas"),
    "unknown fabric": ({"fabric": {"profile": "carrier-pigeon"}}, "spec.fabric.profile"),
    "device for tcp": ({"fabric": {"resourceName": "rdma/ib"}}, "profile tcp uses no device"),
    "ucx name": ({"fabric": {"ucx": {"TLS": "rc"}}}, "ucx takes variables named UCX_*"),
    "tp over gpus": ({"inference": {"gpus": 1, "parallelism": {"tp": 2}}}, "parallelism.tp needs that many gpus"),
    "operator's flag": (
        {"inference": {"engineArgs": ["--port=9"]}},
        "engineArgs repeats a flag that the operator sets",
    ),
    "operator's variable": (
        {"trainer": {"env": [{"name": "WEIGHTSYNC_EPOCH", "value": "9"}]}},
        "the operator sets these variables itself",
    ),
    "rank": ({"trainer": {"env": [{"name": "RANK"}]}}, "the operator sets these variables itself"),
    "env twice": ({"trainer": {"env": [{"name": "A"}, {"name": "A"}]}}, "Duplicate value"),
    "unknown field": ({"inference": {"replcas": 1}}, 'unknown field "spec.inference.replcas"'),
    "timeout of nothing": ({"transfer": {"timeoutSeconds": 0}}, "spec.transfer.timeoutSeconds"),
    "staged into nothing": ({"transfer": {"commit": "staged"}}, "commit staged needs staging: device or pinnedHost"),
    "staging for nothing": ({"transfer": {"staging": "device"}}, "commit inPlace stages nothing"),
    "a budget for nothing": ({"transfer": {"stagingBudgetGiB": 1}}, "bounds a staging buffer, and staging is none"),
    "a budget of nothing": (
        {"transfer": {"commit": "staged", "staging": "device", "stagingBudgetGiB": 0}},
        "spec.transfer.stagingBudgetGiB",
    ),
    "a quorum of more than there are": (
        {"inference": {"replicas": 2}, "transfer": {"quorum": 3}},
        "transfer.quorum counts replicas: it needs that many of them",
    ),
    "a quorum of nobody": ({"transfer": {"quorum": 0}}, "spec.transfer.quorum"),
    "unknown verify": ({"transfer": {"verify": "maybe"}}, "spec.transfer.verify"),
    "unknown cache policy": ({"transfer": {"prefixCache": "drop"}}, "spec.transfer.prefixCache"),
    "relative path": ({"model": {"hostPath": "models"}}, "spec.model.hostPath"),
    "quantity": ({"redis": {"resources": {"requests": {"cpu": "a lot"}}}}, "spec.redis.resources.requests.cpu"),
}


def _without_nulls(value: Any) -> Any:
    return {k: _without_nulls(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _manifest(over: dict[str, Any], name: str = "ws") -> dict[str, Any]:
    spec = _without_nulls(merged(MINIMAL, over))
    return {"apiVersion": API_VERSION, "kind": "WeightSync", "metadata": {"name": name}, "spec": spec}


@pytest.mark.parametrize("case", GOOD)
def test_a_good_manifest_is_taken(kube: Kube, case: str) -> None:
    done = kube.kubectl("apply", "--filename=-", "--dry-run=server", manifest=_manifest(GOOD[case]))
    assert done.returncode == 0, done.stderr


@pytest.mark.failure_mode(40)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_manifest_is_refused_by_its_field(kube: Kube, case: str) -> None:
    over, words = BAD[case]
    done = kube.kubectl("apply", "--filename=-", manifest=_manifest(over))
    assert done.returncode != 0
    assert words in done.stderr
    assert kube.list(PLURAL) == {}


@pytest.mark.failure_mode(72)
@pytest.mark.parametrize(
    ("name", "taken"), [("a" * 40, True), ("a" * 41, False), ("9lives", False), ("a.b", False), ("a-b", True)]
)
def test_a_name_that_children_could_not_bear_is_refused(kube: Kube, name: str, taken: bool) -> None:
    done = kube.kubectl("apply", "--filename=-", "--dry-run=server", manifest=_manifest({}, name))
    assert (done.returncode == 0) == taken, done.stderr
    assert taken or "metadata.name has at most 40" in done.stderr


def test_the_columns_and_the_scale_subresource_are_there(kube: Kube) -> None:
    kube.create(_without_nulls(MINIMAL))
    header = kube.kubectl("get", "ws").stdout.splitlines()[0].split()
    assert header == ["NAME", "MODEL", "FABRIC", "VERSION", "IN-SYNC", "LAST-PUSH", "THROUGHPUT", "READY", "AGE"]
    done = kube.kubectl("scale", "weightsync", "ws", "--replicas=7")
    assert done.returncode == 0, done.stderr
    resource = kube.get(PLURAL, "ws")
    assert resource is not None
    assert resource["spec"]["inference"]["replicas"] == 7
