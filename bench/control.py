"""What a push costs besides its bytes: 64 engine replicas, nearly nothing to send, and every step of the protocol.

    python -m bench.control [--replicas N] [--processes N] [--pushes N] [--out DIR]    writes DIR/control.json, prints a table
    python -m bench.control --against CHECKOUT    the same, in turns with the runtime of another checkout of this repository

Real are Redis, ModelExpress, NIXL over tcp, the HTTP endpoint, `Replica` and `Receiver` on the engines' side and `Publisher` on
the trainer's. Only vLLM is missing: an engine here has one small parameter, pauses at once and answers nobody. The replicas live
in a few processes, each with its own port, agent and connection, since 64 Python processes want more than two cores. What a push
costs is told as time, and as what does not depend on who shares the machine as much: processor time of each side, wake-ups of the
replicas' threads, calls of Redis.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import redis
import torch
import uvicorn
import uvloop
from fastapi import FastAPI

from bench.about import RESULTS, about, commit_of, save
from tests.fixtures.servers import free_port, make_modelexpress_server, make_redis_server
from weightsync import Publisher
from weightsync.config import (
    Contract,
    EndpointSection,
    FabricSection,
    ModelExpressSection,
    ModelSection,
    PodFacts,
    RedisSection,
    TransferSection,
)
from weightsync.layout.families import DENSE
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.layout.shards import sources_of
from weightsync.receiver import Receiver
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import Rendezvous
from weightsync.vllm.endpoint import WeightSyncEndpoint
from weightsync.vllm.worker import WorkerExtension

PARAMETER, ELEMENTS = "model.norm.weight", 64
WARM_UP = 3
LIMIT_S = 0.05
START_S = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=1, help="of each replica, each of them a receiver")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pushes", type=int, default=20)
    parser.add_argument(
        "--against", type=Path, help="a checkout of another commit, whose runtime takes turns with this one"
    )
    parser.add_argument("--turns", type=int, default=3, help="of each runtime, with --against")
    parser.add_argument("--host", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host is not None:
        uvloop.run(host([Path(path) for path in options.host], options.ranks))  # as vLLM runs its API server
        return
    os.environ.setdefault("UCX_TLS", "tcp,self")  # on a GPU machine NIXL wants cuda_copy beside them
    head = {"about": about(), "limit_seconds": LIMIT_S}
    if options.against is not None:
        report = {**head, **compare(options)}
        save(f"{file_name(options)}-turns", report, options.out)
    else:
        report = {**head, **measure(options)}
        save(file_name(options), report, options.out)
    show(report)


def file_name(options: argparse.Namespace) -> str:
    return "control" if options.ranks == 1 else "control-ranks"


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """This runtime and another one in turns, each turn with servers and replicas of its own; of each the median turn."""
    turns: dict[str, list[dict[str, Any]]] = {"other": [], "this": []}
    for _ in range(options.turns):
        turns["other"].append(turn(options, options.against))
        turns["this"].append(turn(options, Path.cwd()))
    median_turn = {
        name: sorted(each, key=lambda t: t["median_seconds"])[len(each) // 2] for name, each in turns.items()
    }
    return {
        **median_turn["this"],
        "turns_median_seconds": {name: [one["median_seconds"] for one in each] for name, each in turns.items()},
        "other": {**median_turn["other"], "commit": commit_of(options.against)},
    }


def turn(options: argparse.Namespace, checkout: Path) -> dict[str, Any]:
    """This bench in a process whose runtime is that of `checkout`."""
    with tempfile.TemporaryDirectory() as name:
        sizes = ["--replicas", options.replicas, "--ranks", options.ranks, "--processes", options.processes]
        sizes += ["--pushes", options.pushes]
        command = [sys.executable, "-m", "bench.control", *map(str, sizes), "--out", name]
        paths = [checkout.resolve() / "runtime", checkout.resolve() / "operator", Path.cwd()]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}, check=True)
        report = json.loads((Path(name) / f"{file_name(options)}.json").read_text())
    return {name: value for name, value in report.items() if name not in ("about", "limit_seconds")}


@dataclasses.dataclass(frozen=True)
class Spent:
    """What has been used up so far, by everybody who takes part in a push."""

    trainer_cpu_s: float
    coordinator_cpu_s: float
    """Of the thread that calls `push`, a part of the trainer's."""
    replicas_cpu_s: float
    redis_cpu_s: float
    wakeups: int
    """Of the replicas' threads: each one that blocked and went on."""
    redis_calls: dict[str, int]

    @classmethod
    def now(cls, hosts: Sequence[int], redis_pid: int, ledger: redis.Redis) -> Spent:
        told: dict[str, Any] = ledger.info("commandstats")  # type: ignore[assignment]
        return cls(
            trainer_cpu_s=time.process_time(),
            coordinator_cpu_s=time.thread_time(),
            replicas_cpu_s=sum(map(cpu_s, hosts)),
            redis_cpu_s=cpu_s(redis_pid),
            wakeups=sum(map(wakeups, hosts)),
            redis_calls={name.removeprefix("cmdstat_"): stat["calls"] for name, stat in told.items()},
        )

    def a_push(self, before: Spent, pushes: int) -> dict[str, Any]:
        """What each of `pushes` took since `before`."""
        calls = {name: (n - before.redis_calls.get(name, 0)) / pushes for name, n in self.redis_calls.items()}
        return {
            "cpu_seconds": {
                side: (getattr(self, f"{side}_cpu_s") - getattr(before, f"{side}_cpu_s")) / pushes
                for side in ("trainer", "coordinator", "replicas", "redis")
            },
            "wakeups": (self.wakeups - before.wakeups) / pushes,
            "redis_calls": {name: round(n, 1) for name, n in sorted(calls.items()) if n >= 1},
        }


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(pid: int) -> int:
    """Voluntary context switches of a process's threads that live."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError):  # a thread that ends while it is looked at
            total += int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        redis_server = make_redis_server(folder)
        redis_server.command[redis_server.command.index("always")] = "everysec"  # as the operator's Redis
        modelexpress = make_modelexpress_server(folder, redis_server.port)
        for server in (redis_server, modelexpress):
            server.start()
            stack.callback(server.kill)
        contract = make_contract(folder, redis_server.port, modelexpress.address)
        paths = [write_contract(folder, contract, port) for port in free_ports(options.replicas)]
        hosts: list[subprocess.Popen[bytes]] = []
        for number in range(options.processes):
            mine = [str(path) for path in paths[number :: options.processes]]
            ranks = ["--ranks", str(options.ranks)]
            process = subprocess.Popen([sys.executable, "-m", "bench.control", *ranks, "--host", *mine])
            stack.callback(process.wait)
            stack.callback(process.kill)
            hosts.append(process)
        assert redis_server.process is not None  # started above
        pid, client, pids = redis_server.process.pid, redis_server.client(), [host.pid for host in hosts]
        ledger = stack.enter_context(Ledger.from_contract(contract))
        wait_joined(ledger, len(paths), hosts)
        return push(contract, ledger, options, lambda: Spent.now(pids, pid, client))


def push(contract: Contract, ledger: Ledger, options: argparse.Namespace, spent: Callable[[], Spent]) -> dict[str, Any]:
    """Push from a trainer of one rank; the first pushes plan, connect and warm up."""
    receivers, pushes = options.replicas * options.ranks, options.pushes
    weight = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
    facts = PodFacts(name="trainer-0", uid="bench", ip="127.0.0.1", epoch=None)
    taken, before = [], spent()
    with Publisher(sources_of([(PARAMETER, weight)], DENSE), contract=contract, facts=facts) as publisher:
        for step in range(WARM_UP + pushes):
            if step == WARM_UP:
                before = spent()
            weight.fill_(step + 1)
            started = time.perf_counter()
            told = publisher.push(step=step)
            taken.append(time.perf_counter() - started)
            assert len(told.replicas) == options.replicas and told.bytes == receivers * 2 * ELEMENTS, told
            print(f"  push {step}: {taken[-1] * 1e3:.1f} ms", file=sys.stderr, flush=True)
        used = spent().a_push(before, pushes)
    summaries = ledger.pushes()[:pushes]
    assert all(summary.digest_ok for summary in summaries)
    phases = {name: median([summary.phases[name] for summary in summaries]) for name in summaries[0].phases}
    counted = sorted(taken[WARM_UP:])
    return {
        "replicas": options.replicas,
        "receivers": receivers,
        "pushes": pushes,
        "first_seconds": taken[0],
        "median_seconds": median(counted),
        "least_seconds": counted[0],
        "most_seconds": counted[-1],
        "pause_seconds": median([summary.pause_seconds for summary in summaries]),
        "phase_seconds": phases,
        "a_push": used,
    }


def free_ports(count: int) -> set[int]:
    """Different ones: the kernel may offer one twice."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return ports


