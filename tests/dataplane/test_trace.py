"""A loader's trace says where every element comes from; what it refuses is in test_trace_refusals.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.dataplane.toy_models import Weights, chunked, execute, flat_bits, poisoned, source
from weightsync.errors import UnsupportedLayout
from weightsync.layout.records import Copy, Fill, SourceTensor, Target
from weightsync.layout.trace import trace_loader
from weightsync.plan import make_plan

HIDDEN, INNER, EXPERTS, VOCAB, PADDED = 8, 6, 3, 20, 24


class StackedLayer(nn.Module):
    """One rank (of two) of a layer as engines write them: fused, stacked, padded, tied parameters, and a buffer."""

    rank, tp = 1, 2

    def __init__(self) -> None:
        super().__init__()
        part = INNER // self.tp
        self.qkv = nn.Parameter(poisoned(3 * part, HIDDEN), requires_grad=False)
        self.o = nn.Parameter(poisoned(HIDDEN, part), requires_grad=False)
        self.w13 = nn.Parameter(poisoned(EXPERTS, 2 * part, HIDDEN), requires_grad=False)
        self.w2 = nn.Parameter(poisoned(EXPERTS, HIDDEN, part), requires_grad=False)
        self.embed = nn.Parameter(poisoned(PADDED, HIDDEN), requires_grad=False)
        self.lm_head = self.embed
        self.norm = nn.Parameter(poisoned(HIDDEN), requires_grad=False)
        self.register_buffer("inv_freq", torch.ones(4))

    def load_weights(self, weights: Weights) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name == "rotary.inv_freq":
                continue
            self._load(name, tensor)
            loaded.add(name)
        return loaded

    def _load(self, name: str, tensor: Tensor) -> None:
        part = INNER // self.tp
        head, _, kind = name.rpartition(".")
        if kind in ("q", "k", "v"):
            at = "qkv".index(kind) * part
            self.qkv.data.narrow(0, at, part).copy_(tensor.narrow(0, self.rank * part, part))
        elif kind == "o":
            self.o.data.copy_(tensor.chunk(self.tp, dim=1)[self.rank])
        elif kind in ("gate", "up"):
            half = self.w13.data[int(head.split(".")[1])].chunk(2)[("gate", "up").index(kind)]
            half.copy_(tensor.view(self.tp, part, HIDDEN)[self.rank])
        elif kind == "down":
            self.w2.data[int(head.split(".")[1])] = tensor[:, self.rank * part : (self.rank + 1) * part]
        elif kind == "embed":
            self.embed.data[: len(tensor)].copy_(tensor)
            self.embed.data[len(tensor) :].fill_(0)
        else:
            self.norm.data.copy_(tensor)

    @staticmethod
    def sources() -> tuple[SourceTensor, ...]:
        experts = [
            source(f"experts.{e}.{kind}", *shape)
            for e in range(EXPERTS)
            for kind, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER)))
        ]
        return (
            *(source(f"attn.{kind}", INNER, HIDDEN) for kind in "qkv"),
            source("attn.o", HIDDEN, INNER),
            *experts,
            source("model.embed", VOCAB, HIDDEN),
            source("model.norm", HIDDEN),
            source("rotary.inv_freq", 4),
        )


def test_a_module_with_stacked_parameters_is_understood_and_replayed_bit_equal() -> None:
    """1. tracing writes nothing; 2. names, ties, padding, unused; 3. a push from three ranks equals a load."""
    layer, sources = StackedLayer(), StackedLayer.sources()
    layout = trace_loader(layer.load_weights, dict(layer.named_parameters(remove_duplicate=False)), sources)
    assert all((flat_bits(p) == 0x5A5A).all() for p in layer.parameters())

    assert [t.name for t in layout.targets] == ["embed", "norm", "o", "qkv", "w13", "w2"]
    assert layout.fills == (Fill("embed", VOCAB * HIDDEN, (1,), ((PADDED - VOCAB) * HIDDEN,), 0),)
    assert layout.unused == ("rotary.inv_freq",)
    part = INNER // 2
    assert Copy("attn.o", part, (INNER, 1), "o", 0, (part, 1), (HIDDEN, part)) in layout.copies

    weights = {s.name: torch.randn(s.shape).bfloat16() for s in sources}
    truth, pushed = StackedLayer(), StackedLayer()
    truth.load_weights(weights.items())
    layouts = chunked(sources, 3)
    params = {name: p.data for name, p in pushed.named_parameters()}
    params["embed"][VOCAB:] = 0
    execute(make_plan(layouts, layout), layouts, weights, params)
    for name, param in truth.named_parameters():
        assert torch.equal(param.view(torch.int16), params[name].view(torch.int16)), name


def test_several_parameters_in_one_storage_are_told_apart() -> None:
    arena = poisoned(100)
    params = {"a": arena[10:30].view(4, 5), "b": arena[30:36], "c": arena[50:60]}

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            params[name].copy_(tensor)

    layout = trace_loader(load, params, [source("a", 4, 5), source("b", 6), source("c", 10)])
    assert [(c.source, c.target, c.target_offset) for c in layout.copies] == [(n, n, 0) for n in "abc"]
    with pytest.raises(UnsupportedLayout, match="parameters a and b overlap in memory"):
        trace_loader(load, {"a": arena[:20], "b": arena[10:40]}, [source("a", 20)])


@pytest.mark.parametrize(
    ("wanted", "stored"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float8_e4m3fn")]
)
def test_what_a_trainer_can_produce_is_offered_in_the_dtype_that_is_wanted(wanted: str, stored: str) -> None:
    """A router's weight that the engine keeps in fp32; DSA's indexer.wk, in FP8 in the checkpoint and bf16 in the engine."""
    weight = torch.zeros(256, 130, dtype=getattr(torch, wanted))
    sources = [source("s", 256, 130, dtype=stored)]
    if stored == "float8_e4m3fn":
        sources.append(source("s_scale_inv", 2, 2, dtype="float32"))

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            if name == "s":
                weight.copy_(tensor)

    layout = trace_loader(load, {"w": weight}, sources)
    assert layout.sources == (source("s", 256, 130, dtype=wanted),)
    assert layout.unused == ()


def test_an_fp8_matrix_and_its_scales_are_traced_as_two_tensors() -> None:
    """Two TP ranks' halves of the rows, scales of 128 by 128 blocks beside them."""
    weight = torch.zeros(128, 256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.zeros(1, 2)
    sources = [source("s", 256, 256, dtype="float8_e4m3fn"), source("s_scale_inv", 2, 2, dtype="float32")]

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            (weight if name == "s" else scale).copy_(tensor.narrow(0, tensor.shape[0] // 2, tensor.shape[0] // 2))

    layout = trace_loader(load, {"w": weight, "w_scale_inv": scale}, sources)
    assert [(c.source, c.source_offset, c.target) for c in layout.copies] == [
        ("s", 128 * 256, "w"),
        ("s_scale_inv", 2, "w_scale_inv"),
    ]
    assert [target.dtype for target in layout.targets] == ["float8_e4m3fn", "float32"]


def test_clearing_before_copying_leaves_only_the_padding_filled() -> None:
    """The last fill of an element counts, and a copy after a fill beats it."""
    weight = poisoned(4, 6)

    def load(weights: Weights) -> None:
        weight.zero_()
        weight[:, 4:].fill_(1.0)
        for _, tensor in weights:
            weight[1:3, :4].copy_(tensor)

    layout = trace_loader(load, {"w": weight}, [source("s", 2, 4)])
    filled = {f.offset + i: f.value_bits for f in layout.fills for i in range(f.numel)}
    one = 0x3F80
    want = {row * 6 + column: one if column >= 4 else 0 for row in range(4) for column in range(6)}
    copied = {row * 6 + column for row in (1, 2) for column in range(4)}
    assert filled == {place: bits for place, bits in want.items() if place not in copied}
    assert sum(f.numel for f in layout.fills) == len(filled)


def test_a_broadcast_scalar_and_an_empty_slice_are_copies_like_any_other() -> None:
    weight = poisoned(4, 6)

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            weight.copy_(tensor)
            weight[4:].copy_(tensor.expand(4, 6)[4:])

    layout = trace_loader(load, {"w": weight}, [source("s", 1)])
    assert layout.copies == (Copy("s", 0, (0, 0), "w", 0, (6, 1), (4, 6)),)
    plan = make_plan(chunked([source("s", 1)], 1), layout)
    assert plan.writes(0)["length"].sum() == 24


def test_an_empty_parameter_wants_nothing() -> None:
    weight = poisoned(3)
    layout = trace_loader(
        lambda weights: [weight.copy_(s) for _, s in weights], {"w": weight, "none": poisoned(0)}, [source("s", 3)]
    )
    assert layout.targets == (Target("w", (3,), "bfloat16"),)


def test_a_model_on_meta_is_traced_like_a_live_one() -> None:
    with torch.device("meta"):
        layer = StackedLayer()
    layout = trace_loader(layer.load_weights, dict(layer.named_parameters()), StackedLayer.sources())
    live = StackedLayer()
    assert (
        layout.digest()
        == trace_loader(live.load_weights, dict(live.named_parameters()), StackedLayer.sources()).digest()
    )


def scales(rows: int, columns: int) -> list[SourceTensor]:
    return [source("s_scale_inv", rows, columns, dtype="float32")]


@pytest.mark.parametrize(
    "refine",
    [
        lambda s: s.repeat_interleave(4, dim=0)[3:9],
        lambda s: s.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)[1:5, 2:6],
        lambda s: torch.cat([s[2:], s[:1]]),
        lambda s: s.t().contiguous(),
        lambda s: s[torch.tensor([2, 0, 1, 2])],
        lambda s: torch.zeros(4, 4).copy_(s.repeat(2, 1)[:4]),
    ],
)
def test_scales_that_the_loader_gathers_and_repeats_are_copies_of_their_elements(refine) -> None:
    """vLLM refines the grid of scales when a tensor-parallel rank has no whole blocks (Qwen3-30B FP8 at TP 8: 96 rows).

    On the meta device each of these is "computed from other tensors". 1. replaying the record equals the loader; 2. a push does.
    """
    grid = torch.randn(3, 4)
    truth = refine(grid).contiguous()
    weight = torch.zeros(truth.shape)

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            weight.copy_(refine(tensor))

    layout = trace_loader(load, {"w_scale_inv": weight}, scales(3, 4))
    for copy in layout.copies:
        from_source = grid.as_strided(copy.shape, copy.source_strides, copy.source_offset)
        weight.as_strided(copy.shape, copy.target_strides, copy.target_offset).copy_(from_source)
    assert torch.equal(weight, truth)

    pushed, layouts = torch.full_like(truth, torch.nan), chunked(layout.sources, 2)
    plan = make_plan(layouts, layout)
    for held in layouts:
        arena = torch.cat([grid.reshape(-1)[h.start : h.stop] for h in held.holdings])
        for slot, _, at, length in plan.writes(held.rank).tolist():
            pushed.view(-1)[at : at + length] = arena[slot : slot + length]
    assert torch.equal(pushed, truth)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s * 2, "with data of its own"),
        (lambda s: s.amax(0, keepdim=True).expand(3, 4), "with data of its own"),
        (lambda s: torch.nn.functional.pad(s[:2], (0, 0, 0, 1)), "mixed with values of its own"),
        (lambda s: torch.cat([s[:2], torch.ones(1, 4)]), "mixed with values of its own"),
    ],
)
def test_scales_that_the_loader_computes_are_refused_by_name(change, match) -> None:
    """Numbers stand for values that the trainer sends later: what is computed from them would be garbage that looks traced."""
    weight = torch.zeros(3, 4)
    with pytest.raises(UnsupportedLayout, match=rf"w_scale_inv .*{match}"):
        trace_loader(
            lambda weights: [weight.copy_(change(s)) for _, s in weights], {"w_scale_inv": weight}, scales(3, 4)
        )
