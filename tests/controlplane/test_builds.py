"""What is rendered: the contract that the runtime reads, the gang, the engines, and what all pods have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane.builders import DEFAULTS, KEY, UID, make_context
from weightsync.config import Contract
from weightsync.preflight import Question
from weightsync.vllm.serve import DRAIN_S
from weightsync_operator.api.names import LABEL_EPOCH, LABEL_SESSION
from weightsync_operator.plan.build.auth import access_list, derive_passwords, secret
from weightsync_operator.plan.build.trainer import job_for_epoch
from weightsync_operator.plan.fabric import PROFILES, Memlock
from weightsync_operator.plan.render import Render, preflight_pod, render, revision_of, stamped

PROFILE_NAMES = tuple(PROFILES)


def _env(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def _engine(rendered: Render) -> dict[str, Any]:
    return rendered.engines["spec"]["template"]["spec"]["containers"][0]


def _trainer(rendered: Render) -> dict[str, Any]:
    return rendered.trainer["spec"]["template"]["spec"]["containers"][0]


def _pods(rendered: Render) -> list[dict[str, Any]]:
    manifests = [*rendered.base, rendered.engines, rendered.trainer]
    return [manifest["spec"]["template"]["spec"] for manifest in manifests if "template" in manifest.get("spec", {})]


def _contract(**over: Any) -> Contract:
    rendered = render(make_context(**over))
    config_map = next(child for child in rendered.base if child["kind"] == "ConfigMap")
    return Contract.parse(config_map["data"]["contract.json"])


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_the_runtime_accepts_the_rendered_contract(profile: str) -> None:
    contract = _contract(
        fabric={"profile": profile}, transfer={"pauseMode": "keep", "timeoutSeconds": 7, "maxVersionSkew": 3}
    )
    assert contract.fabric.profile == profile
    assert contract.fabric.transports == PROFILES[profile].transports
    assert (contract.transfer.pause_mode, contract.transfer.timeout_seconds, contract.transfer.max_version_skew) == (
        "keep",
        7,
        3,
    )
    assert (contract.redis.host, contract.model_express.address) == ("ws-redis", "ws-mx:8001")


def test_the_runtime_reads_how_a_push_is_committed() -> None:
    transfer = _contract(
        inference={"replicas": 3},
        transfer={
            "commit": "staged",
            "staging": "pinnedHost",
            "stagingBudgetGiB": 3,
            "quorum": 2,
            "verify": "sampled",
            "prefixCache": "keep",
        },
    ).transfer
    assert (transfer.commit, transfer.staging, transfer.staging_budget_bytes) == ("staged", "pinnedHost", 3 << 30)
    assert (transfer.quorum, transfer.verify, transfer.prefix_cache) == (2, "sampled", "keep")


def test_a_budget_of_the_trainers_arena_reaches_the_runtime_and_older_ones_see_no_new_key() -> None:
    ring = _contract(transfer={"commit": "staged", "staging": "device", "arenaBudgetGiB": 2})
    assert (ring.contract, ring.transfer.arena_budget_bytes) == ("1.2", 2 << 30)
    assert (_contract().contract, _contract().transfer.arena_budget_bytes) == ("1.1", None)


def test_zero_copy_reaches_the_runtime_and_older_ones_see_no_new_key() -> None:
    asked = _contract(transfer={"zeroCopy": True, "commit": "staged", "staging": "device", "arenaBudgetGiB": 2})
    assert (asked.contract, asked.transfer.zero_copy, asked.transfer.arena_budget_bytes) == ("1.3", True, 2 << 30)
    assert _contract().transfer.zero_copy is False
    documents = [c["data"]["contract.json"] for c in render(make_context()).base if c["kind"] == "ConfigMap"]
    assert "zeroCopy" not in documents[0]


def test_by_default_a_push_is_in_place_wholly_verified_and_committed_by_all() -> None:
    transfer = _contract().transfer
    assert (transfer.commit, transfer.staging, transfer.staging_budget_bytes) == ("inPlace", "none", None)
    assert (transfer.quorum, transfer.verify, transfer.prefix_cache) == (None, "full", "reset")


def test_secrets_lie_where_the_contract_says() -> None:
    rendered, contract = render(make_context()), _contract()
    volume = next(v for v in rendered.engines["spec"]["template"]["spec"]["volumes"] if v["name"] == "auth")
    mount = next(m for m in _engine(rendered)["volumeMounts"] if m["name"] == "auth")
    files = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
    assert files == {contract.redis.password_file, contract.endpoint.token_file}
    assert {item["key"] for item in volume["secret"]["items"]} <= set(
        secret(make_context().owner, derive_passwords(KEY, UID), make_context().spec)["data"]
    )


@pytest.mark.failure_mode(51)
def test_scaling_resources_and_timeouts_keep_the_session_and_identity_changes_it() -> None:
    session = make_context().session
    same: tuple[dict[str, Any], ...] = (
        {"inference": {"replicas": 7}},
        {"transfer": {"timeoutSeconds": 9}},
        {"redis": {"resources": {"requests": {"cpu": "1"}}}},
    )
    other: tuple[dict[str, Any], ...] = (
        {"model": {"hostPath": "/models/b"}},
        {"trainer": {"nodes": 2}},
        {"inference": {"gpus": 2, "parallelism": {"tp": 2}}},
        {"inference": {"quantization": "fp8"}},
        {"trainer": {"parallelism": {"dpShard": 1}}},
    )
    assert {make_context(**over).session for over in same} == {session}
    assert session not in {make_context(**over).session for over in other}


@pytest.mark.failure_mode(51)
def test_scaling_suspending_and_the_restart_budget_need_no_new_render() -> None:
    revision = revision_of(make_context().spec, "auth")
    live: tuple[dict[str, Any], ...] = ({"inference": {"replicas": 9}}, {"suspend": True}, {"trainer": {"restarts": 1}})
    for over in live:
        assert revision_of(make_context(**over).spec, "auth") == revision
    assert revision_of(make_context(transfer={"timeoutSeconds": 9}).spec, "auth") != revision
    assert revision_of(make_context().spec, "other passwords") != revision


@pytest.mark.failure_mode(46)
def test_another_session_replaces_engines_and_gang_and_leaves_redis_and_modelexpress_alone() -> None:
    one, other = render(make_context()), render(make_context(model={"hostPath": "/models/other"}))
    assert [child for child in one.base if child["kind"] == "Deployment"] == [
        c for c in other.base if c["kind"] == "Deployment"
    ]
    for template in ("engines", "trainer"):
        sessions = {getattr(r, template)["spec"]["template"]["metadata"]["labels"][LABEL_SESSION] for r in (one, other)}
        assert sessions == {one.session, other.session}


def test_a_stored_render_survives_json() -> None:
    rendered = render(make_context())
    assert Render.from_data(json.loads(json.dumps(rendered.to_data()))) == rendered


def test_no_password_is_in_what_is_stored() -> None:
    text, passwords = json.dumps(render(make_context()).to_data()), derive_passwords(KEY, UID)
    held = (passwords.runtime, passwords.model_express, passwords.operator, passwords.endpoint_token)
    assert [password for password in held if password in text] == []
    assert "password" not in repr(passwords).replace("Passwords", "")


def test_passwords_differ_by_use_by_resource_and_by_key() -> None:
    sets = [derive_passwords(KEY, UID), derive_passwords(KEY, "other"), derive_passwords(KEY + b"x", UID)]
    all_of_them = [p for s in sets for p in (s.runtime, s.model_express, s.operator, s.endpoint_token)]
    assert len(set(all_of_them)) == len(all_of_them)
    assert derive_passwords(KEY, UID) == sets[0]


def test_the_access_list_holds_hashes_and_no_default_user() -> None:
    passwords = derive_passwords(KEY, UID)
    text = access_list(passwords)
    assert text.startswith("user default off\n")
    assert passwords.runtime not in text
    assert passwords.operator not in text


def test_one_epoch_of_the_gang_knows_its_number_everywhere() -> None:
    rendered = render(make_context(trainer={"nodes": 2}))
    job = job_for_epoch(rendered.trainer, 7)
    env = _env(job["spec"]["template"]["spec"]["containers"][0])
    assert job["metadata"]["name"] == "ws-trainer-7"
    assert job["metadata"]["labels"][LABEL_EPOCH] == job["spec"]["template"]["metadata"]["labels"][LABEL_EPOCH] == "7"
    assert (env["WEIGHTSYNC_EPOCH"], env["MASTER_ADDR"]) == ("7", "ws-trainer-$(WEIGHTSYNC_EPOCH)-0.ws-trainer")
    assert list(env).index("WEIGHTSYNC_EPOCH") < list(env).index("MASTER_ADDR"), (
        "Kubernetes expands from variables above only"
    )
    assert rendered.trainer["metadata"]["name"] == "ws-trainer", "the stored template belongs to no epoch"


@pytest.mark.failure_mode(62)
def test_no_rank_of_a_gang_restarts_alone_and_pid_1_forwards_sigterm() -> None:
    job = render(make_context(trainer={"nodes": 3}))
    spec = job.trainer["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert _trainer(job)["command"] == ["/usr/bin/tini", "-g", "--", "python", "train.py"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] <= 10


@pytest.mark.failure_mode(63)
def test_no_job_ever_has_a_ttl() -> None:
    assert "ttlSecondsAfterFinished" not in render(make_context()).trainer["spec"]


def test_one_process_a_pod_gets_its_rank_from_the_job_and_several_from_torchrun() -> None:
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    one = _env(_trainer(render(make_context(trainer={"nodes": 2, "gpusPerNode": 1}))))
    many = _env(_trainer(render(make_context(trainer={"nodes": 2, "gpusPerNode": 4}))))
    assert (one["RANK"], one["NODE_RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"]) == (index, index, "2", "0")
    assert (many["PET_NNODES"], many["PET_NPROC_PER_NODE"], many["PET_NODE_RANK"]) == ("2", "4", index)
    assert "RANK" not in many, "torchrun gives each process its own"


def test_a_trainers_mesh_reaches_every_rank() -> None:
    axes = {"dpReplicate": 2, "dpShard": 2, "cp": 2, "ep": 4}
    env = _env(_trainer(render(make_context(trainer={"gpusPerNode": 8, "parallelism": axes}))))
    assert {name: env[f"WEIGHTSYNC_{name}"] for name in ("DP_REPLICATE", "DP_SHARD", "CP", "EP")} == {
        "DP_REPLICATE": "2",
        "DP_SHARD": "2",
        "CP": "2",
        "EP": "4",
    }
    assert "WEIGHTSYNC_EP" not in _env(_trainer(render(make_context())))


def test_metrics_have_a_port_by_name_for_each_rank_and_the_contract_says_where() -> None:
    """The runtime serves at metricsPort plus local rank; a trainer's PodMonitor finds the ports by their names."""
    over: dict[str, Any] = {
        "trainer": {"gpusPerNode": 3},
        "telemetry": {"metricsPort": 9400, "traceFolder": "/tmp/traces"},
    }
    ports = {port["name"]: port["containerPort"] for port in _trainer(render(make_context(**over)))["ports"]}
    assert ports == {"metrics": 9400, "metrics-1": 9401, "metrics-2": 9402}
    told = _contract(**over).telemetry
    assert (told.metrics_port, told.trace_folder) == (9400, "/tmp/traces")
    assert _contract(telemetry={"metricsPort": 9400}).telemetry.trace_folder is None
    assert "ports" not in _trainer(render(make_context(telemetry={"traceFolder": "/tmp/traces"})))
    assert "ports" not in _trainer(render(make_context()))


