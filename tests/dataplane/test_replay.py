"""Checkpoint tensors as targets, and the count of what a loader does with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.dataplane.toy_models import Toy, chunked, execute
from weightsync.errors import CoverageError, UnsupportedLayout
from weightsync.layout.records import SourceTensor
from weightsync.layout.trace import follow_loader
from weightsync.plan import make_plan
from weightsync.replay import Count, LoadWatch, require_complete, storage_of, target_of, with_replayed


def stacked() -> Toy:
    """A parameter that two sources are stacked into."""
    toy = Toy()
    toy.param("up", 6, 4)
    for i, name in enumerate(("a", "b")):
        toy.copy(toy.source(name, 3, 4), "up", lambda p, i=i: p.narrow(0, 3 * i, 3))
    return toy


def test_staged_sources_are_targets_like_any_other() -> None:
    """A plan from three ranks brings each of them, whole, beside the parameter that is written directly."""
    toy = stacked()
    extra = SourceTensor("scalar", (), "bfloat16")
    layout = with_replayed(toy.layout(), [*toy.source_tensors()[:1], extra])
    assert {t.name for t in layout.targets} == {"up", target_of("a"), target_of("scalar")}
    weights = {**toy.weights(), "scalar": torch.tensor(3.5, dtype=torch.bfloat16)}
    targets = {t.name: torch.zeros(t.shape, dtype=torch.bfloat16) for t in layout.targets}
    sources = [*toy.source_tensors()]
    layouts = chunked([*sources, SourceTensor("scalar", (1,), "bfloat16")], 3)
    layouts = [type(one)(one.rank, (*sources, extra), one.holdings) for one in layouts]
    execute(make_plan(layouts, layout), layouts, weights, targets)
    assert torch.equal(targets[target_of("a")].view(torch.int16), weights["a"].view(torch.int16))
    assert targets[target_of("scalar")] == 3.5


def test_a_source_is_sent_in_one_dtype() -> None:
    with pytest.raises(UnsupportedLayout, match=r"a is wanted as bfloat16 by .* and as float32"):
        with_replayed(stacked().layout(), [SourceTensor("a", (3, 4), "float32")])


def count(toy: Toy, weights: dict[str, torch.Tensor]) -> Count:
    with LoadWatch(toy.params, weights) as watch:
        toy.load(weights.items())
    return watch.count()


@pytest.mark.failure_mode(54)
def test_a_load_that_misses_a_tensor_or_a_part_of_one_is_refused() -> None:
    """Seen to fail with `require_complete` returning at once."""
    toy = stacked()
    whole = count(toy, toy.weights())
    assert whole == Count({"up": 24}, {"a": 12, "b": 12})
    require_complete(whole, count(toy, toy.weights()), "layer")
    partly = stacked()
    missing = toy.weights()
    del missing["b"]
    with pytest.raises(
        CoverageError, match=r"layer was replayed in part \(up: 12 of 24 elements written; b: 0 of 12 .* read"
    ):
        require_complete(whole, count(partly, missing), "layer")
    partly.steps["b"] = [("up", lambda p: p.narrow(0, 3, 2), lambda t: t[1:])]
    with pytest.raises(CoverageError, match=r"up: 20 of 24 elements written; b: 8 of 12 elements read"):
        require_complete(whole, count(partly, toy.weights()), "layer")


def test_what_is_written_twice_counts_once_and_arithmetic_counts_as_a_read() -> None:
    weight, scale = nn.Parameter(torch.empty(4, 4)), torch.empty(4)
    staged = torch.randn(20)
    source = {"w": staged[:16].view(4, 4), "s": staged[16:]}
    with LoadWatch({"weight": weight, "scale": scale}, source) as watch, torch.no_grad():
        weight.data.copy_(source["w"].t())
        weight.data[:2].mul_(2)
        scale.copy_(source["s"][1:3].exp().sum().expand(4))
    assert watch.count() == Count({"weight": 16, "scale": 4}, {"w": 16, "s": 2})


@pytest.mark.failure_mode(54)
def test_a_loader_that_would_write_live_memory_is_stopped_before_it_does() -> None:
    live = torch.zeros(4)
    with (
        pytest.raises(UnsupportedLayout, match="that the engine computes with"),
        LoadWatch({}, {}, frozenset({storage_of(live)})),
    ):
        live[1:].copy_(torch.ones(3))
    assert not live.any()


def test_a_parameter_that_cannot_be_followed_is_told_with_its_sources() -> None:
    """What is computed of `a` is a fault; `b` is followed; a computed value counts for the source that was offered then."""
    a, b = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)

    def load(weights):
        for name, tensor in weights:
            if name == "a":
                a.copy_(tensor * 2)
            else:
                b.copy_(tensor)

    sources = [SourceTensor(name, (4,), "bfloat16") for name in ("a", "b")]
    followed = follow_loader(load, {"pa": a, "pb": b}, sources)
    assert [t.name for t in followed.layout.targets] == ["pb"]
    assert "computed from other tensors" in followed.faults["pa"]
    assert followed.feeds == {"pa": (sources[0],), "pb": (sources[1],)}
