"""The wire of a push between two processes of this machine, against the best plain NIXL stream in the same run.

    python -m bench.push [--out DIR]        writes DIR/push.json and prints a table

The product's side is its own: a plan of three Qwen3-30B-A3B layers (a tensor an expert, FSDP over 4 ranks, an engine of TP 4 and
EP 4), `Writer` and `Agent` as a trainer rank has them, and an engine that looks for notifications as `Receiver` does. The
plain stream moves as many bytes from one buffer to one buffer with nothing around NIXL, in several ways of which the best
counts. All take turns, so that what else the machine does falls on all of them alike. Rates are medians of payload bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from bench.about import RESULTS, about, save
from bench.layouts import Model, engine, fsdp, sources
from weightsync import verify
from weightsync.benchmark.streams import PLAIN, plain_stream, take_turns
from weightsync.benchmark.wire import bench_record
from weightsync.layout.forms import Group
from weightsync.layout.records import SourceLayout, TargetLayout
from weightsync.layout.ring import Ring
from weightsync.plan import make_plan
from weightsync.reception import NOTIFICATION_POLL_S
from weightsync.rendezvous.incarnation import replica_incarnation
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor
from weightsync.transport import Agent, Region
from weightsync.waiting import Deadline
from weightsync.writer import Writer

LAYERS = Model(
    layers=3, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, intermediate=768, vocabulary=16384
)
SHARDS = 4
TRANSPORTS = {"tcp": "tcp,self", "shared memory": "sm,tcp,self"}
"""NIXL's UCX backend needs a network device even where every byte goes through shared memory."""
ROUNDS = 5
LIMIT = 0.8
TIMEOUT_S = 60.0
PRODUCT = "push by the product"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--transport", choices=list(TRANSPORTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transport is not None:
        print(json.dumps(measure()))
        return
    report: dict[str, Any] = {"about": about(), "limit_ratio": LIMIT, "transports": []}
    for name, tls in TRANSPORTS.items():
        print(f"{name}, UCX_TLS={tls} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "bench.push", "--transport", name]
        environment = {**os.environ, "UCX_TLS": tls, "OMP_NUM_THREADS": "1"}
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
        report["transports"].append({"transport": name, "ucx_tls": tls, **json.loads(told.splitlines()[-1])})
    save("push", report, options.out)
    show(report["transports"])


def measure() -> dict[str, Any]:
    """One transport, in this process and a child."""
    tensors = sources(LAYERS, fused=False)
    held = fsdp(tensors, ranks=SHARDS)
    layout = engine(LAYERS, tensors, tp=SHARDS, ep=SHARDS, rank=0, fused=False)
    context = mp.get_context("spawn")
    pause_s = context.Value("d", 0.0)
    ours, theirs = context.Pipe()
    receiver = context.Process(target=receive, args=(theirs, layout.to_bytes(), pause_s), daemon=True)
    receiver.start()
    descriptor, base = hear(ours)
    arena = torch.randint(0, 256, (2 * max(h.local_offset + h.stop - h.start for h in held[0].holdings),)).to(
        torch.uint8
    )
    with Agent("trainer") as agent:
        product, writes, targets, writer = prepare_product(agent, arena, held, layout, descriptor)
        payload = int(writes["length"].sum()) * 2
        runs: dict[str, Callable[[], None]] = {}
        peer = descriptor.agent_name
        here, there = (Region(address=at, length_bytes=payload) for at in (arena.data_ptr(), base))
        for name, manner in PLAIN.items():
            runs[name] = plain_stream(agent, peer, here, there, manner, TIMEOUT_S)
        runs[PRODUCT] = product
        pauses = {name: manner.pause_s or 0.0 for name, manner in PLAIN.items()} | {PRODUCT: NOTIFICATION_POLL_S}

        def have_paused(name: str) -> None:
            pause_s.value = pauses[name]

        seconds = take_turns(runs, turns=ROUNDS, before=have_paused)
        product()  # last, so that it is its bytes that are checked
        ours.send(writes)
        same = hear(ours) == verify.digest_writes(arena, writes, targets)
        writer.close()
    receiver.join(TIMEOUT_S)
    return result(seconds, payload, writes, same)


def prepare_product(
    agent: Agent, arena: torch.Tensor, held: list[SourceLayout], layout: TargetLayout, descriptor: EngineDescriptor
) -> tuple[Callable[[], None], np.ndarray, Any, Writer]:
    """A trainer rank's writer that has learnt the engine; its conversion and its rendezvous are stood in for."""
    whole, ring = Group(0, 1, 0, arena.nbytes), Ring(arena.nbytes, (0,), (frozenset(),))
    slots = SimpleNamespace(layouts=held, buffer=torch.empty(0), groups=[whole], ring=ring, wants=lambda _: layout)

    def lay_out(_: Mapping[str, TargetLayout]) -> bool:
        slots.buffer = arena
        return True

    slots.lay_out = lay_out
    rendezvous = SimpleNamespace(fetch=lambda *_, **__: descriptor)
    writer = Writer(rank=0, agent=agent, slots=slots, rendezvous=rendezvous)  # type: ignore[arg-type]
    members = {descriptor.replica: replica_incarnation([descriptor.incarnation])}
    digests = writer.learn(members, Deadline(TIMEOUT_S), catch_up=False)
    record = bench_record("1.1.1", digests, members)
    writer.measure(record)
    plan = make_plan(held, layout)

    def push() -> None:
        writer.write(record, record.members.keys(), Deadline(TIMEOUT_S), frozenset)

    return push, plan.writes(0), plan.targets, writer


def result(seconds: Mapping[str, float], payload: int, writes: np.ndarray, same: bool) -> dict[str, Any]:
    plain = {name: taken for name, taken in seconds.items() if name != PRODUCT}
    best = min(plain, key=lambda name: plain[name])
    lengths = writes["length"] * 2
    return {
        "payload_bytes": payload,
        "writes": len(writes),
        "shortest_bytes": int(lengths.min()),
        "median_bytes": int(np.median(lengths)),
        "bytes_equal": same,
        "gbps": {name: payload / taken / 1e9 for name, taken in seconds.items()},
        "best_plain": best,
        "ratio": plain[best] / seconds[PRODUCT],
    }


def receive(pipe: Any, encoded: bytes, pause_s: Any) -> None:
    """The engine's process: offers its memory, makes progress until it is asked what it found there."""
    layout = TargetLayout.from_bytes(encoded)
    targets = sorted(layout.targets, key=lambda target: target.name)
    starts = np.cumsum([0, *(target.numel for target in targets)])
    memory = torch.zeros(2 * int(starts[-1]), dtype=torch.uint8)
    tensors = {
        target.name: RemoteTensor(
            name=target.name,
            address=memory.data_ptr() + 2 * start,
            length_bytes=2 * target.numel,
            device_id=0,
            dtype=target.dtype,
        )
        for target, start in zip(targets, starts.tolist(), strict=False)
    }
    with Agent("engine") as agent:
        agent.register([memory])
        descriptor = EngineDescriptor(
            replica="engine",
            incarnation="bench.1",
            rank=0,
            agent_name=agent.name,
            metadata=agent.metadata(),
            tensors=tensors,
            layout=encoded,
        )
        pipe.send((descriptor, memory.data_ptr()))
        while not pipe.poll(0):
            agent.notifications()
            time.sleep(pause_s.value)
        writes = hear(pipe)
        writes["slot_offset"] = starts[writes["target_index"]] + writes["target_offset"]
        pipe.send(verify.digest_writes(memory, writes, targets))


def hear(pipe: Any) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"the other process said nothing for {TIMEOUT_S:.0f} s")
    return pipe.recv()


def show(transports: list[dict[str, Any]]) -> None:
    for each in transports:
        print(
            f"{each['transport']} (UCX_TLS={each['ucx_tls']}): {each['payload_bytes'] / 1e6:.0f} MB in {each['writes']} writes "
            f"of {each['shortest_bytes']} bytes and more, bytes equal: {each['bytes_equal']}"
        )
        for name, rate in each["gbps"].items():
            print(f"  {name:<50}{rate:8.2f} GB/s")
        print(f"  {'ratio to the best plain stream':<50}{each['ratio']:8.2f}")


if __name__ == "__main__":
    main()
