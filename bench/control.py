"""What a push costs besides its bytes: 64 engine replicas, nearly nothing to send, and every step of the protocol.

    python -m bench.control [--replicas N] [--processes N] [--pushes N] [--out DIR]    writes DIR/control.json, prints a table

Real are Redis, ModelExpress, NIXL over tcp, the HTTP endpoint, `Replica` and `Receiver` on the engines' side and `Publisher` on
the trainer's. Only vLLM is missing: an engine here has one small parameter, pauses at once and answers nobody. The replicas live
in a few processes, each with its own port, agent and connection, since 64 Python processes want more than two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from bench.about import RESULTS, about, save
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pushes", type=int, default=20)
    parser.add_argument("--host", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host is not None:
        asyncio.run(host([Path(path) for path in options.host]))
        return
    os.environ["UCX_TLS"] = "tcp,self"
    report = {"about": about(), "limit_seconds": LIMIT_S, **measure(options)}
    save("control", report, options.out)
    show(report)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        redis = make_redis_server(folder)
        redis.command[redis.command.index("always")] = "everysec"  # as the operator's Redis
        modelexpress = make_modelexpress_server(folder, redis.port)
        for server in (redis, modelexpress):
            server.start()
            stack.callback(server.kill)
        contract = make_contract(folder, redis.port, modelexpress.address)
        ports = [free_port() for _ in range(options.replicas)]
        paths = [write_contract(folder, contract, port) for port in dict.fromkeys(ports)]
        for number in range(options.processes):
            mine = [str(path) for path in paths[number :: options.processes]]
            process = subprocess.Popen([sys.executable, "-m", "bench.control", "--host", *mine])
            stack.callback(process.wait)
            stack.callback(process.kill)
        return push(contract, len(paths), options.pushes, stack)


def push(contract: Contract, replicas: int, pushes: int, stack: ExitStack) -> dict[str, Any]:
    """Push from a trainer of one rank; the first pushes plan, connect and warm up."""
    ledger = stack.enter_context(Ledger.from_contract(contract))
    wait_joined(ledger, replicas)
    weight = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
    facts = PodFacts(name="trainer-0", uid="bench", ip="127.0.0.1", epoch=None)
    publisher = stack.enter_context(Publisher(sources_of([(PARAMETER, weight)], DENSE), contract=contract, facts=facts))
    taken = []
    for step in range(WARM_UP + pushes):
        weight.fill_(step + 1)
        started = time.perf_counter()
        told = publisher.push(step=step)
        taken.append(time.perf_counter() - started)
        assert len(told.replicas) == replicas and told.bytes == replicas * 2 * ELEMENTS, told
        print(f"  push {step}: {taken[-1] * 1e3:.1f} ms", file=sys.stderr, flush=True)
    summaries = ledger.pushes()[:pushes]
    assert all(summary.digest_ok for summary in summaries)
    phases = {name: median([summary.phases[name] for summary in summaries]) for name in summaries[0].phases}
    counted = sorted(taken[WARM_UP:])
    return {
        "replicas": replicas,
        "pushes": pushes,
        "first_seconds": taken[0],
        "median_seconds": median(counted),
        "least_seconds": counted[0],
        "most_seconds": counted[-1],
        "pause_seconds": median([summary.pause_seconds for summary in summaries]),
        "phase_seconds": phases,
    }


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


def wait_joined(ledger: Ledger, replicas: int) -> None:
    deadline = time.monotonic() + START_S
    while (count := len(ledger.live_members())) < replicas:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} of {replicas} replicas joined within {START_S:.0f} s")
        time.sleep(0.5)


class Worker(WorkerExtension):
    """One engine rank without vLLM."""

    rank = 0

    def __init__(self, contract: Contract, facts: PodFacts) -> None:
        self._contract, self._facts = contract, facts

    def _weightsync_offer(self, replica: str) -> Receiver:
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
                rank=0,
                params={PARAMETER: torch.zeros(ELEMENTS, dtype=torch.bfloat16)},
                layout=layout,
                ledger=Ledger.from_contract(self._contract),
                rendezvous=Rendezvous.from_contract(self._contract),
            )
        return self._weightsync_receiver


@dataclasses.dataclass
class Engine:
    """The part of vLLM's EngineClient that the plug-in uses."""

    worker: Worker

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None: ...

    async def resume_generation(self) -> None: ...

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        return [await asyncio.to_thread(getattr(self.worker, method), *args)]

    async def check_health(self) -> None: ...


async def host(contracts: list[Path]) -> None:
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
        await endpoint.init_state(Engine(Worker(contract, PodFacts.load())), app.state, None)
        config = uvicorn.Config(app, host="127.0.0.1", port=contract.endpoint.port, log_level="warning")
        servers.append(uvicorn.Server(config).serve())
    await asyncio.gather(*servers)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def show(report: dict[str, Any]) -> None:
    print(f"{report['replicas']} replicas, {report['pushes']} pushes of {ELEMENTS * 2} bytes each")
    for name in ("median", "least", "most", "first", "pause"):
        print(f"  {name:<12}{report[f'{name}_seconds'] * 1e3:10.1f} ms")
    print(f"  {'of the limit':<12}{report['median_seconds'] / report['limit_seconds']:10.2f}")
    for name, taken in report["phase_seconds"].items():
        print(f"  {'phase ' + name:<20}{taken * 1e3:10.1f} ms")


if __name__ == "__main__":
    main()
