"""Layouts of large mixture-of-experts models without their weights: what FSDP ranks hold and what vLLM's ranks want.

Sources have the names and shapes of the checkpoint, with experts fused as transformers 5 keeps them or one tensor an expert.
Targets are those of vLLM: attention, embedding and head split by tensor parallelism, experts by expert parallelism. Records only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from weightsync.layout.records import Copy, Holding, Shape, SourceLayout, SourceTensor, Target, TargetLayout

DTYPE = "bfloat16"
ALIGN = 128
"""Elements; a slot of the arena begins at a multiple (256 bytes of bf16)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with grouped-query attention and experts in every layer, without biases."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    intermediate: int
    vocabulary: int

    @property
    def numel(self) -> int:
        """Elements of all weights."""
        return sum(tensor.numel for tensor in sources(self, fused=True))


QWEN3_235B = Model(
    layers=94, hidden=4096, heads=64, kv_heads=4, head_dim=128, experts=128, intermediate=1536, vocabulary=151936
)
ONE_TRILLION = Model(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, experts=256, intermediate=2048, vocabulary=157184
)
"""The sizes of a published model of 10^12 parameters with this kind of attention."""


def sources(model: Model, *, fused: bool) -> tuple[SourceTensor, ...]:
    """The checkpoint's tensors in the order of the module."""
    return tuple(SourceTensor(name, shape, DTYPE) for name, shape in _shapes(model, fused))


