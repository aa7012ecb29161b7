"""Redis and ModelExpress: with a volume, or somebody else's; what reaches pods, and where the password is and is not."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from redis import Redis

from tests.controlplane.builders import KEY, UID, applied, make_context, make_seen, make_wanted, without
from tests.fixtures.servers import RedisServer
from weightsync.config import Contract
from weightsync.rendezvous.ledger import Ledger as RuntimeLedger
from weightsync_operator.api.names import TrainerState
from weightsync_operator.api.rendezvous import SecretKey
from weightsync_operator.plan.build.auth import (
    PASSWORD_FIELD,
    derive_passwords,
    external_access,
    external_passwords,
    secret,
    secret_value,
)
from weightsync_operator.plan.build.context import Context
from weightsync_operator.plan.decide import decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.render import Render, render
from weightsync_operator.telemetry import Ledger, LedgerReader

EXTERNAL = {"address": "redis.infra.svc:6380", "database": 3, "secretRef": {"name": "theirs", "key": "pw"}}
AWKWARD = "p@ss:w/rd %?#"


def _external(**over: Any) -> Context:
    return make_context(redis={"external": {**EXTERNAL, **over}})


def _data(ctx: Context, password: str) -> dict[str, str]:
    passwords = external_passwords(derive_passwords(KEY, UID), password)
    data = secret(ctx.owner, passwords, ctx.spec)["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def _kinds(rendered: Render) -> list[tuple[str, str]]:
    return [(child["kind"], child["metadata"]["name"]) for child in rendered.base]


def _contract(rendered: Render) -> Contract:
    config_map = next(child for child in rendered.base if child["kind"] == "ConfigMap")
    return Contract.parse(config_map["data"]["contract.json"])


def _volume(rendered: Render, name: str) -> dict[str, Any]:
    volumes = rendered.engines["spec"]["template"]["spec"]["volumes"]
    return next(volume for volume in volumes if volume["name"] == name)


def test_with_an_external_redis_none_is_made_and_the_contract_names_theirs() -> None:
    rendered = render(_external(username="ws"))
    assert [name for _, name in _kinds(rendered) if name == "ws-redis"] == []
    assert ("Deployment", "ws-mx") in _kinds(rendered)
    redis = _contract(rendered).redis
    assert (redis.host, redis.port, redis.database, redis.username) == ("redis.infra.svc", 6380, 3, "ws")
    assert _contract(render(_external())).redis.username is None
    assert _contract(render(_external(address="[fd00::7]:6379"))).redis.host == "fd00::7"


def test_pods_mount_the_password_from_the_users_own_secret() -> None:
    rendered = render(_external())
    files = [(s["secret"]["name"], s["secret"]["items"]) for s in _volume(rendered, "auth")["projected"]["sources"]]
    assert files == [
        ("ws-auth", [{"key": "endpoint-token", "path": "endpoint-token"}]),
        ("theirs", [{"key": "pw", "path": "redis-password"}]),
    ]
    mount = next(
        m for m in rendered.trainer["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] if m["name"] == "auth"
    )
    assert _contract(rendered).redis.password_file == f"{mount['mountPath']}/redis-password"


def test_an_external_password_is_in_no_render_and_only_modelexpress_url_has_it_escaped() -> None:
    ctx = _external(username="w:s")
    data = _data(ctx, AWKWARD)
    assert set(data) == {"mx-redis-url", "endpoint-token"}
    assert AWKWARD not in data["mx-redis-url"]
    understood = Redis.from_url(data["mx-redis-url"]).connection_pool.connection_kwargs
    assert (understood["username"], understood["password"]) == ("w:s", AWKWARD)
    assert (understood["host"], understood["port"], understood["db"]) == ("redis.infra.svc", 6380, 3)
    assert AWKWARD not in json.dumps(render(ctx).to_data())
    nameless = Redis.from_url(_data(_external(), AWKWARD)["mx-redis-url"]).connection_pool.connection_kwargs
    assert (nameless.get("username"), nameless["password"]) == (None, AWKWARD)


def test_the_url_of_a_managed_redis_is_what_it_was() -> None:
    data = secret(make_context().owner, derive_passwords(KEY, UID), make_context().spec)["data"]
    url = base64.b64decode(data["mx-redis-url"]).decode()
    assert url == f"redis://mx:{derive_passwords(KEY, UID).model_express}@ws-redis:6379"


def test_a_changed_external_password_reaches_the_pods() -> None:
    derived = derive_passwords(KEY, UID)
    one, other = (external_passwords(derived, password) for password in ("a", "b"))
    assert one.fingerprint != other.fingerprint != derived.fingerprint
    assert one.endpoint_token == derived.endpoint_token


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "Secret theirs is not in this namespace"),
        ({"data": {"other": "eA=="}}, "Secret theirs has no key pw"),
        ({}, "Secret theirs has no key pw"),
        ({"data": {"pw": "/w=="}}, "is no text"),
    ],
)
def test_a_missing_password_is_told_by_its_field(found: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        secret_value(found, SecretKey(name="theirs", key="pw"), PASSWORD_FIELD)
    assert caught.value.field == "spec.redis.external.secretRef"
    assert secret_value({"data": {"pw": "eA=="}}, SecretKey(name="theirs", key="pw"), PASSWORD_FIELD) == "x"
    with_newline = {"data": {"pw": "eAo="}}  # `kubectl create secret --from-file`; the runtime reads it without, too
    assert secret_value(with_newline, SecretKey(name="theirs", key="pw"), PASSWORD_FIELD) == "x"


def test_modelexpress_looks_for_the_redis_that_it_has() -> None:
    mx = next(
        child
        for child in render(_external()).base
        if child["metadata"]["name"] == "ws-mx" and child["kind"] == "Deployment"
    )
    (container,) = mx["spec"]["template"]["spec"]["containers"]
    command = container["livenessProbe"]["exec"]["command"][-1]
    assert "/dev/tcp/redis.infra.svc/6380" in command
    assert f":{6380:04X} 01" in command


def test_with_an_external_modelexpress_none_is_made_and_the_gang_waits_for_none() -> None:
    ctx = make_context(modelExpress={"external": {"address": "mx.infra:8001"}}, redis={"external": EXTERNAL})
    wanted = make_wanted(ctx)
    assert wanted.in_force is not None
    assert wanted.in_force.names("Deployment") == ()
    assert _contract(wanted.in_force).model_express.address == "mx.infra:8001"
    assert set(_data(ctx, AWKWARD)) == {"endpoint-token"}, "nobody needs the password in another Secret"
    step = decide(without(wanted), make_seen(ctx, *applied(wanted), status={"revision": wanted.in_force_revision}))
    assert step.status.trainer.state is TrainerState.STARTING


def test_a_persistent_ledger_lies_on_a_claim_that_goes_with_the_resource() -> None:
    rendered = render(make_context(redis={"persistence": {"size": "5Gi", "storageClassName": "fast"}}))
    claim = next(child for child in rendered.base if child["kind"] == "PersistentVolumeClaim")
    redis = next(
        child for child in rendered.base if child["kind"] == "Deployment" and child["metadata"]["name"] == "ws-redis"
    )
    data = next(v for v in redis["spec"]["template"]["spec"]["volumes"] if v["name"] == "data")
    assert data["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == "ws-redis"
    assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["metadata"]["ownerReferences"][0]["uid"] == UID
    default = render(make_context(redis={"persistence": {}}))
    assert "storageClassName" not in next(c for c in default.base if c["kind"] == "PersistentVolumeClaim")["spec"]


def test_operator_and_runtime_meet_in_the_database_that_the_spec_names(redis_server: RedisServer) -> None:
    """One password, the default user: the runtime writes what the contract says, the operator reads what the spec says."""
    redis_server.client().config_set("requirepass", AWKWARD)
    ctx = _external(address=f"127.0.0.1:{redis_server.port}")
    external, contract = ctx.spec.redis.external, _contract(render(ctx)).redis
    assert external is not None
    where = {"host": contract.host, "port": contract.port, "database": contract.database, "username": contract.username}
    with RuntimeLedger(session="s", password=AWKWARD, **where) as runtime:
        assert runtime.open_epoch(7) == 7

    async def look() -> int:
        async with LedgerReader() as reader:
            return (await reader.read(Ledger(**external_access(external), password=AWKWARD, session="s"))).epoch

    assert asyncio.run(look()) == 7
    assert Redis(port=redis_server.port, password=AWKWARD, db=0).keys() == []
