"""The plan gives every element of every target to exactly one holder, or does not exist."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import numpy as np
import pytest

from tests.dataplane.toy_models import Toy, chunked, execute, flat_bits, replicated
from weightsync.errors import CoverageError, PlanError
from weightsync.layout.records import Copy, Holding, SourceLayout, SourceTensor, Target, TargetLayout
from weightsync.plan import REGION_BYTES, make_plan


def attention(tp: int = 2, rank: int = 1) -> Toy:
    """qkv fused by rows, o sliced by columns, a norm, an embedding with padded rows."""
    toy = Toy()
    rows, hidden, vocab = 6, 8, 10
    toy.param("qkv", 3 * rows // tp, hidden)
    for i, name in enumerate("qkv"):
        part = rows // tp
        toy.source(name, rows, hidden)
        toy.copy(
            name,
            "qkv",
            lambda p, at=i * part, n=part: p.narrow(0, at, n),
            lambda t, n=part: t.narrow(0, rank * n, n),
        )
    toy.source("o", hidden, rows)
    toy.copy("o", toy.param("o", hidden, rows // tp), lambda p: p, lambda t: t.chunk(tp, dim=1)[rank])
    toy.source("norm", hidden)
    toy.copy("norm", toy.param("norm", hidden), lambda p: p)
    toy.source("embed", vocab, hidden)
    toy.copy("embed", toy.param("embed", vocab + 6, hidden), lambda p: p[:vocab])
    toy.pads.append(("embed", vocab))
    return toy


def experts(n_experts: int = 6, local: range = range(6)) -> Toy:
    """Experts stacked as [E_local, 2I, H] and [E_local, H, I], of which this engine rank wants `local`."""
    toy, inner, hidden = Toy(), 4, 6
    toy.param("w13", len(local), 2 * inner, hidden)
    toy.param("w2", len(local), hidden, inner)
    for e in range(n_experts):
        for i, kind in enumerate(("gate", "up")):
            toy.source(f"experts.{e}.{kind}", inner, hidden)
            if e in local:
                toy.copy(
                    f"experts.{e}.{kind}", "w13", lambda p, e=e, i=i: p[local.index(e), i * inner : (i + 1) * inner]
                )
        toy.source(f"experts.{e}.down", hidden, inner)
        if e in local:
            toy.copy(f"experts.{e}.down", "w2", lambda p, e=e: p[local.index(e)])
    return toy


def assert_same_as_loader(toy: Toy, layouts: list[SourceLayout], region_bytes: int = REGION_BYTES) -> None:
    weights = toy.weights()
    plan = make_plan(layouts, toy.layout(), region_bytes=region_bytes)
    truth, pushed = toy.fresh(), toy.fresh()
    truth.load(weights.items())
    for param, first_row in toy.pads:
        pushed.params[param][first_row:] = 0
    execute(plan, layouts, weights, pushed.params)
    for name in toy.params:
        np.testing.assert_array_equal(flat_bits(pushed.params[name]), flat_bits(truth.params[name]), err_msg=name)


@pytest.mark.failure_mode(6)
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize("make", [attention, experts])
def test_uneven_shards_and_ranks_without_rows_give_what_the_loader_gives(make, n_ranks) -> None:
    toy = make()
    layouts = chunked(toy.source_tensors(), n_ranks)
    if n_ranks == 11:
        assert not layouts[-1].holdings, "no tensor has eleven rows: the last rank must hold nothing"
    assert_same_as_loader(toy, layouts)


def test_an_expert_parallel_engine_gets_its_experts_and_no_other() -> None:
    toy = experts(local=range(2, 4))
    layouts = chunked(toy.source_tensors(), 2)
    plan = make_plan(layouts, toy.layout())
    assert plan.total_bytes == 2 * sum(p.numel() for p in toy.params.values())
    assert_same_as_loader(toy, layouts)


@pytest.mark.failure_mode(1)
def test_every_rank_makes_the_same_plan_whatever_order_it_hears_things_in() -> None:
    toy = attention()
    target, layouts = toy.layout(), replicated(toy.source_tensors(), 3)
    plan = make_plan(layouts, target)
    shuffle = random.Random(7)
    for _ in range(20):
        other = make_plan(
            [
                dataclasses.replace(one, holdings=_shuffled(shuffle, one.holdings))
                for one in _shuffled(shuffle, layouts)
            ],
            dataclasses.replace(
                target,
                targets=_shuffled(shuffle, target.targets),
                copies=_shuffled(shuffle, target.copies),
                sources=_shuffled(shuffle, target.sources),
            ),
        )
        assert other.digest == plan.digest
        assert other.targets == plan.targets
        for rank in range(3):
            np.testing.assert_array_equal(other.writes(rank), plan.writes(rank))


def _shuffled(shuffle: random.Random, items: tuple | list) -> tuple:
    return tuple(shuffle.sample(list(items), len(items)))


@pytest.mark.failure_mode(2)
def test_an_engine_whose_experts_no_rank_publishes_is_refused_by_name() -> None:
    """What the field called covered: the engine wants all experts, the ranks publish none of them."""
    toy = experts()
    layouts = chunked([t for t in toy.source_tensors() if "experts" not in t.name or "down" in t.name], 2)
    with pytest.raises(
        CoverageError, match=r"w13: 288 elements come from \[0, 24\) of experts.0.gate and 11 more ranges"
    ):
        make_plan(layouts, toy.layout())


@pytest.mark.failure_mode(5)
def test_a_tied_parameter_is_written_once_and_padded_rows_by_nobody() -> None:
    toy = attention()
    tied = dataclasses.replace(toy, params={**toy.params, "lm_head": toy.params["embed"]})
    layout = tied.layout()
    assert [t.name for t in layout.targets] == ["embed", "norm", "o", "qkv"]
    plan = make_plan(chunked(tied.source_tensors(), 2), layout)
    writes = np.concatenate([plan.writes(rank) for rank in range(2)])
    embed = writes[writes["target_index"] == [target.name for target in plan.targets].index("embed")]
    assert embed["length"].sum() == 10 * 8
    assert (embed["target_offset"] + embed["length"]).max() == 10 * 8


@pytest.mark.failure_mode(7)
@pytest.mark.parametrize("lost", ["q", "norm", "embed"])
def test_a_source_that_a_rank_does_not_hold_after_all_is_an_error_with_its_range(lost) -> None:
    toy = attention()
    layouts = chunked(toy.source_tensors(), 2)
    layouts[1] = dataclasses.replace(layouts[1], holdings=tuple(h for h in layouts[1].holdings if h.name != lost))
    with pytest.raises(CoverageError, match=rf"of {lost}, which no rank holds \(2 trainer ranks\): publish"):
        make_plan(layouts, toy.layout())


@pytest.mark.failure_mode(7)
def test_elements_that_no_copy_and_no_fill_writes_are_an_error() -> None:
    toy = attention()
    layout = toy.layout()
    layouts = chunked(toy.source_tensors(), 2)
    with pytest.raises(
        CoverageError, match=r"embed \[16, 8\]: 48 of 128 elements are written by nobody, first \[80, 128\)"
    ):
        make_plan(layouts, dataclasses.replace(layout, fills=()))
    for copy in layout.copies:
        with pytest.raises(CoverageError, match=f"{copy.target} .* written by nobody"):
            make_plan(layouts, dataclasses.replace(layout, copies=tuple(c for c in layout.copies if c is not copy)))


def test_elements_written_twice_are_an_error_that_names_who_writes_them() -> None:
    layout = attention().layout()
    layouts = chunked(attention().source_tensors(), 2)
    for copy in layout.copies:
        with pytest.raises(CoverageError, match=f"{copy.target} .* written more than once"):
            make_plan(layouts, dataclasses.replace(layout, copies=(*layout.copies, copy)))
    over_norm = dataclasses.replace(
        layout.copies[0], source="norm", source_offset=0, shape=(8,), source_strides=(1,), target_strides=(1,)
    )
    with pytest.raises(CoverageError, match=r"qkv \[9, 8\]: element 0 .*gets k, norm, q, v"):
        make_plan(layouts, dataclasses.replace(layout, copies=(*layout.copies, over_norm)))


def test_a_trainer_with_another_model_is_refused_with_both_shapes() -> None:
    layout = attention().layout()
    tensors = [SourceTensor("o", (6, 8), "bfloat16") if t.name == "o" else t for t in attention().source_tensors()]
    with pytest.raises(PlanError, match=r"o: rank 0 has \[6, 8\] bfloat16, the engine wants \[8, 6\] bfloat16"):
        make_plan(chunked(tensors, 2), layout)


@pytest.mark.failure_mode(9)
def test_a_copy_between_dtypes_of_one_size_is_refused() -> None:
    layout = TargetLayout(
        targets=(Target("w", (4,), "float16"),),
        sources=(SourceTensor("s", (4,), "bfloat16"),),
        copies=(Copy("s", 0, (1,), "w", 0, (1,), (4,)),),
    )
    with pytest.raises(PlanError, match="w is float16, but s is bfloat16"):
        make_plan(chunked(layout.sources, 1), layout)


def test_ranges_outside_a_tensor_are_refused_on_both_sides() -> None:
    layout = attention().layout()
    layouts = chunked(attention().source_tensors(), 2)
    wide = dataclasses.replace(layouts[0], holdings=(Holding("norm", 0, 9, 0),))
    with pytest.raises(PlanError, match=r"norm: rank 0 claims elements \[0, 9\), which the tensor lacks"):
        make_plan([wide, layouts[1]], layout)
    last = next(copy for copy in layout.copies if copy.source == "v")
    beyond = tuple(dataclasses.replace(c, source_offset=48) if c is last else c for c in layout.copies)
    with pytest.raises(PlanError, match="copy from v to qkv touches elements beyond the 48 of v"):
        make_plan(layouts, dataclasses.replace(layout, copies=beyond))


def test_one_rank_number_for_two_layouts_is_refused() -> None:
    layouts = chunked(attention().source_tensors(), 2)
    with pytest.raises(PlanError, match=r"ranks \[0, 0\] are not distinct"):
        make_plan([layouts[0], layouts[0]], attention().layout())


def test_holders_of_the_same_bytes_share_the_egress_in_regions() -> None:
    """Eight tensors of very different sizes, four holders: the busiest sends at most one region more than the mean."""
    tensors = [SourceTensor(f"t{i}", (rows, 16), "bfloat16") for i, rows in enumerate((400, 90, 70, 60, 33, 20, 7, 1))]
    layout = TargetLayout(
        targets=tuple(Target(t.name, t.shape, t.dtype) for t in tensors),
        sources=tuple(tensors),
        copies=tuple(Copy(t.name, 0, (16, 1), t.name, 0, (16, 1), t.shape) for t in tensors),
    )
    region_bytes = 1024
    plan = make_plan(replicated(tensors, 4), layout, region_bytes=region_bytes)
    loads = list(plan.bytes_per_rank.values())
    assert sum(loads) == plan.total_bytes == 2 * layout.numel
    assert max(loads) - sum(loads) / 4 <= region_bytes
    assert sum(plan.writes(rank)["length"].sum() for rank in range(4)) == layout.numel


def test_the_longest_region_is_given_away_first() -> None:
    """Four short tensors and a long one over two holders: handed out as listed, the loads would be 6 and 2."""
    tensors = [SourceTensor(f"t{i}", (rows,), "bfloat16") for i, rows in enumerate((10, 10, 10, 10, 40))]
    layout = TargetLayout(
        targets=tuple(Target(t.name, t.shape, t.dtype) for t in tensors),
        sources=tuple(tensors),
        copies=tuple(Copy(t.name, 0, (1,), t.name, 0, (1,), t.shape) for t in tensors),
    )
    assert make_plan(replicated(tensors, 2), layout).bytes_per_rank == {0: 80, 1: 80}


def test_hsdp_replicas_send_disjoint_halves_of_every_shard() -> None:
    toy = attention()
    shards = chunked(toy.source_tensors(), 2)
    layouts = [dataclasses.replace(shards[rank % 2], rank=rank) for rank in range(4)]
    plan = make_plan(layouts, toy.layout(), region_bytes=32)
    loads = plan.bytes_per_rank
    assert abs(loads[0] - loads[2]) <= 32
    assert abs(loads[1] - loads[3]) <= 32
    assert_same_as_loader(toy, layouts, region_bytes=32)


def test_neighbours_on_both_sides_become_one_write() -> None:
    """One rank holds q, k and v one behind the other, as the fused target wants them: a single write."""
    toy = attention(tp=1, rank=0)
    plan = make_plan(chunked(toy.source_tensors(), 1), toy.layout())
    writes = plan.writes(0)
    qkv = writes[writes["target_index"] == [target.name for target in plan.targets].index("qkv")]
    assert qkv.tolist() == [(0, [target.name for target in plan.targets].index("qkv"), 0, 3 * 6 * 8)]


def test_the_digest_tells_apart_what_leads_to_other_writes() -> None:
    toy = attention()
    target, layouts = toy.layout(), chunked(toy.source_tensors(), 2)
    moved = dataclasses.replace(
        layouts[1], holdings=tuple(dataclasses.replace(h, local_offset=h.local_offset + 1) for h in layouts[1].holdings)
    )
    digests = {
        make_plan(layouts, toy.layout()).digest,
        make_plan([layouts[0], moved], toy.layout()).digest,
        make_plan(chunked(toy.source_tensors(), 3), toy.layout()).digest,
        make_plan([layouts[0], dataclasses.replace(layouts[1], rank=2)], toy.layout()).digest,
        make_plan(layouts, attention(rank=0).layout()).digest,
        make_plan(layouts, dataclasses.replace(target, copies=_exchanged(target.copies, "k", "v"))).digest,
    }
    assert len(digests) == 6


def _exchanged(copies: tuple[Copy, ...], one: str, other: str) -> tuple[Copy, ...]:
    """Two sources of one shape land in each other's place."""
    names = {one: other, other: one}
    return tuple(dataclasses.replace(copy, source=names.get(copy.source, copy.source)) for copy in copies)


def test_a_rank_that_the_plan_does_not_know_is_refused() -> None:
    toy = attention()
    with pytest.raises(PlanError, match=r"rank 5 is not among the plan's ranks \[0, 1\]"):
        make_plan(chunked(toy.source_tensors(), 2), toy.layout()).writes(5)


def test_planning_needs_no_torch() -> None:
    """The operator's preflight and laptops plan too."""
    code = "import sys, weightsync.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
