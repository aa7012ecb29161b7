"""`python -m bench.operator --resources 1000`: many WeightSyncs on a bare API server, and what the operator needs for them.

Real: API server, etcd, controller manager, RBAC, Redis, the operator as a process with the chart's rights. Played: kubelets, which
turn pods ready. Writes: time to converge, requests that change something while nothing happens (from the API server's audit log),
time from a restart to converged with a child of each twentieth resource deleted meanwhile, memory. All share this machine's cores,
so each part also tells the CPU seconds of each process: what the operator needs, and what the rest took beside it.

With `--resources 1 --engines 500`: also what one large fleet's status holds while half of it is behind, and after a push.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from redis import Redis

from bench.about import RESULTS, about, save
from bench.kubelet import SELECTOR, FleetKubelet, administrator
from bench.processes import cpu_seconds, spent
from e2e.lab.bareapi import BareApiServer, run_bare_api_server
from e2e.lab.tools import ensure_tool
from tests.controlplane.builders import MINIMAL, merged
from tests.controlplane.conftest import RELEASE, SYSTEM_NAMESPACE, helm_template, install
from tests.controlplane.process import OperatorProcess, start_operator
from tests.fixtures.servers import make_redis_server
from weightsync.wire import Keys, ReplicaStatus
from weightsync_operator.api.names import API_VERSION, KIND, LABEL_SESSION, PLURAL
from weightsync_operator.api.status import REPLICAS_SHOWN

NAMESPACES = 10
SETTLE_S = 30.0
DRIFT_EVERY = 20
CREATES_AT_ONCE = 8
CHANGES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
CONTROLLERS = tuple(
    f"--concurrent-{kind}-syncs=20" for kind in ("deployment", "statefulset", "job", "service-endpoint")
)


class Bench:
    """One API server with the chart installed, and the resources under test."""

    def __init__(
        self, server: BareApiServer, api: aiohttp.ClientSession, redis: Redis, arguments: argparse.Namespace
    ) -> None:
        self.server = server
        self.api = api
        self.redis = redis
        self.count = arguments.resources
        self.engines = arguments.engines
        self.limit_s = arguments.limit
        self.spec = merged(MINIMAL, {"inference": {"replicas": arguments.engines}})
        self.keys = [(f"bench-{i % NAMESPACES}", f"ws-{i}") for i in range(self.count)]

    async def create(self) -> None:
        """All namespaces and resources."""
        for i in range(min(NAMESPACES, self.count)):
            await self._post("/api/v1/namespaces", {"metadata": {"name": f"bench-{i}"}})
        slots = asyncio.Semaphore(CREATES_AT_ONCE)

        async def one(namespace: str, name: str) -> None:
            body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": self.spec}
            async with slots:
                await self._post(f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}", body)

        await asyncio.gather(*(one(*key) for key in self.keys))

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        async with self.api.post(path, json=body) as answer:
            if answer.status >= 400:
                raise RuntimeError(f"POST {path}: {answer.status} {await answer.text()}")

    async def converged(self) -> int:
        """How many resources have all engines ready and their trainer running."""
        async with self.api.get(f"/apis/{API_VERSION}/{PLURAL}") as answer:
            items = (await answer.json(content_type=None))["items"]
        return sum(_is_up(item.get("status") or {}, self.spec["inference"]["replicas"]) for item in items)

    async def session(self) -> str:
        """The session of the first resource, which its engines' pods carry."""
        (namespace, name), *_ = self.keys
        async with self.api.get(f"/api/v1/namespaces/{namespace}/pods/{name}-inference-0") as answer:
            return (await answer.json())["metadata"]["labels"][LABEL_SESSION]

    async def status_when(self, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first resource's status once it is so. Raises TimeoutError at the limit."""
        (namespace, name), *_ = self.keys
        async with asyncio.timeout(self.limit_s):
            while True:
                async with self.api.get(f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}/{name}") as answer:
                    status = (await answer.json())["status"]
                if met(status):
                    return status
                await asyncio.sleep(0.2)

    async def objects(self) -> dict[str, int]:
        """Objects with the operator's label, by kind."""
        groups = {
            "api/v1": ("pods", "services", "configmaps", "secrets", "serviceaccounts"), "batch/v1": ("jobs",),
            "apps/v1": ("deployments", "statefulsets", "controllerrevisions"), "policy/v1": ("poddisruptionbudgets",),
        }  # fmt: skip
        found = {}
        for group, kinds in groups.items():
            for kind in kinds:
                path = f"/{group if group == 'api/v1' else 'apis/' + group}/{kind}"
                headers = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}
                async with self.api.get(path, params={"labelSelector": SELECTOR}, headers=headers) as answer:
                    found[kind] = len((await answer.json())["items"] or ())
        return found

    async def drift(self) -> int:
        """Delete a Service of each twentieth resource."""
        for namespace, name in self.keys[::DRIFT_EVERY]:
            (await self.api.delete(f"/api/v1/namespaces/{namespace}/services/{name}-mx")).release()
        return len(self.keys[::DRIFT_EVERY])

    async def undrifted(self) -> int:
        paths = [f"/api/v1/namespaces/{namespace}/services/{name}-mx" for namespace, name in self.keys[::DRIFT_EVERY]]
        found = 0
        for path in paths:
            async with self.api.get(path) as answer:
                found += answer.status == 200
        return found

    def requests(self, since: float) -> dict[str, Any]:
        """What the operator asked since a moment, from the audit log: changes by object, the rest by verb; all for a resource."""
        user, counted = f"system:serviceaccount:{SYSTEM_NAMESPACE}:{RELEASE}-operator", Counter()
        for entry in self.server.audit():
            if entry["user"]["username"] == user and _seconds(entry["requestReceivedTimestamp"]) >= since:
                change = entry["verb"] in CHANGES
                counted[f"{entry['verb']} {entry['objectRef']['resource']}" if change else entry["verb"]] += 1
        own = {verb: number for verb, number in counted.items() if not verb.endswith(" leases")}
        return {**dict(sorted(counted.items())), "for_a_resource": round(sum(own.values()) / self.count, 2)}