def test_a_replaced_model_is_judged_again_and_starts_a_session() -> None:
    """Its place is the same: without a word of the user nobody would look again."""
    one, other = (make_context(model={"revision": revision}) for revision in ("a", "b"))
    assert one.session != other.session
    names = {preflight_pod(ctx, render(ctx))["metadata"]["name"] for ctx in (make_context(), one, other)}
    assert len(names) == 3
    question = preflight_pod(one, render(one))["spec"]["containers"][0]["env"]
    assert Question.load({entry["name"]: entry["value"] for entry in question}).model_path == Path("/models/ws")


def test_engines_share_experts_when_told_to_and_the_preflight_is_asked_whether_they_can() -> None:
    ctx = make_context(inference={"gpus": 4, "quantization": "fp8", "parallelism": {"tp": 4, "ep": 4}})
    assert "--enable-expert-parallel" in _engine(render(ctx))["args"]
    assert "--enable-expert-parallel" not in _engine(render(make_context()))["args"]
    pod = preflight_pod(ctx, render(ctx))
    question = Question.load({entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]})
    assert (question.expert_parallel, question.quantization) == (4, "fp8")


def test_the_dtype_of_engines_reaches_engines_contract_and_preflight() -> None:
    assert _engine(render(make_context()))["args"].count("bfloat16") == 1
    ctx = make_context(model={"dtype": "float32"})
    told = " ".join(_engine(render(ctx))["args"])
    assert "--dtype float32" in told and "bfloat16" not in told
    assert _contract(model={"dtype": "float32"}).model.dtype == "float32"
    pod = preflight_pod(ctx, render(ctx))
    assert (
        Question.load({entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]}).dtype
        == "float32"
    )


