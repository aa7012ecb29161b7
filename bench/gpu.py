"""The data path on GPUs against the limits measured in the same run: conversion, digests, pushes between processes, staged commit.

    python -m bench.gpu --out DIR                 one GPU: trainer and engines share it
    python -m bench.gpu --out DIR --two-gpus      engines on the second GPU: pushes alone, against a plain peer copy

Writes DIR/gpu.json (gpu2.json) and prints a table. Everything timed is the product's own code (conversion.kernels, digest_kernels,
slots, plan, writer, transport). Rates of conversion and copy count bytes read and written, rates of a push payload bytes. Medians.
Needs CUDA, Triton and NIXL. `--quick` checks that all of it runs, on few layers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from bench.about import about as about_host
from bench.about import save
from bench.gpu_case import UCX_TLS, Case, naive_fp8
from bench.gpu_push import pushes
from bench.shapes import EXPERT_SHAPES, LAYERS, MATRICES, Engine
from weightsync.conversion import fp8
from weightsync.conversion.cast_kernels import Cast, CastGroup
from weightsync.conversion.jobs import Job
from weightsync.conversion.kernels import Fp8Group
from weightsync.digest_kernels import DigestGroup, Range
from weightsync.layout.forms import GROUP_BYTES

RUNS = 15
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--two-gpus", action="store_true", help="engines on the second GPU")
    parser.add_argument("--quick", action="store_true", help="two layers instead of what memory holds")
    parser.add_argument("--case", default="", help="only fleets whose name holds these words")
    parser.add_argument("--group-bytes", type=int, default=GROUP_BYTES, help="what is converted at once")
    options = parser.parse_args()
    os.environ["UCX_TLS"] = UCX_TLS
    report: dict[str, Any] = {"about": about(), "limits": limits(peer=options.two_gpus)}
    if not options.two_gpus:
        report["conversion"] = [*conversions(report["limits"]["copy_gbps"]), *casts(report["limits"]["copy_gbps"])]
        report["digest"] = [*digests(report["limits"]["read_gbps"])]
    torch.cuda.empty_cache()
    report["push"] = []
    copy_gbps = report["limits"]["peer_copy_gbps" if options.two_gpus else "copy_payload_gbps"]
    for case in cases(two_gpus=options.two_gpus, quick=options.quick):
        if options.case not in case.what:
            continue
        print(f"== {case.what}", flush=True)
        report["push"] += pushes(case, copy_gbps=copy_gbps, group_bytes=options.group_bytes)
        torch.cuda.empty_cache()
        save("gpu2" if options.two_gpus else "gpu", report, options.out)
    show(report)


def cases(*, two_gpus: bool, quick: bool) -> list[Case]:
    """Fleets that fit the memory: on one GPU the trainer's arena, live parameters and staging share 80 GB."""
    device = 1 if two_gpus else 0
    staged, whole, split, plain = (2, 2, 2, 2) if quick else (20, LAYERS if two_gpus else 40, 24, 16)

    def ranks(layers: int, **how: Any) -> tuple[Engine, ...]:
        return tuple(Engine(layers=layers, tp=2, rank=rank, **how) for rank in range(2))

    return [
        Case(
            what=f"TP 1, FP8, {staged} layers, staged",
            engines=(Engine(layers=staged),),
            engine_device=device,
            staged=True,
        ),
        Case(what=f"TP 1, FP8, {whole} layers", engines=(Engine(layers=whole),), engine_device=device),
        Case(
            what=f"TP 1, bf16, {plain} layers", engines=(Engine(layers=plain, quantized=False),), engine_device=device
        ),
        Case(
            what=f"TP 1, bf16, {plain} layers, zero copy",
            engines=(Engine(layers=plain, quantized=False),),
            engine_device=device,
            zero_copy=True,
        ),
        Case(what=f"TP 2, FP8, {split} layers", engines=ranks(split), engine_device=device),
        Case(what=f"EP 2, FP8, {split} layers", engines=ranks(split, ep=True), engine_device=device),
        Case(
            what=f"two trainer ranks, TP 1, FP8, {split} layers",
            engines=(Engine(layers=split),),
            trainers=2,
            engine_device=device,
        ),
    ]


def about() -> Row:
    """What ran, where; on a machine without the repository's history WEIGHTSYNC_COMMIT says the commit."""
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    commit = os.environ.get("WEIGHTSYNC_COMMIT")
    return {**about_host(), **versions, **({} if commit is None else {"commit": commit})}


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


def limits(*, peer: bool) -> Row:
    """Plain copy and plain read of 2 GiB; with `peer`, a plain copy to the second GPU too."""
    source = torch.ones(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source))
    words = source.view(torch.float32)
    read = seconds(words.sum)
    found = {
        "copy_gbps": 2 * source.nbytes / copied / 1e9,
        "copy_payload_gbps": source.nbytes / copied / 1e9,
        "read_gbps": source.nbytes / read / 1e9,
    }
    if peer:
        there = torch.empty_like(source, device="cuda:1")
        found["peer_copy_gbps"] = source.nbytes / seconds(lambda: there.copy_(source)) / 1e9
    return found


