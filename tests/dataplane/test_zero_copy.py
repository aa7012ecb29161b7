"""Weights that nothing converts leave from where the model keeps them: each byte is found, checked, and left alone in time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.dataplane.push_makers import Bench
from tests.dataplane.slot_makers import TORCH, engine, fp8_engine, shard
from tests.dataplane.test_writer import Scripted, make_writer
from weightsync.errors import ConversionError, PlanError, TransportError
from weightsync.layout.forms import Group
from weightsync.layout.live import ARENA, LiveSpan, shares
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.meter import WritesMeter
from weightsync.plan import WRITE, make_plan
from weightsync.rendezvous.ledger import Ledger
from weightsync.slots import SlotArena
from weightsync.transport import TransferState
from weightsync.verify import digest_tensor
from weightsync.waiting import Deadline
from weightsync.wire import Decision
from weightsync.writer import _Peer

ITEMS = np.array([2, 4])


@st.composite
def arenas(draw: st.DrawFn) -> tuple[list[Group], list[int], list[LiveSpan], np.ndarray]:
    """Groups of slots, of which some are live; where the groups lie in the buffer; writes of 2 and of 4 bytes an element."""
    groups, live, at, slots = [], [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        start, first = at, slots
        for _ in range(draw(st.integers(1, 4))):
            length = 4 * draw(st.integers(1, 12))
            if draw(st.booleans()):
                live.append(LiveSpan(at, at + length))
            at, slots = at + length + 4 * draw(st.integers(0, 1)), slots + 1
        groups.append(Group(first, slots, start, at))
    starts = [4 * draw(st.integers(0, 50)) for _ in groups]
    writes = np.zeros(draw(st.integers(0, 8)), dtype=WRITE)
    for write in writes:
        group = draw(st.sampled_from(groups))
        low = 4 * draw(st.integers(group.start_bytes // 4, group.stop_bytes // 4 - 1))
        high = 4 * draw(st.integers(low // 4 + 1, group.stop_bytes // 4))
        index = draw(st.integers(0, 1))
        size = int(ITEMS[index])
        write["slot_offset"], write["target_index"] = low // size, index
        write["target_offset"], write["length"] = draw(st.integers(0, 100)), (high - low) // size
    return groups, starts, live, writes


def _bytes_of(writes: np.ndarray) -> Iterator[tuple[int, tuple[int, int]]]:
    """(byte here, (target, byte there)) of everything that is written."""
    for slot, index, offset, length in writes.tolist():
        size = int(ITEMS[index])
        yield from ((slot * size + i, (index, offset * size + i)) for i in range(length * size))


@given(arenas())
def test_every_byte_is_read_where_it_is(made: tuple[list[Group], list[int], list[LiveSpan], np.ndarray]) -> None:
    """Against a walk byte by byte: 1 the same bytes of the same targets; 2 each from the memory and place that has it."""
    groups, starts, live, writes = made

    def place(byte: int) -> tuple[int, int, int]:
        number = next(i for i, group in enumerate(groups) if byte < group.stop_bytes)
        for owner, span in enumerate(live):
            if span.start <= byte < span.stop:
                return number, owner, byte - span.start
        return number, ARENA, byte - groups[number].start_bytes + starts[number]

    shifts = [start - group.start_bytes for start, group in zip(starts, groups, strict=True)]
    wanted = sorted((place(byte), there) for byte, there in _bytes_of(writes))
    before = writes.copy()
    found = [
        ((number, share.owner, byte), there)
        for number, group in enumerate(shares(writes, ITEMS, groups, shifts, live))
        for share in group
        for byte, there in _bytes_of(share.writes)
    ]
    assert sorted(found) == wanted
    assert np.array_equal(writes, before), "a plan's writes are left as they are"


def deliver(arena: SlotArena, layout: TargetLayout) -> dict[str, torch.Tensor]:
    """What the writes of one rank leave in an engine, by target."""
    plan = make_plan(arena.layouts, arena.wants(layout.digest()))
    sizes = np.array([TORCH[target.dtype].itemsize for target in plan.targets])
    memory = {t.name: torch.zeros(t.numel * TORCH[t.dtype].itemsize, dtype=torch.uint8) for t in plan.targets}
    for group in arena.parts(plan.writes(0), sizes):
        for here, writes in group:
            for slot, index, offset, length in writes.tolist():
                size, target = int(sizes[index]), memory[plan.targets[index].name]
                target[offset * size : (offset + length) * size] = here[slot * size : (slot + length) * size]
    return memory


def _arena(weights: dict[str, torch.Tensor], layout: TargetLayout, *, zero_copy: bool, **fields: Any) -> SlotArena:
    (local,) = shard(weights, 1)
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto", zero_copy=zero_copy, **fields)
    assert arena.lay_out({layout.digest(): layout})
    arena.fill()
    return arena


@pytest.mark.parametrize("group_bytes", [1 << 10, 1 << 26], ids=["groups of one tensor", "one group"])
def test_what_is_converted_and_what_is_not_arrive_alike(group_bytes: int) -> None:
    """FP8 of bf16, fp32 of bf16, bf16 of fp32 masters are copied; bf16 of bf16 is not. The same bytes as with an arena for all."""
    weights = {"w": torch.randn(256, 128).bfloat16(), "norm": torch.randn(300).bfloat16()}
    weights |= {"bias": torch.randn(300).bfloat16(), "master": torch.randn(300)}
    layout = fp8_engine({"w": (256, 128)}, {"norm": "bfloat16", "bias": "float32", "master": "bfloat16"})
    copied = _arena(weights, layout, zero_copy=False, group_bytes=group_bytes)
    mixed = _arena(weights, layout, zero_copy=True, group_bytes=group_bytes)
    assert [memory.data_ptr() for memory in mixed.live_memory] == [weights["norm"].data_ptr()]
    assert (copied.live_memory, copied.whole, mixed.whole) == ([], True, False)
    want, got = deliver(copied, layout), deliver(mixed, layout)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert torch.equal(got["p.norm"], weights["norm"].view(torch.uint8))


def test_a_group_that_nothing_converts_takes_no_memory() -> None:
    weights = {f"w{i}": torch.randn(64, 64).bfloat16() for i in range(8)}
    layout = engine([SourceTensor(name, (64, 64), "bfloat16") for name in weights])
    arena = _arena(weights, layout, zero_copy=True, group_bytes=1 << 14)
    assert len(arena.groups) > 1
    assert arena.buffer.numel() == 1, "one byte, since no memory at all cannot be registered"
    assert all(
        torch.equal(deliver(arena, layout)[f"p.{n}"], w.reshape(-1).view(torch.uint8)) for n, w in weights.items()
    )


def test_a_budget_is_for_what_is_converted() -> None:
    weights = {f"w{i}": torch.randn(64, 64).bfloat16() for i in range(4)} | {"m": torch.randn(64, 64)}
    layout = engine([SourceTensor(name, (64, 64), "bfloat16") for name in weights])
    arena = _arena(weights, layout, zero_copy=True, group_bytes=1 << 13, budget_bytes=1 << 14)
    assert (arena.buffer.numel(), arena.ring.whole) == (64 * 64 * 2, True)


def test_column_slices_and_casts_take_memory_and_what_lies_beside_them_takes_none() -> None:
    """A bf16 engine of TP 2 takes half of each row of `down`, and `router` in fp32. Of one group of all, only these take room."""
    weights = {f"w{i}": torch.randn(64, 64).bfloat16() for i in range(8)}
    weights |= {
        "down": torch.randn(64, 128).bfloat16(),
        "router": torch.randn(300).bfloat16(),
        "a": torch.ones(300).bfloat16(),
    }
    plain = {"router": "float32"}
    sources = tuple(SourceTensor(n, tuple(w.shape), plain.get(n, "bfloat16")) for n, w in weights.items())
    engines = {layout.digest(): layout for layout in (_half_of(sources, rank) for rank in range(2))}
    (local,) = shard(weights, 1)
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto", zero_copy=True)
    assert arena.lay_out(engines)
    arena.fill()
    assert len(arena.groups) == 1
    assert arena.buffer.numel() < 64 * 128 * 2 + 300 * 4 + 1024, "the slices, the cast, and what alignment adds"
    for rank, layout in enumerate(engines.values()):
        found = deliver(arena, layout)
        wanted = {n: w.float() if n in plain else w for n, w in weights.items()} | {
            "down": weights["down"][:, 64 * rank : 64 * (rank + 1)].contiguous()
        }
        assert all(torch.equal(found[f"p.{n}"], w.reshape(-1).view(torch.uint8)) for n, w in wanted.items())


def _half_of(sources: tuple[SourceTensor, ...], rank: int) -> TargetLayout:
    """An engine rank that takes half of the columns of `down`, and all else as it is."""
    whole = engine(list(sources))
    targets = tuple(Target(t.name, (64, 64), t.dtype) if t.name == "p.down" else t for t in whole.targets)
    half = Copy("down", 64 * rank, (128, 1), "p.down", 0, (64, 1), (64, 64))
    copies = tuple(half if copy.source == "down" else copy for copy in whole.copies)
    return TargetLayout(targets=targets, sources=whole.sources, copies=copies)


def test_a_budget_that_another_rank_would_pass_if_it_copied_is_no_matter() -> None:
    """Ranks of DDP hold everything whole, which each of them reads in place."""
    weights = {"embed": torch.randn(256, 256).bfloat16()}
    locals_ = [shard(weights, 1)[0] for _ in range(2)]
    arena = SlotArena(
        rank=0,
        local=locals_[0],
        layouts=[local.layout(rank) for rank, local in enumerate(locals_)],
        format_="auto",
        zero_copy=True,
        budget_bytes=1 << 12,
    )
    layout = engine([SourceTensor("embed", (256, 256), "bfloat16")])
    assert arena.lay_out({layout.digest(): layout})
    assert arena.buffer.numel() == 1


def test_parameters_in_one_flat_buffer_at_an_odd_place_are_read_and_measured() -> None:
    """FSDP1 and optimizers keep views into one buffer; fp32 targets beside them must not make fp32 views of it."""
    flat = torch.randn(1 + 64 * 64 + 300).bfloat16()
    weights = {"odd": flat[1 : 1 + 64 * 64].view(64, 64), "bias": flat[1 + 64 * 64 :]}
    layout = engine([SourceTensor("odd", (64, 64), "bfloat16"), SourceTensor("bias", (300,), "float32")])
    arena = _arena(weights, layout, zero_copy=True)
    (memory,) = arena.live_memory
    assert memory.nbytes == flat.nbytes
    assert torch.equal(deliver(arena, layout)["p.odd"], weights["odd"].reshape(-1).view(torch.uint8))
    plan = make_plan(arena.layouts, arena.wants(layout.digest()))
    sizes = np.array([TORCH[target.dtype].itemsize for target in plan.targets])
    meters = [WritesMeter(group, plan.targets) for group in arena.parts(plan.writes(0), sizes)]
    for meter in meters:
        meter.launch()
    names = {target.name: index for index, target in enumerate(plan.targets)}
    assert WritesMeter.read(meters)[names["p.odd"]] == digest_tensor("p.odd", weights["odd"])


def test_a_parameter_that_is_not_contiguous_any_more_is_copied() -> None:
    """`reshape` would give a copy, which would be sent for ever."""
    weights = {"w": torch.randn(64, 64).bfloat16()}
    (local,) = shard(weights, 1)
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto", zero_copy=True)
    layout = engine([SourceTensor("w", (64, 64), "bfloat16")])
    assert arena.lay_out({layout.digest(): layout})
    local.pieces[0].parameter.data = local.pieces[0].parameter.data.t()
    assert arena.lay_out({layout.digest(): layout}), "it has moved"
    assert arena.live_memory == []


def test_memory_that_the_transport_does_not_take_is_copied(
    monkeypatch: pytest.MonkeyPatch, open_ledger: Callable[..., Ledger]
) -> None:
    """Too little memlock, too many regions: 1 the push goes on with copies; 2 the next one asks no more."""
    bench = Bench(open_ledger, commit="inPlace")
    trainer = bench.trainer(zero_copy=True)
    register, asked = trainer.agent.register, []

    def refuse_models(tensors: Any) -> int:
        asked.append(len(tensors))
        if tensors[0] is not trainer.slots.buffer:
            raise TransportError("memlock")
        return register(tensors)

    monkeypatch.setattr(trainer.agent, "register", refuse_models)
    for version in (1, 2):
        _push(bench, trainer, version)
        assert bench.holds(version)
    assert (trainer.slots.live_memory, trainer.writer.keeps_versions, len(asked)) == ([], False, 2)
    bench.close()


@pytest.fixture(params=["inPlace", "staged"])
def bench(request: pytest.FixtureRequest, open_ledger: Callable[..., Ledger]) -> Iterator[Bench]:
    staging = {"staging": "device"} if request.param == "staged" else {}
    made = Bench(open_ledger, commit=request.param, **staging)
    yield made
    made.close()


@pytest.mark.failure_mode(48)
def test_versions_leave_from_the_models_own_memory_byte_for_byte(bench: Bench) -> None:
    """1. nothing is in the arena; 2. each of three versions is held, by its digests; 3. when the push has settled the model may
    change: nothing of the engine follows; 4. the arena keeps no version for late engines.
    """
    trainer = bench.trainer(zero_copy=True)
    for version in (1, 2, 3):
        _push(bench, trainer, version)
        trainer.writer.settle()
        assert bench.holds(version)
        assert trainer.slots.buffer.numel() == 1
        before = {name: digest_tensor(name, tensor) for name, tensor in bench.params.items()}
        trainer._change(version + 10)
        assert before == {name: digest_tensor(name, tensor) for name, tensor in bench.params.items()}
    assert not trainer.writer.keeps_versions
    with pytest.raises(PlanError, match="hold no whole version"):
        bench.begin(trainer, catch_up=True)


def _push(bench: Bench, trainer: Any, version: int) -> None:
    record = bench.begin(trainer)
    bench.receiver.open(record)
    if bench.contract.transfer.commit == "staged":
        trainer.convert_and_write(record, version)
    else:
        trainer.fill(version)
        trainer.writer.measure(record)
        trainer.write(record)
    bench.voted(record)
    assert bench.ledger.decide(record.push_id, Decision.COMMIT).decision is Decision.COMMIT
    bench.receiver.commit(record.push_id)


def test_a_model_that_has_moved_is_registered_anew(bench: Bench) -> None:
    """FSDP gives parameters other memory, such as after a change of dtype or device."""
    trainer = bench.trainer(zero_copy=True)
    _push(bench, trainer, 1)
    for piece in trainer._local.pieces:
        piece.parameter.data = piece.parameter.data.clone()
    _push(bench, trainer, 2)
    assert bench.holds(2)


@pytest.mark.failure_mode(13)
def test_an_infinity_is_named_before_anything_leaves_in_place() -> None:
    weights = {"w": torch.ones(64, 64).bfloat16(), "v": torch.ones(8, 8).bfloat16()}
    weights["w"][3, 5] = float("inf")
    layout = engine([SourceTensor("w", (64, 64), "bfloat16"), SourceTensor("v", (8, 8), "bfloat16")])
    with pytest.raises(ConversionError, match=r"w: 1 of 4096 elements are not finite, first element 197"):
        _arena(weights, layout, zero_copy=True)


def _writer_that_lost(polls: int, deadline_s: float) -> tuple[Any, Scripted]:
    writer, _ = make_writer()
    transfer = Scripted("lost", polls, TransferState.DONE)
    writer._stuck.append((_Peer("lost", "layout", (transfer,)), Deadline(deadline_s)))  # type: ignore[arg-type]
    return writer, transfer


def test_a_push_returns_only_when_nothing_reads_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer was lost with bytes on their way: 1 they are waited for; 2 not where the arena has a copy."""
    for live, waited in (([torch.zeros(1)], True), ([], False)):
        writer, transfer = _writer_that_lost(20, 30.0)
        monkeypatch.setattr(writer._slots, "live_memory", live, raising=False)
        monkeypatch.setattr(writer, "_release", lambda peer: None)
        writer.settle()
        assert transfer.ended is waited


