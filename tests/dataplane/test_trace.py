"""A loader's trace says where every element comes from, or says by name why it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.dataplane.toy_models import Weights, chunked, execute, flat_bits, poisoned
from weightsync.errors import CoverageError, UnsupportedLayout
from weightsync.layout.records import Copy, Fill, SourceTensor, Target
from weightsync.layout.trace import trace_loader
from weightsync.plan import make_plan

HIDDEN, INNER, EXPERTS, VOCAB, PADDED = 8, 6, 3, 20, 24


def source(name: str, *shape: int, dtype: str = "bfloat16") -> SourceTensor:
    return SourceTensor(name, shape, dtype)


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


def refused(
    act: Callable[[Tensor, Tensor], object], match: str, *, param: Tensor | None = None, dtype: str = "bfloat16"
) -> None:
    """Tracing a loader that does `act(parameter, source)` raises UnsupportedLayout and leaves the parameter alone."""
    weight = poisoned(4, 6) if param is None else param
    memory = weight.detach()
    before = memory.clone()

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            act(weight, tensor)

    with pytest.raises(UnsupportedLayout, match=match):
        trace_loader(load, {"layer.w": weight}, [source("s", 4, 6, dtype=dtype)])
    assert torch.equal(memory.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "change",
    [
        lambda p, s: p.add_(1),
        lambda p, s: p.mul_(2),
        lambda p, s: p.index_copy_(0, torch.arange(4), torch.zeros(4, 6, dtype=torch.bfloat16)),
        lambda p, s: p.index_put_((torch.arange(4),), torch.zeros(4, 6, dtype=torch.bfloat16)),
        lambda p, s: p.masked_fill_(torch.ones(4, 6, dtype=torch.bool), 0),
        lambda p, s: torch.add(p, p, out=p),
        lambda p, s: p.resize_(2, 2),
        lambda p, s: p.normal_(),
    ],
)
def test_any_other_change_of_a_parameter_is_refused_by_name(change) -> None:
    refused(change, r"changes parameter layer\.w with aten\..*at source s")


@pytest.mark.failure_mode(9)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_a_parameter_of_another_dtype_than_its_source_is_refused(dtype: torch.dtype) -> None:
    refused(
        lambda p, s: p.copy_(s),
        "parameter layer.w is float.* but s is offered as bfloat16",
        param=torch.zeros(4, 6, dtype=dtype),
    )


@pytest.mark.failure_mode(9)
def test_bytes_behind_a_view_of_another_dtype_are_refused() -> None:
    refused(lambda p, s: p.view(torch.uint8).copy_(s.view(torch.uint8)), "copied as uint8")


def test_a_source_of_a_dtype_that_cannot_be_pushed_is_refused() -> None:
    refused(
        lambda p, s: None, "source s is float16: only bfloat16, float32, float8_e4m3fn can be pushed", dtype="float16"
    )


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


@pytest.mark.failure_mode(3)
def test_a_parameter_that_is_not_in_load_format_is_refused() -> None:
    refused(lambda p, s: p.copy_(s), "layer.w .* is not contiguous", param=poisoned(6, 4).t())


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda p, s: p.copy_(torch.zeros(4, 6, dtype=torch.bfloat16)), "with data of its own"),
        (lambda p, s: p.copy_(s * 2), "computed from other tensors"),
        (lambda p, s: p.copy_(s.t().contiguous().t()), "computed from other tensors"),
        (lambda p, s: p.copy_(torch.cat([s[:2], s[2:]])), "computed from other tensors"),
        (
            lambda p, s: torch.zeros(4, 6, dtype=torch.bfloat16).copy_(s),
            "s is copied into a tensor .* that is no parameter",
        ),
        (lambda p, s: s.mul_(2), "changes source s in place"),
        (lambda p, s: s.copy_(torch.ones(4, 6, dtype=torch.bfloat16)), "changes source s in place"),
        (lambda p, s: p.fill_(s.sum().item()), "failed on a tensor without data, s: "),
        (
            lambda p, s: setattr(p, "data", torch.zeros(4, 6, dtype=torch.bfloat16)),
            "gave parameter layer.w other memory",
        ),
        (lambda p, s: (p.copy_(s), p[:1].fill_(0)), "fills elements of layer.w that it copied a source into"),
    ],
)
def test_what_is_no_copy_of_a_source_is_refused_by_name(act, match) -> None:
    refused(act, match)


def test_a_loader_that_reads_overlapping_windows_is_refused() -> None:
    weight = poisoned(3, 2)
    layout = trace_loader(
        lambda weights: [weight.copy_(s.as_strided((3, 2), (1, 1))) for _, s in weights],
        {"w": weight},
        [source("s", 4)],
    )
    with pytest.raises(UnsupportedLayout, match="w: the loader reads overlapping windows of s"):
        make_plan(chunked(layout.sources, 1), layout)


@pytest.mark.failure_mode(7)
def test_elements_that_the_loader_forgets_are_an_error_naming_the_first_range() -> None:
    weight, other = poisoned(4, 6), poisoned(5)
    with pytest.raises(CoverageError) as caught:
        trace_loader(
            lambda weights: [weight[:, :4].copy_(s[:, :4]) for _, s in weights],
            {"w": weight, "x": other},
            [source("s", 4, 6)],
        )
    cure = "offer the loader the source tensor that it lacks"
    assert str(caught.value) == (
        f"w [4, 6]: 8 of 24 elements are written by nobody, first [4, 6): {cure}; "
        f"x [5]: 5 of 5 elements are written by nobody, first [0, 5): {cure}"
    )


def test_a_parameter_that_two_sources_claim_is_an_error_naming_both() -> None:
    weight = poisoned(4)
    with pytest.raises(CoverageError, match=r"w \[4\]: element 0 is written more than once \(the target gets a, b\)"):
        trace_loader(
            lambda weights: [weight.copy_(s) for _, s in weights], {"w": weight}, [source("a", 4), source("b", 4)]
        )


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    with pytest.raises(CoverageError, match=r"p04.*; and 15 more$") as caught:
        trace_loader(lambda weights: list(weights), {f"p{i:02}": poisoned(1) for i in range(20)}, [])
    assert "p05" not in str(caught.value)


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


def test_a_name_offered_twice_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="sources list a name twice"):
        trace_loader(lambda weights: None, {}, [source("s", 1), source("s", 2)])


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


def test_asked_for_all_faults_a_trace_keeps_what_it_could_follow() -> None:
    """One parameter is traced, the others are named with their reasons; nothing is written to any."""
    params = {name: poisoned(4, 6) for name in ("good", "scaled", "forgotten", "twice", "added")}

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            params["good"].copy_(tensor)
            params["scaled"].copy_(tensor * 2)
            params["twice"].copy_(tensor)
            params["twice"].copy_(tensor)
            params["added"].copy_(tensor)
            params["added"].add_(1)

    faults: dict[str, str] = {}
    layout = trace_loader(load, params, [source("s", 4, 6)], faults=faults)
    assert [target.name for target in layout.targets] == ["good"]
    assert [copy.target for copy in layout.copies] == ["good"]
    assert sorted(faults) == ["added", "forgotten", "scaled", "twice"]
    for name, part in (
        ("scaled", "computed from other tensors"),
        ("forgotten", "written by nobody"),
        ("twice", "more than once"),
        ("added", "aten.add_"),
    ):
        assert part in faults[name]
    assert all((flat_bits(param) == 0x5A5A).all() for param in params.values())