def test_all_data_parallel_ranks_of_an_engine_are_one_pod_with_one_api_server() -> None:
    ctx = make_context(inference={"gpus": 8, "parallelism": {"tp": 2, "dp": 4, "ep": 8}})
    engine = _engine(render(ctx))
    told = " ".join(engine["args"])
    assert "--tensor-parallel-size 2 --data-parallel-size 4 --api-server-count 1 --enable-expert-parallel" in told
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == "8"
    pod = preflight_pod(ctx, render(ctx))
    question = Question.load({entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]})
    assert (question.tensor_parallel, question.data_parallel, question.expert_parallel) == (2, 4, 8)


def test_the_preflight_is_told_what_staging_may_take() -> None:
    limits = {"spec": {"containers": [{"name": "engine", "resources": {"limits": {"memory": "64Gi"}}}]}}
    transfer = {"commit": "staged", "staging": "pinnedHost", "stagingBudgetGiB": 3}
    ctx = make_context(inference={"podTemplate": limits}, transfer=transfer)
    pod = preflight_pod(ctx, render(ctx))
    question = Question.load({entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]})
    assert (question.staging_budget_bytes, question.host_limit_bytes) == (3 << 30, 64 << 30)


@pytest.mark.parametrize("resources", [{"limits": {"memory": "lots"}}, {"limits": None}, None])
def test_a_memory_limit_that_is_none_is_left_to_the_api_server(resources: Any) -> None:
    containers = {"spec": {"containers": [{"name": "engine", "resources": resources}]}}
    transfer = {"commit": "staged", "staging": "pinnedHost"}
    ctx = make_context(inference={"podTemplate": containers}, transfer=transfer)
    pod = preflight_pod(ctx, render(ctx))
    question = Question.load({entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]})
    assert question.host_limit_bytes is None