def test_bytes_that_do_not_end_end_this_process_and_the_model_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _ = _writer_that_lost(10**9, -10.0)
    monkeypatch.setattr(writer._slots, "live_memory", [torch.zeros(1)], raising=False)
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        writer.settle()
    assert codes == [70]


def test_targets_that_two_tensors_fill_are_written_from_both() -> None:
    """gate and up are neighbours in the arena and in the engine: one write to plan, two in the model's memory."""
    weights = {"gate": torch.randn(64, 64).bfloat16(), "up": torch.randn(64, 64).bfloat16()}
    plain = engine([SourceTensor(name, (64, 64), "bfloat16") for name in weights])
    n = 64 * 64
    copies = tuple(
        type(copy)(copy.source, 0, (1,), "p.gate_up", at, (1,), (n,))
        for at, copy in zip((0, n), plain.copies, strict=True)
    )
    layout = TargetLayout(targets=(Target("p.gate_up", (128, 64), "bfloat16"),), sources=plain.sources, copies=copies)
    arena = _arena(weights, layout, zero_copy=True)
    assert len(make_plan(arena.layouts, arena.wants(layout.digest())).writes(0)) == 1
    both = torch.cat([weights["gate"], weights["up"]]).reshape(-1).view(torch.uint8)
    assert torch.equal(deliver(arena, layout)["p.gate_up"], both)
