"""The data path on one GPU against the limits measured in the same run: conversion, digest, push between two processes.

    python -m bench.gpu --out DIR [--layers N]        writes DIR/gpu.json and prints a table

Everything timed is the product's own code (conversion.kernels, digest_kernels, transport). Rates
of conversion and copy count bytes read and written, rates of a push payload bytes. Medians of RUNS. Needs CUDA, Triton and NIXL.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import triton

from bench.shapes import EXPERT_SHAPES, MATRICES, PLAIN
from weightsync.conversion import fp8
from weightsync.conversion.device import Cast, DeviceConversion
from weightsync.conversion.kernels import Fp8Group, Job
from weightsync.digest_kernels import DigestGroup, Range
from weightsync.transport import Agent, Region, Transfer

RUNS = 15
UCX_TLS = "cuda_ipc,cuda_copy,sm,tcp,self"
NAIVE_WINDOW = 100
"""Handles that the naive way keeps in flight before it drains them."""
TIMEOUT_S = 60.0
Row = dict[str, Any]
Names = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8, help="layers of Qwen3-30B-A3B that the push carries")
    options = parser.parse_args()
    os.environ["UCX_TLS"] = UCX_TLS
    report: dict[str, Any] = {"about": about(), "limits": limits()}
    report["conversion"] = [*conversions(report["limits"]["copy_gbps"])]
    report["digest"] = [*digests(report["limits"]["read_gbps"])]
    report["push"] = push(options.layers, report["limits"]["copy_payload_gbps"])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def about() -> Row:
    """What ran, where."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("WEIGHTSYNC_COMMIT", commit),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def seconds(run: Callable[[], object], runs: int = RUNS) -> float:
    """Median time on the device; the L2 cache is rewritten before each run, so that nothing is found there."""
    evict = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    run()
    times = []
    for _ in range(runs):
        evict.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[runs // 2]


def limits() -> Row:
    """Plain copy and plain read of 2 GiB."""
    source = torch.ones(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source))
    words = source.view(torch.float32)
    read = seconds(words.sum)
    return {
        "copy_gbps": 2 * source.nbytes / copied / 1e9,
        "copy_payload_gbps": source.nbytes / copied / 1e9,
        "read_gbps": source.nbytes / read / 1e9,
    }


def conversions(copy_gbps: float) -> Iterator[Row]:
    """FP8 128x128 of expert tensors, projections, a whole layer in one launch, odd shapes; bf16 and fp32 sources."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in {**EXPERT_SHAPES, "q": MATRICES["q"], "odd": (5, 1001, 2056)}.items():
            jobs = fp8_jobs(torch.randn(shape, device="cuda").to(dtype))
            yield conversion_row(f"{name} {list(shape)}", dtype, jobs, copy_gbps)
        shapes = [*EXPERT_SHAPES.values(), *MATRICES.values()]
        jobs = [job for shape in shapes for job in fp8_jobs(torch.randn(shape, device="cuda").to(dtype))]
        yield conversion_row("whole layer, one launch", dtype, jobs, copy_gbps)


def conversion_row(what: str, dtype: torch.dtype, jobs: list[Job], copy_gbps: float) -> Row:
    group = Fp8Group(jobs)
    taken = seconds(group.convert)
    few = jobs[:: max(1, len(jobs) // 16)]
    naive = seconds(lambda: [naive_fp8(job.source) for job in few], runs=3) / sum(job.source.numel() for job in few)
    rate = group.bytes_moved / taken / 1e9
    elements = sum(job.source.numel() for job in jobs)
    return {
        "what": what,
        "source": str(dtype).removeprefix("torch."),
        "seconds": taken,
        "gbps": rate,
        "share_of_copy": rate / copy_gbps,
        "times_faster_than_torch": naive * elements / taken,
    }


def naive_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As one writes it with torch: the reference, tensor by tensor."""
    scales = fp8.scales_of(fp8.block_amax(rows))
    return fp8.quantize(rows, scales), scales


