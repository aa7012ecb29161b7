"""The operator's rights are taken away for longer than Kopf would try: it follows again by itself once they are back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import kopf
import pytest

from tests.controlplane.builders import DEFAULTS, KEY, MINIMAL
from tests.controlplane.kube import Kube, wait_until
from tests.fixtures.servers import free_port
from weightsync_operator import handlers
from weightsync_operator.__main__ import WATCH_ENDED_EXIT_CODE, Operator, _login, main
from weightsync_operator.api.names import GROUP, PLURAL
from weightsync_operator.handlers import EndlessRetries, operator_settings, register
from weightsync_operator.settings import Settings
from weightsync_operator.workers import Workers

KOPFS_ATTEMPTS = 9
RBAC = "rbac.authorization.k8s.io"


@pytest.fixture
def account(kube: Kube, tmp_path: Path) -> Path:
    """A kubeconfig of an account that may do nothing."""
    path = f"/api/v1/namespaces/{kube.namespace}/serviceaccounts"
    kube.request("POST", path, {"metadata": {"name": "operator"}})
    return kube.server.write_kubeconfig(
        tmp_path / "kubeconfig", kube.server.service_account_token(kube.namespace, "operator")
    )


def _grant(kube: Kube) -> None:
    path = f"/apis/{RBAC}/v1/namespaces/{kube.namespace}"
    rule = {"apiGroups": [GROUP], "resources": [PLURAL], "verbs": ["get", "list", "watch"]}
    kube.request("POST", f"{path}/roles", {"metadata": {"name": "operator"}, "rules": [rule]})
    binding = {
        "metadata": {"name": "operator"},
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": "operator"},
        "subjects": [{"kind": "ServiceAccount", "name": "operator", "namespace": kube.namespace}],
    }
    kube.request("POST", f"{path}/rolebindings", binding)


def _refused(kube: Kube) -> int:
    user = f"system:serviceaccount:{kube.namespace}:operator"
    mine = [entry for entry in kube.server.audit() if entry["user"]["username"] == user]
    return sum(e["responseStatus"]["code"] == 403 and e["objectRef"].get("resource") == PLURAL for e in mine)


def test_an_outage_of_rbac_of_any_length_is_survived(
    kube: Kube, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 Kopf is refused three times as often as it would try by itself; 2 the right comes back; 3 a resource is told of."""
    monkeypatch.setenv("KUBECONFIG", str(account))
    monkeypatch.setattr(handlers, "RETRIES_S", (0.02,))
    poked: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(_login)
    register(registry, poked.put_nowait)

    async def scenario() -> None:
        stop = asyncio.Event()
        settings: Any = operator_settings(cluster_wide=False)
        watching = asyncio.create_task(
            kopf.operator(
                registry=registry, settings=settings, namespaces=[kube.namespace], standalone=True, stop_flag=stop
            )
        )
        try:
            await asyncio.to_thread(
                wait_until,
                "refusals",
                lambda: (_refused(kube), watching.done()),
                lambda seen: seen[0] > 3 * KOPFS_ATTEMPTS or seen[1],
            )
            assert not watching.done(), "Kopf gave up"
            await asyncio.to_thread(_grant, kube)
            await asyncio.to_thread(kube.create, MINIMAL)
            async with asyncio.timeout(30):
                assert await poked.get() == (kube.namespace, "ws")
        finally:
            stop.set()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(scenario())


def test_a_watch_that_ends_all_the_same_ends_the_operator_with_a_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """1 exit code 4, by which Kubernetes starts it again; 2 the log says why, with no traceback."""
    settings = Settings(defaults=DEFAULTS, operator_key=KEY, port=free_port())

    async def ends(**_: Any) -> None:
        raise LookupError("the server could not find the requested resource")

    async def watch(operator: Operator) -> None:
        await operator._watch(Workers(lambda key: asyncio.sleep(0, None)))

    def exit_with(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(kopf, "operator", ends)
    monkeypatch.setattr(Operator, "_work", watch)
    monkeypatch.setattr(Settings, "load", lambda: settings)
    monkeypatch.setattr("weightsync_operator.__main__.configure", lambda log_format: None)
    monkeypatch.setattr(os, "_exit", exit_with)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == WATCH_ENDED_EXIT_CODE
    assert (
        "the watch of WeightSyncs ended (LookupError('the server could not find the requested resource'))"
        in caplog.text
    )
    assert "Traceback" not in caplog.text


def test_retries_do_not_end_and_are_half_a_minute_apart_at_most() -> None:
    """Each request begins anew: an iterator that is used up would be no retry at all for the next one."""
    retries = EndlessRetries()
    for _ in range(2):
        first = [seconds for seconds, _ in zip(retries, range(1000), strict=False)]
        assert (len(first), max(first), first[0]) == (1000, 30.0, 1.0)
