"""A Redis that speaks TLS: managed, started with the arguments of its pod, and external; who reaches it, and who is refused.

Everything real: redis-server, the runtime's ledger, the operator's reader, ModelExpress behind the forwarder.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from tests.controlplane.builders import KEY, UID, make_context, make_seen, make_wanted
from tests.fixtures.certificates import Authority
from tests.fixtures.servers import RedisServer, free_port, make_modelexpress_server, make_redis_server
from weightsync.config import Contract, RedisTlsSection
from weightsync.errors import LedgerUnavailable
from weightsync.rendezvous.ledger import Ledger as RuntimeLedger
from weightsync.rendezvous.modelexpress import EngineDescriptor, Rendezvous
from weightsync_operator.credentials import read_credentials
from weightsync_operator.ledger_keys import clear_keys
from weightsync_operator.plan.actions import Apply
from weightsync_operator.plan.build.auth import access_list, derive_passwords, secret
from weightsync_operator.plan.build.context import REDIS_PORT, Context
from weightsync_operator.plan.build.redis import certificate_of
from weightsync_operator.plan.decide import Wanted, decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.observed import LedgerView
from weightsync_operator.plan.render import Render, render
from weightsync_operator.telemetry import Ledger, LedgerReader

PASSWORDS = derive_passwords(KEY, UID)
MANAGED = {"tls": {"secretRef": {"name": "cert"}}}
EXTERNAL = {"address": "redis.infra:6380", "secretRef": {"name": "theirs"}, "tls": {"caSecretRef": {"name": "ca"}}}


def _child(rendered: Render, kind: str, name: str) -> dict[str, Any]:
    return next(c for c in rendered.base if (c["kind"], c["metadata"]["name"]) == (kind, name))


def _containers(rendered: Render, deployment: str) -> dict[str, dict[str, Any]]:
    containers = _child(rendered, "Deployment", deployment)["spec"]["template"]["spec"]["containers"]
    return {container["name"]: container for container in containers}


def _contract(ctx: Context) -> dict[str, Any]:
    (found,) = [c for c in render(ctx).base if c["kind"] == "ConfigMap"]
    return json.loads(found["data"]["contract.json"])


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[RedisServer]:
    """redis-server with the arguments of the managed Redis's container; what it has mounted lies below tmp_path."""
    container = _containers(render(make_context(redis=MANAGED)), "ws-redis")["redis"]
    files = authority.write(tmp_path / "tls", "127.0.0.1", "localhost")
    (tmp_path / "users.acl").write_text(access_list(PASSWORDS))
    made = make_redis_server(tmp_path)
    places = {"/etc/weightsync-redis-tls": str(files), "/etc/weightsync-redis": str(tmp_path), "/data": str(tmp_path)}
    arguments = [_moved(argument, places) for argument in container["args"]]
    ports = {str(REDIS_PORT): str(made.port)}
    made.command = [made.command[0], *(ports.get(argument, argument) for argument in arguments)]
    made.is_up = lambda: _answers(made.port, files / "ca.crt")
    made.start()
    yield made
    made.kill()


def _moved(argument: str, places: dict[str, str]) -> str:
    for place, here in places.items():
        if argument == place or argument.startswith(f"{place}/"):
            return here + argument.removeprefix(place)
    return argument


def _answers(port: int, ca: Path) -> bool:
    client = redis.Redis(
        port=port, ssl=True, ssl_ca_certs=str(ca), host="localhost", username="probe", password="probe"
    )
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    finally:
        client.close()


def _runtime(server: RedisServer, ca: Path | None, host: str = "127.0.0.1", retry_s: float = 5.0) -> RuntimeLedger:
    tls = RedisTlsSection(ca_file=None if ca is None else str(ca))
    where = {"host": host, "port": server.port, "username": "runtime", "password": PASSWORDS.runtime}
    return RuntimeLedger(session="s", tls=tls, retry_s=retry_s, **where)


def _ledger(server: RedisServer, ca: str, host: str = "127.0.0.1") -> Ledger:
    where = {"host": host, "port": server.port, "username": "operator", "password": PASSWORDS.operator}
    return Ledger(session="s", tls=True, ca=ca, **where)


