"""What ranks say they hold, put together, is the checkpoint: placements as trainers make them, and those that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tests.dataplane.family_makers import build, saved
from tests.dataplane.rank_makers import (
    Parallelize,
    all_ranks,
    assert_same,
    counted,
    cp_fsdp,
    ep,
    ep_fsdp,
    fsdp,
    gather,
    holders,
    mesh_of,
    one_of,
    sources_of_model,
    tp_fsdp,
)
from weightsync.errors import UnsupportedLayout
from weightsync.layout.families import DENSE
from weightsync.layout.shards import sources_of


@pytest.mark.failure_mode(6)
@pytest.mark.parametrize("n_ranks", [2, 3, 7])
@pytest.mark.parametrize("name", ["llama, tied", "qwen3_moe"])
def test_uneven_fsdp2_shards_of_all_ranks_make_the_checkpoint(name: str, n_ranks: int, tmp_path: Path) -> None:
    """1. shards are uneven, with seven ranks some hold no expert; 2. together they are what save_pretrained writes."""
    want = saved(build(name), tmp_path)
    ranks = all_ranks(lambda: build(name), n_ranks, fsdp)
    assert len({local.arena_numel for local in ranks}) > 1
    if name == "qwen3_moe" and n_ranks == 7:
        assert not any("experts" in piece.name for piece in ranks[-1].pieces)
    assert set(holders(ranks).values()) == {1}
    assert_same(gather(ranks), want)


@pytest.mark.failure_mode(29)
@pytest.mark.failure_mode(6)
@pytest.mark.parametrize(
    ("n_ranks", "parallelize", "n_holders"),
    [
        pytest.param(4, lambda model: fsdp(model, mesh_of(2, 2)), {2}, id="hsdp 2x2"),
        pytest.param(6, lambda model: fsdp(model, mesh_of(2, 3)), {2}, id="hsdp 2x3"),
        pytest.param(2, ep, {1, 2}, id="ep 2, the rest replicated"),
        pytest.param(4, ep_fsdp, {1}, id="ep 2 x fsdp 2, experts over both"),
        pytest.param(4, lambda model: ep_fsdp(model, inner_dim=1), {1}, id="ep 2 x fsdp 2, rows of experts"),
        pytest.param(4, lambda model: ep_fsdp(model, inner_dim=2), {1}, id="ep 2 x fsdp 2, columns of experts"),
        pytest.param(10, lambda model: ep_fsdp(model, 2), {1}, id="ep 2 x fsdp 5, ranks without an expert"),
        pytest.param(4, cp_fsdp, {1}, id="cp 2 x fsdp 2"),
        pytest.param(4, tp_fsdp, {1, 2}, id="tp 2 x fsdp 2, norms replicated over tp"),
    ],
)
def test_meshes_of_several_axes_make_the_checkpoint(
    n_ranks: int, parallelize: Parallelize, n_holders: set[int], tmp_path: Path
) -> None:
    """Ranks are told apart by their coordinate in the mesh: all of them are on one device of index 0 here."""

    def make():
        return build("qwen3_moe", num_experts=4)

    want = saved(make(), tmp_path)
    ranks = all_ranks(make, n_ranks, parallelize)
    assert set(holders(ranks).values()) == n_holders
    assert_same(gather(ranks), want)


def test_parameters_that_fsdp2_offloads_to_the_host_are_held_as_any_others(tmp_path: Path) -> None:
    offload = CPUOffloadPolicy(pin_memory=False)
    ranks = all_ranks(lambda: build("llama, tied"), 3, lambda model: fsdp(model, offload_policy=offload))
    assert all(piece.flat().device.type == "cpu" for local in ranks for piece in local.pieces)
    assert_same(gather(ranks), saved(build("llama, tied"), tmp_path))


def test_the_arena_has_no_gaps_and_the_layout_says_where_each_piece_is() -> None:
    with one_of(4, 1):
        model = build("qwen3_moe", num_experts=4)
        ep_fsdp(model, inner_dim=1)
        local = sources_of_model(model)
    ends = [0]
    for piece, holding in zip(local.pieces, local.layout(1).holdings, strict=True):
        assert piece.local_offset == ends[-1]
        assert (holding.name, holding.start, holding.stop, holding.local_offset) == (
            piece.name,
            piece.start,
            piece.stop,
            piece.local_offset,
        )
        assert piece.flat().numel() == piece.stop - piece.start
        ends.append(piece.local_offset + piece.stop - piece.start)
    assert ends[-1] == local.arena_numel
    assert local.layout(1).rank == 1
    assert local.layout(1).tensors == local.tensors


def test_a_piece_shows_what_the_optimizer_made_of_the_parameter() -> None:
    with one_of(2, 1):
        model = build("llama, tied")
        fsdp(model)
        local = sources_of_model(model)
        piece = next(p for p in local.pieces if p.name == "model.norm.weight")
        before = piece.flat().clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.25)
        assert piece.flat().dtype == torch.float32
        assert not piece.flat().requires_grad
        assert torch.equal(piece.flat(), before - 0.25)
    assert all(t.dtype == "bfloat16" for t in local.tensors), (
        "announced in the checkpoint's dtype, whatever the master's"
    )


def test_parameters_that_a_forward_left_gathered_are_sharded_again_first() -> None:
    """FSDP2 keeps the root's parameters gathered after a forward, and frees that memory later.

    Without `reshard` the pieces are all of each tensor on every rank, in memory that the next backward frees.
    """
    with one_of(2, 1):
        model = build("llama, tied")
        fsdp(model)
        model.unshard()
        assert not isinstance(model.model.norm.weight, DTensor)
        local = sources_of_model(model)
    assert [(p.start, p.stop) for p in local.pieces if p.name == "model.norm.weight"] == [(8, 16)]


def test_plain_and_replicated_tensors_are_held_whole_by_every_rank() -> None:
    with one_of(2, 1):
        mesh = mesh_of(2)
        named = {
            "plain": nn.Parameter(torch.ones(4, 3)),
            "copied": DTensor.from_local(torch.ones(5), mesh, [Replicate()], run_check=False),
            "scalar": DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()], run_check=False),
            "empty": torch.ones(0, 3),
        }
        local = sources_of(named.items(), DENSE)
    assert [(p.name, p.start, p.stop) for p in local.pieces] == [("plain", 0, 12), ("copied", 0, 5), ("scalar", 0, 1)]


def test_a_rank_outside_a_tensors_mesh_holds_nothing_of_it() -> None:
    with one_of(4, 3), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mesh = DeviceMesh("cpu", [0, 1])
        shard_of_others = DTensor.from_local(
            torch.ones(0, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1)
        )
        local = sources_of([("w", shard_of_others)], DENSE)
    assert (local.pieces, local.arena_numel) == ((), 0)
    assert [t.shape for t in local.tensors] == [(4, 3)]


def test_columns_are_one_piece_a_row() -> None:
    with one_of(2, 1):
        shard = DTensor.from_local(counted(3, 2), mesh_of(2), [Shard(1)], run_check=False)
        local = sources_of([("w", shard)], DENSE)
    assert [(p.start, p.stop, p.flat().tolist()) for p in local.pieces] == [
        (2, 4, [0, 1]),
        (6, 8, [2, 3]),
        (10, 12, [4, 5]),
    ]


def test_neighbours_in_the_tensor_are_one_piece_whatever_the_placements() -> None:
    """Two axes along dim 0 and a full inner dim; rows 2 to 4 of 8 by torch's order of the axes."""
    with one_of(4, 1):
        shard = DTensor.from_local(torch.ones(2, 5), mesh_of(2, 2), [Shard(0), Shard(0)], run_check=False)
        (piece,) = sources_of([("w", shard)], DENSE).pieces
    assert (piece.start, piece.stop) == (10, 20)