def _shapes(model: Model, fused: bool) -> Iterator[tuple[str, Shape]]:
    hidden, inner = model.hidden, model.intermediate
    yield "model.embed_tokens.weight", (model.vocabulary, hidden)
    for i in range(model.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (model.heads * model.head_dim, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (model.kv_heads * model.head_dim, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (model.kv_heads * model.head_dim, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, model.heads * model.head_dim)
        yield f"{layer}.self_attn.q_norm.weight", (model.head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (model.head_dim,)
        yield f"{layer}.mlp.gate.weight", (model.experts, hidden)
        if fused:
            yield f"{layer}.mlp.experts.gate_up_proj", (model.experts, 2 * inner, hidden)
            yield f"{layer}.mlp.experts.down_proj", (model.experts, hidden, inner)
        else:
            for e in range(model.experts):
                yield f"{layer}.mlp.experts.{e}.gate_proj.weight", (inner, hidden)
                yield f"{layer}.mlp.experts.{e}.up_proj.weight", (inner, hidden)
                yield f"{layer}.mlp.experts.{e}.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (model.vocabulary, hidden)


def fsdp(tensors: tuple[SourceTensor, ...], *, ranks: int, replicas: int = 1) -> list[SourceLayout]:
    """FSDP2 over `ranks` / `replicas` shards (torch.chunk along dim 0), each held by `replicas` ranks."""
    shards = ranks // replicas
    held = [_shard(tensors, index, shards) for index in range(shards)]
    return [SourceLayout(rank, tensors, held[rank % shards]) for rank in range(ranks)]


def _shard(tensors: tuple[SourceTensor, ...], index: int, shards: int) -> tuple[Holding, ...]:
    holdings, used = [], 0
    for tensor in tensors:
        rows, row = tensor.shape[0], math.prod(tensor.shape[1:])
        chunk = -(-rows // shards)
        start, stop = min(index * chunk, rows) * row, min((index + 1) * chunk, rows) * row
        if start < stop:
            holdings.append(Holding(tensor.name, start, stop, used))
            used += -(-(stop - start) // ALIGN) * ALIGN
    return tuple(holdings)


class _Engine:
    """Collects one engine rank's targets and copies."""

    def __init__(self, tensors: tuple[SourceTensor, ...]) -> None:
        self._known = {tensor.name: tensor for tensor in tensors}
        self._sources: dict[str, SourceTensor] = {}
        self._targets: list[Target] = []
        self._copies: list[Copy] = []

    def target(self, name: str, *shape: int) -> str:
        self._targets.append(Target(name, shape, DTYPE))
        return name

    def copy(self, source: str, offset: int, target: str, at: int, shape: Shape, row: int | None = None) -> None:
        """A block of `shape`, contiguous in the target; rows of the source are `row` elements apart where it is a slice."""
        self._sources[source] = self._known[source]
        dense = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        strides = dense if row is None else (row, 1)
        self._copies.append(Copy(source, offset, strides, target, at, dense, shape))

    def whole(self, name: str) -> None:
        shape = self._known[name].shape
        self.copy(name, 0, self.target(name, *shape), 0, shape)

    def layout(self) -> TargetLayout:
        return TargetLayout(tuple(self._targets), tuple(self._sources.values()), tuple(self._copies))


def engine(
    model: Model, tensors: tuple[SourceTensor, ...], *, tp: int, ep: int, rank: int, fused: bool
) -> TargetLayout:
    """What engine rank `rank` of `ep` stores: rank % tp of attention, the experts of its number."""
    made, part = _Engine(tensors), rank % tp
    _rows(made, model, "model.embed_tokens.weight", tp, part)
    for i in range(model.layers):
        layer = f"model.layers.{i}"
        _attention(made, model, f"{layer}.self_attn", tp, part)
        made.whole(f"{layer}.mlp.gate.weight")
        _experts(made, model, f"{layer}.mlp.experts", range(*_part(model.experts, ep, rank)), fused)
        made.whole(f"{layer}.input_layernorm.weight")
        made.whole(f"{layer}.post_attention_layernorm.weight")
    made.whole("model.norm.weight")
    _rows(made, model, "lm_head.weight", tp, part)
    return made.layout()


def _part(count: int, parts: int, index: int) -> tuple[int, int]:
    return count // parts * index, count // parts * (index + 1)


def _rows(made: _Engine, model: Model, name: str, tp: int, part: int) -> None:
    start, stop = _part(model.vocabulary, tp, part)
    shape = (stop - start, model.hidden)
    made.copy(name, start * model.hidden, made.target(name, *shape), 0, shape)


def _attention(made: _Engine, model: Model, layer: str, tp: int, part: int) -> None:
    """Heads by rank; with fewer key heads than ranks each is kept by several. o_proj is sliced by columns."""
    hidden, width = model.hidden, model.head_dim
    q, kv = model.heads // tp * width, max(model.kv_heads // tp, 1) * width
    first_kv = part * model.kv_heads // tp * width
    qkv = made.target(f"{layer}.qkv_proj.weight", q + 2 * kv, hidden)
    for name, first, rows, at in (("q", part * q, q, 0), ("k", first_kv, kv, q), ("v", first_kv, kv, q + kv)):
        made.copy(f"{layer}.{name}_proj.weight", first * hidden, qkv, at * hidden, (rows, hidden))
    o = made.target(f"{layer}.o_proj.weight", hidden, q)
    made.copy(f"{layer}.o_proj.weight", part * q, o, 0, (hidden, q), row=model.heads * width)
    made.whole(f"{layer}.q_norm.weight")
    made.whole(f"{layer}.k_norm.weight")


def _experts(made: _Engine, model: Model, layer: str, local: range, fused: bool) -> None:
    """w13 and w2 of the local experts, one copy an expert and matrix, as vLLM's loader makes them of either layout."""
    hidden, inner = model.hidden, model.intermediate
    half = inner * hidden
    w13 = made.target(f"{layer}.routed_experts.w13_weight", len(local), 2 * inner, hidden)
    w2 = made.target(f"{layer}.routed_experts.w2_weight", len(local), hidden, inner)
    for at, e in enumerate(local):
        for i, name in enumerate(("gate", "up")):
            source, offset = (f"{layer}.gate_up_proj", (2 * e + i) * half)
            if not fused:
                source, offset = (f"{layer}.{e}.{name}_proj.weight", 0)
            made.copy(source, offset, w13, (2 * at + i) * half, (inner, hidden))
        source, offset = (f"{layer}.down_proj", e * half) if fused else (f"{layer}.{e}.down_proj.weight", 0)
        made.copy(source, offset, w2, at * half, (hidden, inner))