def make_contract(folder: Path, redis_port: int, modelexpress: str) -> Contract:
    token = folder / "token"
    token.write_text("bench-token")
    return Contract(
        session="bench-session",
        name="bench",
        model=ModelSection(path="bench"),
        redis=RedisSection(host="127.0.0.1", port=redis_port),
        model_express=ModelExpressSection(address=modelexpress),
        endpoint=EndpointSection(token_file=str(token)),
        fabric=FabricSection(profile="emulated", transports=("tcp",), revocation="agent"),
        transfer=TransferSection(timeout_seconds=60.0),
    )


def write_contract(folder: Path, contract: Contract, port: int) -> Path:
    endpoint = contract.endpoint.model_copy(update={"port": port})
    path = folder / f"contract-{port}.json"
    path.write_text(contract.model_copy(update={"endpoint": endpoint}).model_dump_json(by_alias=True))
    return path


def wait_joined(ledger: Ledger, replicas: int, hosts: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_S
    while (count := len(ledger.live_members())) < replicas:
        if any(host.poll() is not None for host in hosts):
            raise RuntimeError("a process of replicas ended at its start; its last lines are above")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} of {replicas} replicas joined within {START_S:.0f} s")
        time.sleep(0.5)


class Worker(WorkerExtension):
    """One engine rank without vLLM."""

    def __init__(self, contract: Contract, facts: PodFacts, rank: int) -> None:
        self._contract, self._facts, self.rank = contract, facts, rank

    def _weightsync_join(self, replica: str) -> Receiver:
        if not hasattr(self, "_weightsync_receiver"):
            layout = TargetLayout(
                targets=(Target(PARAMETER, (ELEMENTS,), "bfloat16"),),
                sources=(SourceTensor(PARAMETER, (ELEMENTS,), "bfloat16"),),
                copies=(Copy(PARAMETER, 0, (1,), PARAMETER, 0, (1,), (ELEMENTS,)),),
            )
            self._weightsync_receiver = Receiver(
                contract=self._contract,
                facts=self._facts,
                replica=replica,
                rank=self.rank,
                params={PARAMETER: torch.zeros(ELEMENTS, dtype=torch.bfloat16)},
                layout=layout,
                ledger=Ledger.from_contract(self._contract),
                rendezvous=Rendezvous.from_contract(self._contract),
            )
        return self._weightsync_receiver