def test_a_placement_that_cannot_be_pushed_is_refused_by_name() -> None:
    with one_of(2, 0):
        tensor = DTensor.from_local(torch.ones(4, 3), mesh_of(2), [Partial()], run_check=False)
        with pytest.raises(UnsupportedLayout, match=r"layer\.w has placements .*Partial.*redistribute it before"):
            sources_of([("layer.w", tensor)], DENSE)


@pytest.mark.failure_mode(6)
def test_a_shard_that_is_not_what_torch_chunk_gives_is_refused_with_both_sizes() -> None:
    """Seven rows over two ranks are four and three; a rank with five would be read at the wrong rows."""
    with one_of(2, 0):
        tensor = DTensor.from_local(
            torch.ones(5, 3), mesh_of(2), [Shard(0)], run_check=False, shape=torch.Size((7, 3)), stride=(3, 1)
        )
        with pytest.raises(
            UnsupportedLayout, match=r"w: this rank has \[5, 3\] .*, want \[4, 3\] of \[7, 3\] for placements \[Shard"
        ):
            sources_of([("w", tensor)], DENSE)


@pytest.mark.failure_mode(6)
def test_an_inner_split_of_uneven_outer_shards_is_refused_rather_than_read_at_the_wrong_rows() -> None:
    """FSDP 3 inside TP 2 of seven rows: the last FSDP rank of the second TP shard has row 6, torch's placements say the first's.

    Without the comparison of shapes the row would be published under another index by one rank and be missing from the other.
    """
    faults: list[str] = []
    for rank in range(6):
        dp, tp = divmod(rank, 2)
        mine = counted(7, 1).tensor_split([4])[tp]
        local = [*mine.chunk(3), torch.ones(0, 1)][dp].contiguous()
        with one_of(6, rank):
            tensor = DTensor.from_local(
                local,
                mesh_of(3, 2),
                [_StridedShard(0, split_factor=2), Shard(0)],
                run_check=False,
                shape=torch.Size((7, 1)),
                stride=(1, 1),
            )
            try:
                for piece in sources_of([("w", tensor)], DENSE).pieces:
                    assert piece.flat().tolist() == list(range(piece.start, piece.stop))
            except UnsupportedLayout as error:
                faults.append(str(error))
    assert len(faults) == 2
    assert all("where two axes shard one dim, the outer one evenly" in fault for fault in faults)


@pytest.mark.parametrize("of", [lambda t: t.t(), lambda t: t[:, :2]])
def test_a_parameter_that_is_not_contiguous_is_refused(of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(
        UnsupportedLayout, match=r"w: this rank has \[\d, \d\] \(strides .* local tensors must be contig"
    ):
        sources_of([("w", of(torch.ones(3, 4)))], DENSE)