def conversions(copy_gbps: float) -> Iterator[Row]:
    """FP8 128x128 of expert tensors, projections, a whole layer in one launch, odd shapes; bf16 and fp32 sources."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in {**EXPERT_SHAPES, "q": MATRICES["q"], "odd": (5, 1001, 2056)}.items():
            jobs = fp8_jobs(torch.randn(shape, device="cuda").to(dtype))
            yield conversion_row(f"{name} {list(shape)}", dtype, jobs, copy_gbps)
        shapes = [*EXPERT_SHAPES.values(), *MATRICES.values()]
        jobs = [job for shape in shapes for job in fp8_jobs(torch.randn(shape, device="cuda").to(dtype))]
        yield conversion_row("whole layer, one launch", dtype, jobs, copy_gbps)
        experts = torch.randn(EXPERT_SHAPES["w2"], device="cuda").to(dtype)
        jobs = [job for matrix in experts for job in cut_jobs(matrix, tp=8)]
        yield conversion_row("w2 in 8 column slices of 96, scales for 32", dtype, jobs, copy_gbps)


def conversion_row(what: str, dtype: torch.dtype, jobs: list[Job], copy_gbps: float) -> Row:
    group = Fp8Group(jobs)
    taken = seconds(group.convert)
    few = jobs[:: max(1, len(jobs) // 16)]
    naive = seconds(lambda: [naive_fp8(job.source) for job in few], runs=3) / sum(job.source.numel() for job in few)
    elements = sum(job.source.numel() for job in jobs)
    row = kernel_row(what, dtype, taken, group.bytes_moved, copy_gbps)
    return row | {"times_faster_than_torch": naive * elements / taken}


def kernel_row(what: str, dtype: torch.dtype, taken_s: float, moved_bytes: int, copy_gbps: float) -> Row:
    """One launch over sources of one dtype; bytes read and written."""
    rate = moved_bytes / taken_s / 1e9
    source = str(dtype).removeprefix("torch.")
    return {"what": what, "source": source, "seconds": taken_s, "gbps": rate, "share_of_copy": rate / copy_gbps}


def fp8_jobs(source: torch.Tensor) -> list[Job]:
    """One job a matrix of the last two dims."""
    matrices = source.view(-1, *source.shape[-2:])
    _, rows, columns = matrices.shape
    out = torch.empty(matrices.shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.empty(len(matrices), fp8.blocks_of(rows), fp8.blocks_of(columns), device="cuda")
    return [Job(source=m, out=o, scales=s) for m, o, s in zip(matrices, out, scales, strict=True)]


def cut_jobs(matrix: torch.Tensor, *, tp: int) -> list[Job]:
    """Column slices that end inside blocks, as engines of so many ranks keep them: each reads the whole blocks that it touches."""
    rows, share = matrix.shape[0], matrix.shape[1] // tp
    jobs = []
    for start in range(0, matrix.shape[1], share):
        first, last = start // fp8.BLOCK * fp8.BLOCK, -(-(start + share) // fp8.BLOCK) * fp8.BLOCK
        out = torch.empty(rows, share, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // 32), share // 32, device="cuda")
        written = range(start - first, start - first + share)
        jobs.append(Job(source=matrix[:, first:last], out=out, scales=scales, columns=written, block=(32, 32)))
    return jobs


def casts(copy_gbps: float) -> Iterator[Row]:
    """A whole layer that nothing quantizes, in one launch: bf16 as it is, and fp32 masters rounded to bf16."""
    for dtype in (torch.bfloat16, torch.float32):
        sources = [
            torch.randn(shape, device="cuda").to(dtype) for shape in (*EXPERT_SHAPES.values(), *MATRICES.values())
        ]
        jobs = [
            Cast(
                name=str(n),
                source=s.view(-1),
                out=torch.empty_like(s, dtype=torch.bfloat16).view(-1),
                through=torch.bfloat16,
            )
            for n, s in enumerate(sources)
        ]
        group = CastGroup(jobs)
        moved = sum(job.source.nbytes + job.out.nbytes for job in jobs)
        yield kernel_row("whole layer to bfloat16, one launch", dtype, seconds(group.convert), moved, copy_gbps)


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
        taken = group.bytes_read / rate / 1e9
        what = f"digest, {dtype.itemsize} byte(s) an element"
        yield {"what": what, "seconds": taken, "gbps": rate, "share_of_read": rate / read_gbps}


def show(report: dict[str, Any]) -> None:
    """One table."""
    for name, value in report["limits"].items():
        print(f"{name:<60}{value:10.0f}")
    shown = (
        "source",
        "times_faster_than_torch",
        "over_the_longest",
        "over_the_floor",
        "digests_equal",
        "bytes_equal",
        "peak_bytes",
    )
    for section in ("conversion", "digest", "push"):
        for row in report.get(section, []):
            share = row.get("share_of_copy", row.get("share_of_read", 0.0))
            more = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if k in shown}
            what = f"{row['fleet']}: {row['what']}" if "fleet" in row else row["what"]
            print(f"{what:<84}{row['gbps']:8.0f} GB/s {share:6.1%} {row['seconds'] * 1e3:9.2f} ms  {more or ''}")


if __name__ == "__main__":
    main()
