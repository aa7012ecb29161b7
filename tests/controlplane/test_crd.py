"""The CRD on a real API server takes what is good and refuses what is bad, by the words of the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.controlplane.builders import MINIMAL, merged
from tests.controlplane.kube import Kube
from weightsync_operator.api.names import API_VERSION, PLURAL

EXTERNAL = {"address": "redis.infra.svc:6379", "database": 3, "username": "ws", "secretRef": {"name": "redis"}}

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
    "auto": {"fabric": {"profile": "auto", "count": 2}},
    "one network for all": {"fabric": {"profile": "sriov", "count": 4, "networks": ["rdma/vf"], "memlock": "node"}},
    "a network a device": {"fabric": {"profile": "roce", "count": 2, "networks": ["rail-0", "rail-1"]}},
    "gke": {"fabric": {"profile": "gke", "count": 2, "networks": ["rdma-0", "rdma-1"]}},
    "dra": {"fabric": {"profile": "dra", "count": 8, "deviceClass": "rdma.example.com"}},
    "ib": {"fabric": {"profile": "ib", "count": 8, "memlock": "rootWithIpcLock"}},
    "external Redis": {"redis": {"external": EXTERNAL}, "deletionPolicy": "Retain"},
    "external Redis by an IPv6 address": {"redis": {"external": {**EXTERNAL, "address": "[fd00::1]:6379"}}},
    "external ModelExpress": {"modelExpress": {"external": {"address": "mx.infra:65535"}}},
    "external Redis by TLS": {"redis": {"external": {**EXTERNAL, "tls": {"caSecretRef": {"name": "ca"}}}}},
    "external Redis by TLS that images know": {"redis": {"external": {**EXTERNAL, "tls": {}}}},
    "managed Redis with TLS": {"redis": {"tls": {"secretRef": {"name": "ws-redis-tls"}}}},
    "persistent Redis": {"redis": {"persistence": {"size": "5Gi", "storageClassName": "fast"}}},
    "a volume of the default size": {"redis": {"persistence": {}}},
    "a trainer's mesh": {
        "trainer": {
            "nodes": 2,
            "gpusPerNode": 8,
            "parallelism": {"dpReplicate": 2, "dpShard": 4, "cp": 2, "ep": 8},
        }
    },
    "a trainer's mesh without GPUs": {
        "trainer": {"nodes": 4, "gpusPerNode": 0, "parallelism": {"dpShard": 4}},
    },
    "experts over all ranks": {"inference": {"gpus": 4, "parallelism": {"tp": 4, "ep": 4, "dp": 1}}},
    "data parallel engines": {"inference": {"gpus": 2, "parallelism": {"dp": 2}}},
    "experts over data and tensor parallel ranks": {
        "inference": {"gpus": 8, "parallelism": {"tp": 2, "dp": 4, "ep": 8}},
    },
    "data parallel engines on a CPU": {"inference": {"gpus": 0, "parallelism": {"dp": 2}}},
    "fp8 in and fp8 out": {"inference": {"quantization": "fp8"}, "transfer": {"format": "fp8-128x128-ue8m0"}},
    "fp8 and whatever engines want": {"inference": {"quantization": "fp8"}},
    "plain and bf16": {"inference": {"quantization": "none"}, "transfer": {"format": "bf16"}},
    "checkpoints in a folder of the node": {"transfer": {"checkpoint": {"hostPath": "/srv/checkpoints"}}},
    "checkpoints in a claim": {
        "transfer": {
            "checkpoint": {"persistentVolumeClaim": {"claimName": "c", "subPath": "a"}, "podTemplate": {"spec": {}}}
        }
    },
    "engines in fp32": {"model": {"dtype": "float32"}},
    "a named state of the model": {"model": {"revision": "refs/pr/7"}},
    "metrics and traces": {"telemetry": {"metricsPort": 9400, "traceFolder": "/tmp/traces"}},
    "metrics of eight ranks below the gang's port": {
        "trainer": {"gpusPerNode": 8},
        "telemetry": {"metricsPort": 29492},
    },
    "metrics above the gang's port": {"trainer": {"gpusPerNode": 0}, "telemetry": {"metricsPort": 29501}},
    "metrics at the last port": {"telemetry": {"metricsPort": 65535}},
    "none": {"inference": {"replicas": 0, "gpus": 0}},
    "template": {"trainer": {"podTemplate": {"spec": {"anything": {"goes": ["here"]}}}}},
    "staged": {
        "inference": {"replicas": 3},
        "transfer": {
            "commit": "staged",
            "staging": "pinnedHost",
            "stagingBudgetGiB": 64,
            "arenaBudgetGiB": 8,
            "zeroCopy": True,
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
    "no place of checkpoints": (
        {"transfer": {"checkpoint": {"podTemplate": {}}}},
        "exactly one of path, hostPath and persistentVolumeClaim says where checkpoints are",
    ),
    "two places of checkpoints": (
        {"transfer": {"checkpoint": {"path": "/a/b", "hostPath": "/c/d"}}},
        "exactly one of path, hostPath and persistentVolumeClaim says where checkpoints are",
    ),
    "no trainer": ({"trainer": None}, "spec.trainer"),
    "no command": ({"trainer": {"command": []}}, "spec.trainer.command"),
    "negative replicas": ({"inference": {"replicas": -1}}, "spec.inference.replicas"),
    "too many replicas": ({"inference": {"replicas": 501}}, "spec.inference.replicas"),
    "unknown fabric": ({"fabric": {"profile": "carrier-pigeon"}}, "spec.fabric.profile"),
    "device for tcp": ({"fabric": {"resourceName": "rdma/ib"}}, "profile tcp uses no device"),
    "device for auto": (
        {"fabric": {"profile": "auto", "resourceName": "rdma/ib"}},
        "profiles auto, gke and dra choose their devices themselves",
    ),
    "efa": ({"fabric": {"profile": "efa"}}, "UCX on EFA falls to TCP silently"),
    "networks for tcp": ({"fabric": {"networks": ["a"]}}, "networks are attached with profiles"),
    "sriov without a network": ({"fabric": {"profile": "sriov"}}, "profile sriov needs networks"),
    "networks that fit no count": (
        {"fabric": {"profile": "roce", "count": 3, "networks": ["a", "b"]}},
        "networks names one network a device (count)",
    ),
    "one network of gke for all": (
        {"fabric": {"profile": "gke", "count": 2, "networks": ["a"]}},
        "networks names one network a device (count)",
    ),
    "a class without a claim": ({"fabric": {"profile": "ib", "deviceClass": "a"}}, "deviceClass is for profile dra"),
    "unknown memlock": ({"fabric": {"memlock": "maybe"}}, "spec.fabric.memlock"),
    "external Redis with an image": (
        {"redis": {"external": EXTERNAL, "image": "mine"}},
        "image, resources and persistence are of the managed Redis",
    ),
    "external Redis with resources": (
        {"redis": {"external": EXTERNAL, "resources": {"limits": {"cpu": "1"}}}},
        "image, resources and persistence are of the managed Redis",
    ),
    "external Redis with a volume": (
        {"redis": {"external": EXTERNAL, "persistence": {}}},
        "image, resources and persistence are of the managed Redis",
    ),
    "external Redis with a managed one's certificate": (
        {"redis": {"external": EXTERNAL, "tls": {"secretRef": {"name": "cert"}}}},
        "redis.tls is the certificate of the managed Redis",
    ),
    "TLS without a certificate": ({"redis": {"tls": {}}}, "spec.redis.tls.secretRef"),
    "external Redis without a password": (
        {"redis": {"external": {"address": "a:1"}}},
        "spec.redis.external.secretRef",
    ),
    "external Redis without a port": (
        {"redis": {"external": {**EXTERNAL, "address": "redis"}}},
        "spec.redis.external.address",
    ),
    "external Redis by an URL": (
        {"redis": {"external": {**EXTERNAL, "address": "redis://a:1"}}},
        "spec.redis.external.address",
    ),
    "a port that is none": (
        {"modelExpress": {"external": {"address": "mx:65536"}}},
        "spec.modelExpress.external.address",
    ),
    "database 16": ({"redis": {"external": {**EXTERNAL, "database": 16}}}, "spec.redis.external.database"),
    "external ModelExpress with an image": (
        {"modelExpress": {"external": {"address": "mx:8001"}, "image": "mine"}},
        "image and resources are of the managed ModelExpress",
    ),
    "keys to retain in a managed Redis": ({"deletionPolicy": "Retain"}, "deletionPolicy Retain is for redis.external"),
    "unknown deletion policy": ({"deletionPolicy": "Perhaps"}, "spec.deletionPolicy"),
    "a mesh of other ranks": (
        {"trainer": {"nodes": 2, "gpusPerNode": 8, "parallelism": {"dpShard": 8}}},
        "must be the number of ranks, nodes * gpusPerNode",
    ),
    "experts over ranks that are not there": (
        {"trainer": {"nodes": 4, "parallelism": {"dpShard": 4, "ep": 3}}},
        "ep splits the ranks of dpShard * cp",
    ),
    "data parallel engines over several nodes": (
        {"inference": {"gpus": 8, "parallelism": {"tp": 8, "dp": 2}}},
        "parallelism.tp * dp needs that many gpus in the pod",
    ),
    "experts over the ranks of one copy": (
        {"inference": {"gpus": 8, "parallelism": {"tp": 2, "dp": 4, "ep": 2}}},
        "ep shares the experts of a layer over all ranks",
    ),
    "the operator's data parallel size": (
        {"inference": {"gpus": 2, "parallelism": {"dp": 2}, "engineArgs": ["-dpe"]}},
        "leave out of engineArgs --data-parallel-*",
    ),
    "experts over some ranks": (
        {"inference": {"gpus": 4, "parallelism": {"tp": 4, "ep": 2}}},
        "ep shares the experts of a layer over all ranks",
    ),
    "an engine over several nodes": (
        {"inference": {"gpus": 8, "parallelism": {"tp": 16}}},
        "an engine over several nodes is refused in v1alpha1",
    ),
    "fp8 as bf16": (
        {"inference": {"quantization": "fp8"}, "transfer": {"format": "bf16"}},
        "transfer.format is not what engines of this inference.quantization want",
    ),
    "plain as fp8": (
        {"inference": {"quantization": "none"}, "transfer": {"format": "fp8-128x128"}},
        "transfer.format is not what engines of this inference.quantization want",
    ),
    "an online scheme": ({"inference": {"quantization": "awq"}}, "spec.inference.quantization"),
    "ucx name": ({"fabric": {"ucx": {"TLS": "rc"}}}, "ucx takes variables named UCX_*"),
    "tp over gpus": ({"inference": {"gpus": 1, "parallelism": {"tp": 2}}}, "parallelism.tp * dp needs that many gpus"),
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
    "a ring in place": ({"transfer": {"arenaBudgetGiB": 1}}, "arenaBudgetGiB needs commit: staged"),
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
    "engines in fp16": ({"model": {"dtype": "float16"}}, "spec.model.dtype"),
    "FP8 on the wire for engines in fp32": (
        {"model": {"dtype": "float32"}, "transfer": {"format": "fp8-128x128"}},
        "engines of FP8 checkpoints compute in bfloat16",
    ),
    "FP8 engines in fp32": (
        {"model": {"dtype": "float32"}, "inference": {"quantization": "fp8"}},
        "engines of FP8 checkpoints compute in bfloat16",
    ),
    "a state without a name": ({"model": {"revision": ""}}, "spec.model.revision"),
    "metrics at a port for root": ({"telemetry": {"metricsPort": 80}}, "spec.telemetry.metricsPort"),
    "metrics beyond the last port": (
        {"trainer": {"gpusPerNode": 8}, "telemetry": {"metricsPort": 65529}},
        "telemetry.metricsPort plus trainer.gpusPerNode is beyond port 65535",
    ),
    "metrics where the gang meets": (
        {"trainer": {"gpusPerNode": 8}, "telemetry": {"metricsPort": 29493}},
        "a rank's metrics would be served at 29500, where the gang meets",
    ),
    "metrics of one rank where the gang meets": (
        {"telemetry": {"metricsPort": 29500}},
        "a rank's metrics would be served at 29500, where the gang meets",
    ),
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


@pytest.mark.failure_mode(40)
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {"redis": {"external": EXTERNAL}}, "managed or external is decided once: the ledger does not move"),
        ({"redis": {"external": EXTERNAL}}, {"redis": {"external": None}}, "managed or external is decided once"),
        ({}, {"redis": {"persistence": {}}}, "persistence is decided once"),
        ({"redis": {"persistence": {}}}, {"redis": {"persistence": None}}, "persistence is decided once"),
        ({}, {"modelExpress": {"external": {"address": "mx:8001"}}}, "managed or external is decided once: sources"),
        ({"redis": {"external": EXTERNAL}}, {"redis": {"external": {"address": "other:6379"}}}, ""),
        ({"redis": {"persistence": {}}}, {"redis": {"persistence": {"size": "9Gi"}}}, ""),
        ({}, {"redis": {"image": "mine/redis:2"}}, ""),
    ],
)
def test_what_is_decided_once_is_refused_by_the_second_word(
    kube: Kube, before: dict[str, Any], after: dict[str, Any], words: str
) -> None:
    """Transition rules have an old self to speak of only when something is changed."""
    kube.create(_without_nulls(merged(MINIMAL, before)))
    patch = json.dumps({"spec": after})
    done = kube.kubectl("patch", "weightsync", "ws", "--type=merge", f"--patch={patch}")
    assert (done.returncode == 0) == (words == ""), done.stderr
    assert words in done.stderr


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
    assert "weightsync.weightsync.dev/ws" in kube.kubectl("get", "all", "--output=name").stdout
    done = kube.kubectl("scale", "weightsync", "ws", "--replicas=7")
    assert done.returncode == 0, done.stderr
    resource = kube.get(PLURAL, "ws")
    assert resource is not None
    assert resource["spec"]["inference"]["replicas"] == 7