def test_the_engine_serves_the_model_by_its_name_with_the_plug_in() -> None:
    rendered = render(
        make_context(
            model={"name": "org/Tiny-1.0"},
            inference={"engineArgs": ["--enforce-eager"], "gpus": 2, "parallelism": {"tp": 2}},
        )
    )
    engine = _engine(rendered)
    args = dict(zip(engine["args"][::2], engine["args"][1::2], strict=False))
    assert engine["command"] == ["/usr/bin/tini", "--", "python", "-m", "weightsync.vllm.serve", "/models/Tiny-1.0"]
    assert (args["--served-model-name"], args["--tensor-parallel-size"], args["--port"]) == (
        "org/Tiny-1.0",
        "2",
        "8000",
    )
    assert engine["args"][-1] == "--enforce-eager"
    assert rendered.engines["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= DRAIN_S + 10
    assert _env(engine)["VLLM_PLUGINS"] == "weightsync"
    assert engine["readinessProbe"]["httpGet"]["path"] == "/weightsync/v1/ready"


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_every_pod_is_confined(profile: str) -> None:
    """All but what pins memory for RDMA: that has to be root with exactly one capability."""
    for pod in _pods(render(make_context(fabric={"profile": profile}))):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"]["runAsUser"] == 10001
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]


@pytest.mark.failure_mode(67)
@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_ipc_lock_goes_with_root_or_not_at_all(profile: str) -> None:
    for container in (
        c for build in (_engine, _trainer) for c in [build(render(make_context(fabric={"profile": profile})))]
    ):
        security = container["securityContext"]
        locks = "IPC_LOCK" in security["capabilities"].get("add", [])
        assert locks == (PROFILES[profile].memlock is Memlock.ROOT_WITH_IPC_LOCK)
        assert (security.get("runAsUser") == 0) == locks


@pytest.mark.failure_mode(32)
def test_an_rdma_profile_cannot_fall_back_to_tcp() -> None:
    for profile in PROFILES.values():
        allowed = profile.env["UCX_TLS"].split(",")
        assert ("tcp" in allowed) == ("tcp" in profile.transports)


def test_devices_are_limits_and_requests_alike() -> None:
    over = {
        "fabric": {"profile": "hca-shared", "resourceName": "rdma/ib", "count": 2},
        "inference": {"gpus": 4},
        "trainer": {"gpusPerNode": 8},
    }
    rendered = render(make_context(**over))
    engine, trainer = _engine(rendered)["resources"], _trainer(rendered)["resources"]
    assert engine["limits"] == {"nvidia.com/gpu": "4", "rdma/ib": "2"}
    assert trainer["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": "2"}
    assert engine["limits"].items() <= engine["requests"].items()


def test_without_gpus_and_devices_there_are_no_limits() -> None:
    rendered = render(make_context(inference={"gpus": 0}, trainer={"gpusPerNode": 0}))
    assert "limits" not in _engine(rendered)["resources"]
    assert "limits" not in _trainer(rendered)["resources"]