def _is_up(status: dict[str, Any], engines: int) -> bool:
    ready = (status.get("inference") or {}).get("ready", 0)
    return ready == engines and (status.get("trainer") or {}).get("state") == "Running"


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def page(operator: OperatorProcess) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.port}/metrics", timeout=30) as answer:
        return answer.read().decode()


def value(text: str, name: str) -> float:
    """Of a metric without labels."""
    return float(re.findall(rf"^{name} ([0-9.e+-]+)$", text, re.MULTILINE)[0])


def passes(operator: OperatorProcess) -> dict[str, float]:
    """Passes since the process began, and the seconds that they took, waiting for answers included."""
    text = page(operator)
    names = ("weightsync_operator_reconcile_seconds_count", "weightsync_operator_reconcile_seconds_sum")
    return {name.removeprefix("weightsync_operator_"): round(value(text, name), 1) for name in names}


def memory(operator: OperatorProcess) -> dict[str, int]:
    """Resident MB now and at most."""
    text = Path(f"/proc/{operator.process.pid}/status").read_text()
    kib = {field: int(value) for field, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.MULTILINE)}
    return {"rss_mb": kib["VmRSS"] // 1024, "peak_mb": kib["VmHWM"] // 1024}


async def wait_for(
    what: str, fetch: Callable[[], Awaitable[int]], wanted: int, limit_s: float, every_s: float
) -> float:
    """Seconds until `fetch` is `wanted`; prints the way there. Raises RuntimeError with the last number at the limit."""
    began, last = time.monotonic(), -1
    while (now := await fetch()) != wanted:
        passed = time.monotonic() - began
        if now != last:
            print(f"{passed:7.1f} s  {what}: {now} of {wanted}", flush=True)
        if passed > limit_s:
            raise RuntimeError(f"{what}: {now} of {wanted} after {passed:.0f} s")
        last = now
        await asyncio.sleep(every_s)
    return time.monotonic() - began


async def measure(bench: Bench, start: Callable[[str], Any], steady_s: float) -> dict[str, Any]:
    """Converge, stand still, restart. What took longer than the limit is told, with what was measured before it."""
    report: dict[str, Any] = {}
    try:
        await _measure(bench, start, steady_s, report)
    except RuntimeError as error:
        report["given_up"] = str(error)
    return report


async def _measure(bench: Bench, start: Callable[[str], Any], steady_s: float, report: dict[str, Any]) -> None:
    every_s = 1.0 if bench.count < 300 else 5.0
    with start("first") as operator:
        operator.wait_ready()
        part = Part(bench)
        await bench.create()
        report["created_s"] = part.seconds
        await wait_for("converged", bench.converged, bench.count, bench.limit_s, every_s)
        report["converged_s"] = part.seconds
        report["converged"] = {**part.cost(), **passes(operator)}
        if bench.engines > REPLICAS_SHOWN:
            report["fleet"] = await large_fleet(bench)
        await asyncio.sleep(SETTLE_S)
        part = Part(bench)
        await asyncio.sleep(steady_s)
        report["steady"] = {"seconds": steady_s, **part.cost(), **memory(operator)}
        operator.end()
    drifted = await bench.drift()
    part = Part(bench)
    with start("second") as operator:
        operator.wait_ready()
        report["restart_ready_s"] = part.seconds
        await wait_for("repaired", bench.undrifted, drifted, bench.limit_s, 0.5)
        report["restart_repaired_s"] = part.seconds

        async def looked_at() -> int:
            text = page(operator)
            waits = value(text, "weightsync_operator_queue_depth") > 0
            return 0 if waits else len(re.findall(r"^weightsync_resource_epoch\{", text, re.MULTILINE))

        await wait_for("looked at again", looked_at, bench.count, bench.limit_s, every_s / 2)
        report["restart_converged_s"] = part.seconds
        report["restart"] = {**part.cost(), **memory(operator), **passes(operator)}
        operator.end()


class Part:
    """A part of the bench: its wall clock, requests and CPU since it began."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._began, self._since, self._cpu = time.monotonic(), time.time(), cpu_seconds()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._began, 1)

    def cost(self) -> dict[str, Any]:
        """Until now; the operator must still run."""
        return {"cpu_seconds": spent(self._cpu, cpu_seconds()), "requests": self._bench.requests(self._since)}


async def large_fleet(bench: Bench) -> dict[str, Any]:
    """One resource with more engines than a status shows: what it holds while half of them are behind, then after a push."""
    ((_, name),) = bench.keys
    ledger = FleetLedger(bench.redis, await bench.session(), [f"{name}-inference-{i}" for i in range(bench.engines)])
    behind = ledger.push(version=2, behind=bench.engines // 2)
    status = await bench.status_when(lambda status: status["version"]["committed"] == 2)
    shown = [replica["name"] for replica in status["replicas"]]
    half = {"bytes": len(json.dumps(status)), "replicas": len(shown), "of_them_behind": len(behind & set(shown))}
    part = Part(bench)
    ledger.push(version=3, behind=0)
    status = await bench.status_when(lambda status: status["inference"]["current"] == bench.engines)
    after = {"bytes": len(json.dumps(status)), "replicas": len(status["replicas"]), "shown_after_s": part.seconds}
    return {"half_behind": half, "after_a_push": {**after, **part.cost()}}


class FleetLedger:
    """Writes what a runtime with many engines would."""

    def __init__(self, redis: Redis, session: str, names: Sequence[str]) -> None:
        self._redis, self._keys, self._names = redis, Keys(session), names

    def push(self, *, version: int, behind: int) -> set[str]:
        """`version` is committed, and all engines hold it but the last few, whose names are returned."""
        late = set(self._names[len(self._names) - behind :])
        with self._redis.pipeline() as pipe:
            pipe.hset(self._keys.head, mapping={"epoch": 1, "version": version, "published": version})
            for name in self._names:
                held = version - (name in late)
                record = ReplicaStatus(name=name, version=held, epoch=1, state="CLEAN", serving=name not in late)
                pipe.hset(self._keys.replicas, name, record.to_json())
                pipe.set(self._keys.replica_lease(name), "1", ex=3600)
            pipe.execute()
        return late


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    redis = make_redis_server(folder)
    redis.start()
    redis.client().execute_command("ACL", "SETUSER", "operator", "on", "nopass", "~ws:*", "+@read", "+ping")
    (folder / "api").mkdir()
    try:
        with run_bare_api_server(ensure_tool("kube"), folder / "api", controller_flags=CONTROLLERS) as server:
            server.request("POST", "/api/v1/namespaces", {"metadata": {"name": SYSTEM_NAMESPACE}})
            install(server, [document for document in yaml.safe_load_all(helm_template().stdout) if document])
            token = server.service_account_token(SYSTEM_NAMESPACE, f"{RELEASE}-operator")
            kubeconfig = server.write_kubeconfig(folder / "kubeconfig", token)
            lease = {"WEIGHTSYNC_LEASE": f"{SYSTEM_NAMESPACE}/{RELEASE}-operator"}

            def start(name: str) -> Any:
                return start_operator(kubeconfig, folder / name, redis.port, **lease)

            async with administrator(server) as api:
                kubelet = asyncio.create_task(FleetKubelet(api).run())
                bench = Bench(server, api, redis.client(), arguments)
                report = await measure(bench, start, arguments.steady)
                report["objects"] = await bench.objects()
                kubelet.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await kubelet
            return report
    finally:
        redis.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resources", type=int, default=200)
    parser.add_argument("--engines", type=int, default=1, help="spec.inference.replicas of each")
    parser.add_argument("--steady", type=float, default=120.0, help="seconds in which nothing happens")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a wait is given up")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    head = about()
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as folder:
        report = asyncio.run(run(arguments, Path(folder)))
    report = {"about": head, "resources": arguments.resources, "engines": arguments.engines, **report}
    print(json.dumps(report, indent=1))
    print(save(f"operator-{arguments.resources}x{arguments.engines}", report, arguments.out))


if __name__ == "__main__":
    main()