def test_runtime_and_operator_meet_over_tls_and_nothing_is_told_in_the_clear(
    server: RedisServer, authority: Authority, tmp_path: Path
) -> None:
    with _runtime(server, tmp_path / "tls" / "ca.crt") as runtime:
        assert runtime.open_epoch(7) == 7
    assert asyncio.run(_look(_ledger(server, authority.pem))).epoch == 7
    with redis.Redis(port=server.port, socket_timeout=2) as plain, pytest.raises(redis.ConnectionError):
        plain.ping()


async def _look(ledger: Ledger) -> LedgerView:
    """One look of the operator, over a connection of its own."""
    async with LedgerReader() as reader:
        return await reader.read(ledger)


@pytest.mark.failure_mode(36)
def test_a_server_that_cannot_prove_its_name_gets_no_password(server: RedisServer, tmp_path: Path) -> None:
    """1 signed by nobody we trust; 2 signed, and for another host: the operator and the runtime refuse both."""
    stranger = Authority("a stranger").pem
    (tmp_path / "stranger.crt").write_text(stranger)
    trusted = (tmp_path / "tls" / "ca.crt").read_text()
    for ca, host in ((stranger, "127.0.0.1"), (trusted, "127.0.0.2")):
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            asyncio.run(_look(_ledger(server, ca, host)))
    for file, host in (("stranger.crt", "127.0.0.1"), ("tls/ca.crt", "127.0.0.2")):
        with (
            _runtime(server, tmp_path / file, host, retry_s=0.2) as runtime,
            pytest.raises(LedgerUnavailable, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            runtime.head()


def test_keys_are_deleted_over_tls(server: RedisServer, authority: Authority, tmp_path: Path) -> None:
    with _runtime(server, tmp_path / "tls" / "ca.crt") as runtime:
        runtime.open_epoch(1)
        where = {"host": "127.0.0.1", "port": server.port, "username": "runtime", "password": PASSWORDS.runtime}
        mine = Ledger(session="", tls=True, ca=authority.pem, **where)
        refused = asyncio.run(clear_keys(Ledger(session="", tls=True, ca=Authority("other").pem, **where), "ws:s:"))
        assert "CERTIFICATE_VERIFY_FAILED" in refused
        assert asyncio.run(_look(_ledger(server, authority.pem))).epoch == 1
        assert asyncio.run(clear_keys(mine, "ws:s:")) == ""
        assert asyncio.run(_look(_ledger(server, authority.pem))).epoch == 0


def _forwarder(ctx: Context, ca: Path, listen: int, port: int) -> list[str]:
    """The command of the container beside ModelExpress, with what a test has elsewhere replaced."""
    container = _containers(render(ctx), "ws-mx")["redis-tls"]
    words = {
        str(REDIS_PORT): str(listen),
        "ws-redis": "127.0.0.1",
        "/etc/weightsync-redis-ca/redis-ca.crt": str(ca),
    }
    arguments = [words.get(argument, argument) for argument in container["args"]]
    arguments[arguments.index("--port") + 1] = str(port)
    return [sys.executable, *container["command"][1:], *arguments]


@pytest.fixture
def forwarded(server: RedisServer, tmp_path: Path) -> Iterator[int]:
    """A port of loopback that is forwarded to the server."""
    listen = free_port()
    command = _forwarder(make_context(redis=MANAGED), tmp_path / "tls" / "ca.crt", listen, server.port)
    with subprocess.Popen(command) as process:
        _until(lambda: _pings(listen), process)
        yield listen
        process.terminate()
        assert process.wait(10) == 0


def _pings(port: int) -> bool:
    with redis.Redis(port=port, username="probe", password="probe", socket_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def _until(met: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert process.poll() is None, f"the forwarder ended with {process.returncode}"
        assert time.monotonic() < deadline, "the forwarder carries nothing after 30 s"
        time.sleep(0.05)


def test_the_forwarder_carries_large_answers_and_tells_both_ends_of_the_other(
    server: RedisServer, forwarded: int
) -> None:
    """1 a megabyte there and back; 2 Redis dies: the client's connection ends; 3 it is back: so is the next one."""
    with redis.Redis(port=forwarded, username="runtime", password=PASSWORDS.runtime, socket_timeout=20) as client:
        client.set("ws:big", b"x" * 1_000_000)
        assert client.get("ws:big") == b"x" * 1_000_000
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("ws:big")
        server.start()
        assert client.get("ws:big") == b"x" * 1_000_000


def test_modelexpress_reaches_it_through_the_forwarder(server: RedisServer, forwarded: int, tmp_path: Path) -> None:
    folder = tmp_path / "mx"
    folder.mkdir()
    url = base64.b64decode(_secret_data(make_context(redis=MANAGED))["mx-redis-url"]).decode()
    mx = make_modelexpress_server(folder, forwarded, REDIS_URL=url.replace(f":{REDIS_PORT}", f":{forwarded}"))
    mx.start()
    source = EngineDescriptor(
        replica="e0", incarnation="i", rank=0, agent_name="a", metadata=b"m", tensors={}, layout=b"l"
    )
    try:
        with Rendezvous(address=mx.address, session="s", model="/m", secret="x" * 32) as rendezvous:
            rendezvous.publish(source)
            assert rendezvous.fetch("e0", "i", 0) == source
    finally:
        mx.kill()


def _secret_data(ctx: Context) -> dict[str, str]:
    return secret(ctx.owner, PASSWORDS, ctx.spec)["data"]


def test_the_contract_says_tls_and_where_the_pods_have_the_authority() -> None:
    for over in (MANAGED, {"external": EXTERNAL}):
        ctx = make_context(redis=over)
        tls = Contract.parse(json.dumps(_contract(ctx))).redis.tls
        assert tls is not None and tls.ca_file == "/var/run/weightsync/redis-ca.crt"
        volume = next(v for v in _engine(ctx)["volumes"] if v["name"] == "auth")
        last = volume["projected"]["sources"][-1]["secret"]
        assert last["items"] == [{"key": "ca.crt", "path": "redis-ca.crt"}]
        assert last["name"] == ("cert" if over is MANAGED else "ca")
    known = Contract.parse(json.dumps(_contract(make_context(redis={"external": {**EXTERNAL, "tls": {}}})))).redis.tls
    assert known == RedisTlsSection(ca_file=None)


def _engine(ctx: Context) -> dict[str, Any]:
    return render(ctx).engines["spec"]["template"]["spec"]


def test_only_a_document_with_tls_asks_for_a_runtime_that_knows_it() -> None:
    """A runtime of the release before reads every other document still, and no name of a contract changed."""
    assert _contract(make_context())["contract"] == "1.1"
    assert "tls" not in _contract(make_context())["redis"]
    assert _contract(make_context(redis=MANAGED))["contract"] == "1.2"


def test_nobody_but_redis_has_its_private_key() -> None:
    rendered = render(make_context(redis=MANAGED))
    mx = _child(rendered, "Deployment", "ws-mx")["spec"]["template"]["spec"]
    for spec in (mx, rendered.engines["spec"]["template"]["spec"], rendered.trainer["spec"]["template"]["spec"]):
        mounted = json.dumps(spec["volumes"])
        assert "cert" in mounted
        assert "tls.key" not in mounted
        assert '{"secretName": "cert"' not in mounted


def test_modelexpress_asks_its_own_pod_and_its_liveness_looks_there() -> None:
    ctx = make_context(redis={"external": {**EXTERNAL, "database": 3}})
    url = base64.b64decode(_secret_data(ctx)["mx-redis-url"]).decode()
    assert url.endswith("@127.0.0.1:6379/3")
    probe = _containers(render(ctx), "ws-mx")["modelexpress"]["livenessProbe"]["exec"]["command"][-1]
    assert "/dev/tcp/redis.infra/6380" in probe
    assert f":{REDIS_PORT:04X} 01" in probe
    assert list(_containers(render(make_context()), "ws-mx")) == ["modelexpress"]


def test_a_renewed_certificate_restarts_redis_and_nobody_else() -> None:
    """1 the same spec is in force; of its children one is applied again; 2 what it was rendered with says nothing of it."""
    wanted = dataclasses.replace(make_wanted(make_context(redis=MANAGED)), certificate="a")
    renewed = dataclasses.replace(wanted, certificate="b")
    applied_before = _applied(wanted)
    assert {name for name, child in _applied(renewed).items() if child != applied_before[name]} == {"ws-redis"}
    assert certificate_of(_applied(renewed)["ws-redis"]) == "b"
    assert (
        "certificate"
        not in _child(wanted.fresh, "Deployment", "ws-redis")["spec"]["template"]["metadata"]["annotations"]
    )


def test_a_certificate_is_noted_only_where_the_redis_in_force_speaks_tls() -> None:
    """A spec that turns TLS on restarts Redis when it comes into force, not before."""
    wanted = make_wanted(make_context(redis=MANAGED), in_force=make_context())
    early = dataclasses.replace(wanted, certificate="a")
    assert certificate_of(_applied(early)["ws-redis"]) == ""


def test_another_secret_of_a_spec_that_is_not_admitted_yet_restarts_nothing() -> None:
    """Seen to fail where the fingerprint was the spec's: Redis restarted on the Secret that it had before."""
    wanted = dataclasses.replace(make_wanted(make_context(redis=MANAGED)), certificate="a")
    redis = {**_applied(wanted)["ws-redis"], "kind": "Deployment"}
    other = make_wanted(
        make_context(redis={"tls": {"secretRef": {"name": "other"}}}), in_force=make_context(redis=MANAGED)
    )
    asked = dataclasses.replace(other, certificate="b")
    assert certificate_of(_applied(asked)["ws-redis"]) == "", "a first pass has no pods to look at"
    assert "ws-redis" not in _applied(asked, redis), "it is as it was applied"


def _applied(wanted: Wanted, *children: dict[str, Any]) -> dict[str, Any]:
    """Deployments and sets that a first pass over `wanted` applies, by name."""
    actions = decide(wanted, make_seen(wanted.ctx, *children, status={"revision": wanted.in_force_revision})).actions
    manifests = [action.manifest for action in actions if isinstance(action, Apply)]
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in ("Deployment", "StatefulSet")}


def _cluster(**secrets: dict[str, str]) -> Any:
    """A cluster that has these Secrets and nothing else."""

    async def get(kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        assert (kind, namespace) == ("Secret", "ns")
        content = secrets.get(name)
        if content is None:
            return None
        return {"data": {key: base64.b64encode(value.encode()).decode() for key, value in content.items()}}

    return SimpleNamespace(get=get)


def _read(redis_spec: dict[str, Any], **secrets: dict[str, str]) -> Any:
    ctx = make_context(redis=redis_spec)
    resource = {"metadata": {"namespace": "ns", "uid": UID}}
    return asyncio.run(read_credentials(_cluster(**secrets), resource, ctx.spec, KEY))


def test_the_operator_reads_whom_to_trust_and_tells_certificates_apart(authority: Authority) -> None:
    one, other = (_read(MANAGED, cert=authority.secret("ws-redis")) for _ in range(2))
    assert one.ca.strip() == authority.pem.strip()
    assert one.certificate and one.certificate != other.certificate
    assert one.passwords == other.passwords == PASSWORDS
    found = _read({"external": EXTERNAL}, theirs={"password": "p"}, ca={"ca.crt": authority.pem})
    assert (found.passwords.runtime, found.ca.strip(), found.certificate) == ("p", authority.pem.strip(), "")
    assert _read({"external": {**EXTERNAL, "tls": {}}}, theirs={"password": "p"}).ca is None


def test_a_bundle_with_comments_in_any_language_is_trusted(authority: Authority) -> None:
    """As authorities call themselves: NetLock Arany (Főtanúsítvány)."""
    ledger = Ledger(
        host="h", port=1, username=None, password="p", session="s", tls=True, ca=f"# Főtanúsítvány\n{authority.pem}"
    )
    trusted = ledger.client().connection_pool.connection_kwargs["ssl_ca_data"]
    assert ssl.create_default_context(cadata=trusted).cert_store_stats()["x509_ca"] == 1


@pytest.mark.parametrize(
    ("spec", "secrets", "words"),
    [
        (MANAGED, {}, "spec.redis.tls.secretRef: Secret cert is not in this namespace"),
        (
            MANAGED,
            {"cert": {"ca.crt": "x", "tls.crt": "x"}},
            "spec.redis.tls.secretRef: Secret cert has no key tls.key",
        ),
        (
            {"external": EXTERNAL},
            {"theirs": {"password": "p"}},
            "spec.redis.external.tls.caSecretRef: Secret ca is not in this namespace",
        ),
    ],
)
def test_a_missing_certificate_is_told_by_its_field(
    spec: dict[str, Any], secrets: dict[str, dict[str, str]], words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        _read(spec, **secrets)
    assert words in str(caught.value)
