"""Ranks that hold the same elements share what is sent of them: planned for real modules on meta tensors, in real sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.dataplane.rank_makers import Parallelize, all_ranks, ep, fsdp, mesh_of
from tests.dataplane.slot_makers import engine
from weightsync.layout.arenas import Carrier
from weightsync.layout.records import SourceTensor
from weightsync.plan import make_plan

A3B = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)
"""Qwen3-30B-A3B with 4 of its 48 layers."""


def model() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **A3B))


def sent(n_ranks: int, parallelize: Parallelize) -> tuple[list[int], list[SourceTensor]]:
    """Bytes that each rank sends to one engine that wants all of the model in bf16, and the tensors."""
    locals_ = all_ranks(model, n_ranks, parallelize)
    tensors = list(locals_[0].tensors)
    wanted = {tensor.name: tensor for tensor in tensors}
    carrier = Carrier(wanted)
    carried = [carrier.outline(local.layout(rank)).layout for rank, local in enumerate(locals_)]
    plan = make_plan(carried, engine(tensors))
    assert plan.total_bytes == sum(2 * tensor.numel for tensor in tensors)
    return [plan.bytes_per_rank[rank] for rank in range(n_ranks)], tensors


@pytest.mark.parametrize(("replicate", "shards"), [(2, 2), (2, 4), (4, 2)])
def test_replicas_of_hsdp_share_the_egress_within_a_tenth(replicate: int, shards: int) -> None:
    counts, _ = sent(replicate * shards, lambda model: fsdp(model, mesh_of(replicate, shards)))
    assert max(counts) <= 1.1 * min(counts), counts


def test_experts_come_from_the_rank_that_has_them_and_the_rest_evens_the_ranks_out() -> None:
    """Expert parallelism over three ranks, 43, 43 and 42 of 128 experts: what all have whole goes first to who has less."""
    counts, tensors = sent(3, ep)
    expert_bytes = [sum(2 * t.numel for t in tensors if ".experts." in t.name) * n // 128 for n in (43, 43, 42)]
    assert all(count > expert for count, expert in zip(counts, expert_bytes, strict=True))
    assert max(counts) <= 1.1 * min(counts), counts