def test_ucx_overrides_stand_over_the_profile() -> None:
    rendered = render(
        make_context(fabric={"profile": "tcp", "ucx": {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}})
    )
    for container in (_engine(rendered), _trainer(rendered)):
        assert (_env(container)["UCX_TLS"], _env(container)["UCX_NET_DEVICES"]) == ("tcp,self", "eth0")


@pytest.mark.parametrize(
    ("source", "path", "volume"),
    [
        ({"path": "/opt/model"}, "/opt/model", None),
        ({"hostPath": "/data/m"}, "/models/ws", {"hostPath": {"path": "/data/m", "type": "Directory"}}),
        (
            {"persistentVolumeClaim": {"claimName": "c", "subPath": "x"}},
            "/models/ws",
            {"persistentVolumeClaim": {"claimName": "c", "readOnly": True}},
        ),
    ],
)
def test_the_model_is_mounted_read_only_from_its_source(source: dict, path: str, volume: dict | None) -> None:
    ctx = make_context(model={"hostPath": None, **source})
    pod = render(ctx).engines["spec"]["template"]["spec"]
    volumes = [v for v in pod["volumes"] if v["name"] == "model"]
    mounts = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "model"]
    assert ctx.model_path == path
    assert volumes == ([] if volume is None else [{"name": "model", **volume}])
    assert all(mount["readOnly"] and mount["mountPath"] == path for mount in mounts)


def test_the_preflight_pod_asks_what_the_runtime_understands_where_engines_would_run() -> None:
    overlay = {"spec": {"nodeSelector": {"gpu": "yes"}, "tolerations": [{"operator": "Exists"}]}}
    ctx = make_context(inference={"podTemplate": overlay, "gpus": 2, "parallelism": {"tp": 2}})
    pod = preflight_pod(ctx, render(ctx))
    question = Question.load({entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]})
    assert (question.tensor_parallel, str(question.model_path), question.model_field) == (
        2,
        "/models/ws",
        "spec.model.hostPath",
    )
    assert (pod["spec"]["nodeSelector"], pod["spec"]["tolerations"]) == ({"gpu": "yes"}, [{"operator": "Exists"}])
    assert "limits" not in pod["spec"]["containers"][0]["resources"], "it needs no device"


def test_the_preflights_name_changes_only_with_what_it_judges() -> None:
    def name(**over: Any) -> str:
        ctx = make_context(**over)
        return preflight_pod(ctx, render(ctx))["metadata"]["name"]

    assert name() == name(trainer={"command": ["other"]}) == name(inference={"replicas": 5})
    assert name() != name(inference={"image": "other"}) != name(model={"hostPath": "/b"})


def test_images_come_from_the_operator_unless_the_spec_names_them() -> None:
    rendered = render(make_context(inference={"image": "mine/vllm:1"}))
    images = {pod["containers"][0]["name"]: pod["containers"][0]["image"] for pod in _pods(rendered)}
    assert images == {
        "redis": DEFAULTS.redis_image,
        "modelexpress": DEFAULTS.model_express_image,
        "engine": "mine/vllm:1",
        "trainer": DEFAULTS.runtime_image,
    }


@pytest.mark.failure_mode(45)
def test_every_child_is_owned_by_the_resource() -> None:
    ctx = make_context()
    rendered = render(ctx)
    children = [
        *rendered.base,
        rendered.engines,
        rendered.trainer,
        preflight_pod(ctx, rendered),
        secret(ctx.owner, derive_passwords(KEY, UID), ctx.spec),
    ]
    for child in children:
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], child["metadata"]["namespace"]) == (UID, True, "ns")


@pytest.mark.failure_mode(72)
def test_the_longest_name_leaves_room_for_pods() -> None:
    """Hostnames and label values end at 63 characters; a StatefulSet adds an 11-character hash to its name."""
    rendered = render(make_context(name="a" * 40, trainer={"nodes": 256}))
    names = [child["metadata"]["name"] for child in rendered.base]
    job = job_for_epoch(rendered.trainer, 99_999)["metadata"]["name"]
    assert max(map(len, names)) <= 63
    assert len(f"{job}-255") <= 63
    assert len(rendered.engines["metadata"]["name"]) + 11 <= 63


def test_a_stamp_changes_with_the_content_and_only_with_it() -> None:
    rendered = render(make_context())
    first, again = stamped(rendered.engines), stamped(rendered.engines)
    other = stamped(render(make_context(inference={"image": "x"})).engines)
    assert first == again
    assert first["metadata"]["annotations"] != other["metadata"]["annotations"]