def fp8_jobs(source: torch.Tensor) -> list[Job]:
    """One job a matrix of the last two dims."""
    matrices = source.view(-1, *source.shape[-2:])
    _, rows, columns = matrices.shape
    out = torch.empty(matrices.shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.empty(len(matrices), fp8.blocks_of(rows), fp8.blocks_of(columns), device="cuda")
    return [Job(source=m, out=o, scales=s) for m, o, s in zip(matrices, out, scales, strict=True)]


def digests(read_gbps: float) -> Iterator[Row]:
    """The receiver's digest of a layer's experts, as FP8 and as bf16."""
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        ranges = []
        for name, shape in EXPERT_SHAPES.items():
            memory = torch.randint(
                0, 256, (torch.Size(shape).numel() * dtype.itemsize,), device="cuda", dtype=torch.uint8
            )
            ranges.append(Range(name=name, start=0, flat=memory.view(dtype)))
        group = DigestGroup(ranges)
        rate = group.bytes_read / seconds(group.digest) / 1e9
        yield {"what": f"digest, {dtype.itemsize} byte(s) an element", "gbps": rate, "share_of_read": rate / read_gbps}


def layer(seed: int) -> Names:
    """A layer's weights in bf16, the same in every process."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shapes = {**EXPERT_SHAPES, **MATRICES, **{name: (n,) for name, n in PLAIN.items()}}
    return {
        name: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }


def engine_tensors(layers: int) -> dict[str, tuple[int, torch.dtype]]:
    """(elements, dtype) of what an engine stores, by name."""
    tensors: dict[str, tuple[int, torch.dtype]] = {}
    for i in range(layers):
        for name, shape in {**EXPERT_SHAPES, **MATRICES}.items():
            size = torch.Size(shape)
            tensors[f"{i}.{name}"] = (size.numel(), torch.float8_e4m3fn)
            blocks = size[:-2].numel() * fp8.blocks_of(size[-2]) * fp8.blocks_of(size[-1])
            tensors[f"{i}.{name}_scale_inv"] = (blocks, torch.float32)
        tensors |= {f"{i}.{name}": (n, torch.bfloat16) for name, n in PLAIN.items()}
    return tensors


class Store:
    """Named tensors in one buffer, as an arena or as an engine's parameters."""

    def __init__(self, layers: int) -> None:
        self.tensors: Names = {}
        places, used = {}, 0
        for name, (numel, dtype) in engine_tensors(layers).items():
            places[name] = (used, numel * dtype.itemsize, dtype)
            used += -(-numel * dtype.itemsize // 256) * 256
        self.buffer = torch.zeros(used, dtype=torch.uint8, device="cuda")
        for name, (start, length, dtype) in places.items():
            self.tensors[name] = self.buffer[start : start + length].view(dtype)
        self.payload_bytes = sum(length for _, length, _ in places.values())

    def conversion(self, sources: dict[int, Names]) -> DeviceConversion:
        """All layers' conversion into this store."""
        blocks, casts = [], []
        for i, weights in sources.items():
            for name, weight in weights.items():
                out = self.tensors[f"{i}.{name}"]
                if name in PLAIN:
                    casts.append(Cast(name=name, source=weight, out=out, through=torch.bfloat16))
                    continue
                matrices = weight.view(-1, *weight.shape[-2:])
                scales = self.tensors[f"{i}.{name}_scale_inv"].view(len(matrices), fp8.blocks_of(matrices.shape[1]), -1)
                for m, o, s in zip(matrices, out.view(matrices.shape), scales, strict=True):
                    blocks.append((name, Job(source=m, out=o, scales=s)))
        return DeviceConversion(blocks, casts, ue8m0=False)

    def digests(self) -> dict[str, int]:
        """By tensor, on the device."""
        found: dict[str, int] = {}
        for size in (1, 2, 4):
            ranges = [Range(name=n, start=0, flat=t) for n, t in self.tensors.items() if t.element_size() == size]
            if ranges:
                sums = DigestGroup(ranges).digest().tolist()
                found |= {item.name: value for item, value in zip(ranges, sums, strict=True)}
        return found


def push(layers: int, copy_payload_gbps: float) -> list[Row]:
    """Convert and write `layers` layers into another process's memory; bytes checked there by digest and by comparing."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=receive, args=(theirs, layers), daemon=True)
    receiver.start()
    store = Store(layers)
    sources = {i: layer(i) for i in range(layers)}
    conversion = store.conversion(sources)
    with Agent("trainer") as agent:
        agent.register([store.buffer])
        peer = agent.connect(hear(ours))
        remote = hear(ours)
        conversion_s = wall(conversion.run)
        regions = [
            (Region(address=t.data_ptr(), length_bytes=t.nbytes), Region(address=remote[name], length_bytes=t.nbytes))
            for name, t in store.tensors.items()
        ]
        transfer = agent.prepare(peer, [local for local, _ in regions], [there for _, there in regions])
        wire_s = wall(lambda: send([transfer]))
        rows = [
            push_row("wire, one prepared transfer", store.payload_bytes, wire_s, copy_payload_gbps),
            push_row("conversion of the same, all launches", store.payload_bytes, conversion_s, copy_payload_gbps),
            push_row("convert all, then wire", store.payload_bytes, conversion_s + wire_s, copy_payload_gbps),
        ]
        ours.send("check")
        rows[0] |= hear(ours) | {"digests_equal": None}
        rows[0]["digests_equal"] = rows[0].pop("digests") == store.digests()
        transfer.release()
        rows.append(naive_push(agent, peer, regions, sources, store, copy_payload_gbps))
        ours.send("end")
    receiver.join(TIMEOUT_S)
    return rows


def naive_push(
    agent: Agent, peer: str, regions: list[tuple[Region, Region]], sources: dict[int, Names], store: Store, limit: float
) -> Row:
    """Convert tensor by tensor with torch, then one handle a write of at most 1 MiB, drained by 100."""
    started = time.perf_counter()
    for weights in sources.values():
        for name, weight in weights.items():
            if name not in PLAIN:
                for matrix in weight.view(-1, *weight.shape[-2:]):
                    naive_fp8(matrix)
    torch.cuda.synchronize()
    converted = time.perf_counter()
    window: list[Transfer] = []
    for local, there in regions:
        for offset in range(0, local.length_bytes, 1 << 20):
            length = min(1 << 20, local.length_bytes - offset)
            part = Region(address=local.address + offset, length_bytes=length)
            window.append(agent.prepare(peer, [part], [Region(address=there.address + offset, length_bytes=length)]))
            window[-1].post()
            if len(window) == NAIVE_WINDOW:
                drain(window)
    drain(window)
    ended = time.perf_counter()
    row = push_row("the naive way: convert all, one handle a MiB", store.payload_bytes, ended - started, limit)
    return row | {"convert_seconds": converted - started}


def drain(window: list[Transfer]) -> None:
    for transfer in window:
        while transfer.in_flight:
            pass
        transfer.release()
    window.clear()


def send(transfers: list[Transfer]) -> None:
    for transfer in transfers:
        transfer.post()
    deadline = time.monotonic() + TIMEOUT_S
    while any(transfer.in_flight for transfer in transfers):
        if time.monotonic() > deadline:
            raise TimeoutError(f"transfers in flight after {TIMEOUT_S:.0f} s")
    for transfer in transfers:
        if transfer.failure:
            raise RuntimeError(transfer.failure)


def wall(run: Callable[[], object]) -> float:
    """Median wall time, the device idle before and after."""
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[RUNS // 2]


def push_row(what: str, payload: int, taken: float, limit: float) -> Row:
    rate = payload / taken / 1e9
    return {"what": what, "bytes": payload, "seconds": taken, "gbps": rate, "share_of_copy": rate / limit}


def receive(pipe: Any, layers: int) -> None:
    """The other process: offers an engine's memory, then says what it found there."""
    store = Store(layers)
    with Agent("engine") as agent:
        agent.register([store.buffer])
        pipe.send(agent.metadata())
        pipe.send({name: tensor.data_ptr() for name, tensor in store.tensors.items()})
        while True:
            while not pipe.poll(0.0005):
                agent.notifications()  # makes progress, as a receiver with an open push does
            if hear(pipe) == "end":
                return
            torch.cuda.synchronize()
            pipe.send({"digests": store.digests(), "bytes_equal": equal_to_own_conversion(store, layers)})


def equal_to_own_conversion(store: Store, layers: int) -> bool:
    """Whether memory holds, byte for byte, what the torch reference makes of the same weights here."""
    for i in range(layers):
        for name, weight in layer(i).items():
            if name in PLAIN:
                same = torch.equal(store.tensors[f"{i}.{name}"].view(torch.int16), weight.view(-1).view(torch.int16))
            else:
                same = equal_matrices(store, f"{i}.{name}", weight)
            if not same:
                return False
    return True


def equal_matrices(store: Store, name: str, weight: torch.Tensor) -> bool:
    matrices = weight.view(-1, *weight.shape[-2:])
    found = store.tensors[name].view(torch.uint8).view(matrices.shape)
    scales = store.tensors[f"{name}_scale_inv"].view(len(matrices), -1)
    for m, f, s in zip(matrices, found, scales, strict=True):
        want, want_scales = naive_fp8(m)
        if not (torch.equal(f, want.view(torch.uint8)) and torch.equal(s, want_scales.view(-1))):
            return False
    return True


def hear(pipe: Any) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"the other process said nothing for {TIMEOUT_S:.0f} s")
    return pipe.recv()


def show(report: dict[str, Any]) -> None:
    """One table."""
    for name, value in report["limits"].items():
        print(f"{name:<60}{value:10.0f}")
    for section in ("conversion", "digest", "push"):
        for row in report[section]:
            share = row.get("share_of_copy", row.get("share_of_read", 0.0))
            more = {
                k: v
                for k, v in row.items()
                if k in ("source", "times_faster_than_torch", "digests_equal", "bytes_equal")
            }
            print(f"{row['what']:<60}{row['gbps']:10.0f} GB/s {share:6.1%}  {more}")


if __name__ == "__main__":
    main()
