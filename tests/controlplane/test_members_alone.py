"""A real ModelExpress, with the rights of the chart on a real API server, admits members by their tokens and nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelexpress.auth import TokenProvider

from tests.controlplane.builders import make_context
from tests.controlplane.kube import Kube
from tests.fixtures.servers import ModelExpressServer, RedisServer, make_modelexpress_server
from weightsync.errors import RendezvousUnavailable
from weightsync.rendezvous.modelexpress import EngineDescriptor, Rendezvous
from weightsync_operator.plan.render import render

AUDIENCE = "modelexpress"
SOURCE = EngineDescriptor(replica="e0", incarnation="i", rank=0, agent_name="a", metadata=b"m", tensors={}, layout=b"l")


def _account(kube: Kube, name: str) -> None:
    kube.request("POST", kube.path("serviceaccounts"), {"metadata": {"name": name}})


def _token(kube: Kube, account: str, *audiences: str) -> str:
    """As the kubelet gets one for a projected volume; without audiences one for the API server."""
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"}
    spec = {"spec": {"audiences": list(audiences)} if audiences else {}}
    return kube.request("POST", kube.path("serviceaccounts", account) + "/token", {**asked, **spec})["status"]["token"]


@contextlib.contextmanager
def _server(kube: Kube, redis_server: RedisServer, folder: Path) -> Iterator[ModelExpressServer]:
    """ModelExpress with what its container has, as the account of its pod, on the real API server."""
    rendered = render(make_context(namespace=kube.namespace, token_review=True))
    deployment = next(
        child for child in rendered.base if (child["kind"], child["metadata"]["name"]) == ("Deployment", "ws-mx")
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    settings = {entry["name"]: entry["value"] for entry in container["env"] if "SECURITY" in entry["name"]}
    kubeconfig = kube.server.write_kubeconfig(folder / "kubeconfig", _token(kube, "ws.mx"))
    made = make_modelexpress_server(folder, redis_server.port, KUBECONFIG=str(kubeconfig), **settings)
    made.start()
    try:
        yield made
    finally:
        made.kill()


def _publish(server: ModelExpressServer, folder: Path, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that has this token mounted."""
    file = folder / "token"
    file.unlink(missing_ok=True)
    if token is not None:
        file.write_text(token)
    monkeypatch.setattr("modelexpress.auth._SHARED_PROVIDER", TokenProvider(path=str(file), ttl_seconds=0))
    with Rendezvous(address=server.address, session="s", model="/m", secret="x" * 32, retry_s=10.0) as rendezvous:
        rendezvous.publish(SOURCE)
        assert rendezvous.fetch("e0", "i", 0) == SOURCE


@pytest.mark.failure_mode(36)
def test_a_real_modelexpress_admits_members_and_refuses_everybody_else(
    kube: Kube, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rights that the chart gives: 1 a member publishes and fetches; refused are 2 another resource's member, 3 a member's
    token for the API server, 4 nobody's token, 5 no token at all. Seen to fail without the security settings: all are admitted.
    """
    for account in ("ws", "ws.mx", "other"):
        _account(kube, account)
    with _server(kube, redis_server, tmp_path) as server:
        _publish(server, tmp_path, _token(kube, "ws", AUDIENCE), monkeypatch)
        others = [(_token(kube, "other", AUDIENCE), "PERMISSION_DENIED")]
        others += [(token, "UNAUTHENTICATED") for token in (_token(kube, "ws"), "x.y.z", None)]
        for token, words in others:
            with pytest.raises(RendezvousUnavailable, match=words):
                _publish(server, tmp_path, token, monkeypatch)
