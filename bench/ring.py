"""What a trainer rank's arena takes in memory, and a push in time, as its budget shrinks: whole, and as a ring.

    python -m bench.ring [--turns N] [--out DIR]        writes DIR/ring.json and prints a table

Two processes of this machine over tcp, `SlotArena` and `Writer` as a trainer rank has them: fp32 masters are rounded to bf16
group by group, each on the wire while the next one is converted. Every budget has a trainer process of its own, whose peak (VmHWM)
is told beyond what it had before its arena was laid out; they take turns. What arrived is digested against an arena that is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp

from bench.about import RESULTS, about, peak_bytes, save
from bench.push import TIMEOUT_S, hear, receive
from weightsync import verify
from weightsync.benchmark.wire import bench_record
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.layout.shards import LocalPiece, LocalSources
from weightsync.plan import make_plan
from weightsync.rendezvous.incarnation import replica_incarnation
from weightsync.rendezvous.records import PushRecord
from weightsync.slots import SlotArena
from weightsync.transport import Agent
from weightsync.waiting import Deadline
from weightsync.writer import Writer

TENSORS, ROWS, COLUMNS = 64, 1024, 2048
WHOLE_BYTES = TENSORS * ROWS * COLUMNS * 2
PARTS = (1, 2, 4, 8)
"""The budget is the whole, or one of so many parts of it."""
PUSHES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--turns", type=int, default=3, help="of each budget")
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget is not None:
        print(json.dumps(measure(options.budget)))
        return
    told: dict[int, list[dict[str, Any]]] = {WHOLE_BYTES // part: [] for part in PARTS}
    for _ in range(options.turns):
        for budget, turns in told.items():
            turns.append(turn(budget))
    budgets = [{"budget_bytes": budget, **median_turn(turns)} for budget, turns in told.items()]
    save("ring", {"about": about(), "converted_bytes": WHOLE_BYTES, "budgets": budgets}, options.out)
    show(budgets)


def turn(budget: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.ring", "--budget", str(budget)]
    environment = {**os.environ, "UCX_TLS": "tcp,self", "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return json.loads(told.splitlines()[-1])


def median_turn(turns: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(turns, key=lambda one: one["median_seconds"])[len(turns) // 2]


def layout_of(names: list[str]) -> TargetLayout:
    shape, numel = (ROWS, COLUMNS), ROWS * COLUMNS
    return TargetLayout(
        targets=tuple(Target(name, shape, "bfloat16") for name in names),
        sources=tuple(SourceTensor(name, shape, "bfloat16") for name in names),
        copies=tuple(Copy(name, 0, (1,), name, 0, (1,), (numel,)) for name in names),
    )


def measure(budget: int) -> dict[str, Any]:
    """Pushes from this process into a child."""
    names = [f"layer.{number:02}.weight" for number in range(TENSORS)]
    layout = layout_of(names)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    pause_s = context.Value("d", 0.0005)  # kept: its semaphore goes with it, before the child has begun
    process = context.Process(target=receive, args=(theirs, layout.to_bytes(), pause_s), daemon=True)
    process.start()
    descriptor, _ = hear(ours)
    generator = torch.Generator().manual_seed(7)
    numel = ROWS * COLUMNS
    weights = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in names}
    pieces = tuple(LocalPiece(name, 0, numel, i * numel, weights[name], 0) for i, name in enumerate(names))
    local = LocalSources(tuple(SourceTensor(name, (ROWS, COLUMNS), "bfloat16") for name in names), pieces)
    before = peak_bytes()
    with Agent("trainer") as agent:
        slots = arena_of(local, budget)
        directory: Any = SimpleNamespace(fetch=lambda *_, **__: descriptor)
        writer = Writer(rank=0, agent=agent, slots=slots, rendezvous=directory)
        members = {descriptor.replica: replica_incarnation([descriptor.incarnation])}
        record = bench_record("1.1.1", writer.learn(members, Deadline(TIMEOUT_S), catch_up=False), members)
        seconds = [push(writer, record) for _ in range(PUSHES)]
        peak = peak_bytes() - before
        writer.close()
    check = arena_of(local, None)
    check.lay_out({layout.digest(): layout})
    check.fill()
    plan = make_plan(check.layouts, check.wants(layout.digest()))
    writes = plan.writes(0)
    ours.send(writes.copy())
    same = hear(ours) == verify.digest_writes(check.buffer, writes, plan.targets)
    assert same, f"with a budget of {budget} bytes other bytes arrived than are in a whole arena"
    process.join(TIMEOUT_S)
    return {
        "peak_bytes": peak,
        "arena_bytes": slots.buffer.numel(),
        "groups": len(slots.groups),
        "median_seconds": sorted(seconds)[len(seconds) // 2],
        "bytes_equal": same,
    }


def arena_of(local: LocalSources, budget: int | None) -> SlotArena:
    return SlotArena(
        rank=0,
        local=local,
        layouts=[local.layout(0)],
        format_="auto",
        budget_bytes=budget,
    )


def push(writer: Writer, record: PushRecord) -> float:
    began = time.perf_counter()
    writer.begin()
    written = writer.convert_and_write(record, record.members.keys(), Deadline(TIMEOUT_S), frozenset)
    assert not written.failed, written.failed
    return time.perf_counter() - began


def show(budgets: list[dict[str, Any]]) -> None:
    print(f"{WHOLE_BYTES >> 20} MiB of converted weights")
    for each in budgets:
        memory = f"budget {each['budget_bytes'] >> 20:4} MiB, peak {each['peak_bytes'] / 2**20:4.0f} MiB more"
        told = f"{each['groups']:2} groups; push {each['median_seconds'] * 1e3:5.0f} ms"
        print(f"  {memory}; {told}; bytes equal: {each['bytes_equal']}")


if __name__ == "__main__":
    main()