@dataclasses.dataclass
class Engine:
    """The part of vLLM's EngineClient that the plug-in uses."""

    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    workers: list[Worker]

    async def generate(self) -> None: ...

    async def update_weight_version(self, version: str) -> None: ...

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None: ...

    async def resume_generation(self) -> None: ...

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        return await asyncio.to_thread(lambda: [getattr(worker, method)(*args) for worker in self.workers])

    async def check_health(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None: ...


async def host(contracts: list[Path], ranks: int) -> None:
    """Serve one replica for each contract, in this process, until it is killed."""
    torch.set_num_threads(1)
    # As many threads a replica as asyncio gives one that has a process, and two cores, of its own.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(6 * len(contracts)))
    servers = []
    for path in contracts:
        contract = Contract.parse(path.read_text())
        name = f"engine-{contract.endpoint.port}"
        os.environ.update(WEIGHTSYNC_CONFIG=str(path), POD_NAME=name, POD_UID=f"uid-{name}", POD_IP="127.0.0.1")
        endpoint, app = WeightSyncEndpoint(), FastAPI()
        endpoint.attach_router(app)
        workers = [Worker(contract, PodFacts.load(), rank) for rank in range(ranks)]
        await endpoint.init_state(Engine(workers), app.state, None)
        config = uvicorn.Config(app, host="127.0.0.1", port=contract.endpoint.port, log_level="warning")
        servers.append(uvicorn.Server(config).serve())
    gc.collect()
    gc.freeze()  # as vLLM's API server and workers do once they have started (vllm/utils/gc_utils.py, freeze_gc_heap)
    await asyncio.gather(*servers)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def show(report: dict[str, Any]) -> None:
    """A column for this runtime, and one for the other where there is one."""
    sides = [report, *([report["other"]] if "other" in report else [])]
    print(f"{report['receivers']} receivers of {report['replicas']} replicas, {report['pushes']} pushes")

    def row(name: str, values: Iterable[float], unit: str = "ms") -> None:
        print(f"  {name:<24}" + "".join(f"{value:10.1f} {unit}" for value in values))

    for name in ("median", "least", "most", "first", "pause"):
        row(name, [side[f"{name}_seconds"] * 1e3 for side in sides])
    row("of the limit", [side["median_seconds"] / report["limit_seconds"] for side in sides], "  ")
    for name in report["phase_seconds"]:
        row(f"phase {name}", [side["phase_seconds"][name] * 1e3 for side in sides])
    for name in report["a_push"]["cpu_seconds"]:
        row(f"processor, {name}", [side["a_push"]["cpu_seconds"][name] * 1e3 for side in sides])
    row("wake-ups of replicas", [side["a_push"]["wakeups"] for side in sides], "  ")
    row("calls of Redis", [sum(side["a_push"]["redis_calls"].values()) for side in sides], "  ")


if __name__ == "__main__":
    main()
