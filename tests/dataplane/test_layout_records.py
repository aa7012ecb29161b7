"""Records survive the wire, and their digests depend on what they say, not on how it is listed."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib

import pytest

from tests.dataplane.test_plan import attention, experts
from tests.dataplane.toy_models import chunked
from weightsync.errors import PlanError
from weightsync.layout.records import Copy, SourceLayout, SourceTensor, Target, TargetLayout
from weightsync.layout.strides import canonical, is_nested


def test_layouts_survive_the_wire() -> None:
    for toy in (attention(), experts(local=range(2, 4))):
        layout = dataclasses.replace(toy.layout(), meta={"vllm": "0.32.0", "class": "Toy"})
        assert TargetLayout.from_bytes(layout.to_bytes()) == layout
        assert TargetLayout.from_bytes(layout.to_bytes()).digest() == layout.digest()
        for source in chunked(toy.source_tensors(), 3):
            assert SourceLayout.from_bytes(source.to_bytes()) == source


def test_a_rank_that_holds_nothing_survives_the_wire() -> None:
    nothing = SourceLayout(5, (), ())
    assert SourceLayout.from_bytes(nothing.to_bytes()) == nothing


def test_a_record_holds_no_list_that_could_be_changed() -> None:
    layout = TargetLayout.from_bytes(attention().layout().to_bytes())
    assert all(isinstance(c.shape, tuple) and isinstance(c.source_strides, tuple) for c in layout.copies)
    hash(layout.copies)
    hash(layout.targets)


def test_the_digest_ignores_listing_order_and_origin_but_nothing_else() -> None:
    layout = attention().layout()
    turned = dataclasses.replace(
        layout,
        targets=layout.targets[::-1],
        sources=layout.sources[::-1],
        copies=layout.copies[::-1],
        unused=("inv_freq",),
        meta={"platform": "cuda"},
    )
    assert turned.digest() == layout.digest()
    first = layout.copies[0]
    others = [
        dataclasses.replace(layout, copies=(dataclasses.replace(first, **{field: value}), *layout.copies[1:]))
        for field, value in [("source_offset", 1), ("target_offset", 1), ("source_strides", (1, 1)), ("source", "norm")]
    ]
    others.append(dataclasses.replace(layout, fills=(dataclasses.replace(layout.fills[0], value_bits=1),)))
    others.append(dataclasses.replace(layout, targets=(*layout.targets[:-1], Target("z", (1,), "bfloat16"))))
    assert len({layout.digest(), *(other.digest() for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not compressed",
        zlib.compress(b"not json"),
        zlib.compress(b"[]"),
        zlib.compress(b'{"format":1,"kind":"target"}'),
        zlib.compress(
            b'{"format":1,"kind":"source","rank":0,"tensors":[["a"],[[1]],["bfloat16"]],"holdings":[[7],[0],[1],[0]]}'
        ),
    ],
)
def test_bytes_that_are_no_layout_are_refused(data: bytes) -> None:
    for kind in (SourceLayout, TargetLayout):
        with pytest.raises(PlanError):
            kind.from_bytes(data)


def test_another_format_is_refused_with_both_versions() -> None:
    document = json.loads(zlib.decompress(attention().layout().to_bytes()))
    with pytest.raises(PlanError, match=r"have a layout of \(format, kind\) \(2, 'target'\), want \(1, 'target'\)"):
        TargetLayout.from_bytes(zlib.compress(json.dumps({**document, "format": 2}).encode()))


def test_a_holding_without_a_shape_is_refused() -> None:
    layout = chunked(attention().source_tensors(), 1)[0]
    with pytest.raises(PlanError, match="rank 0 holds 'norm', whose shape it does not state"):
        dataclasses.replace(layout, tensors=tuple(t for t in layout.tensors if t.name != "norm")).to_bytes()


def test_the_layout_of_a_30b_model_stays_below_a_megabyte() -> None:
    """18,433 copies, as many expert tensors as Qwen3-30B has: encoded and decoded within seconds."""
    names = [
        f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight"
        for layer in range(48)
        for e in range(128)
        for kind in ("gate", "up", "down")
    ]
    sources = tuple(SourceTensor(name, (768, 2048), "bfloat16") for name in names)
    target = Target("w13", (len(names), 96, 2048), "bfloat16")
    copies = tuple(
        Copy(name, 3 * 96 * 2048, (2048, 1), "w13", i * 96 * 2048, (2048, 1), (96, 2048))
        for i, name in enumerate(names)
    )
    started = time.monotonic()
    data = TargetLayout((target,), sources, copies).to_bytes()
    assert TargetLayout.from_bytes(data).copies == copies
    assert len(data) < 1_000_000
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("shape", "strides", "want"),
    [
        ((), [(), ()], ((), 1)),
        ((4, 0, 3), [(0, 3, 1), (0, 3, 1)], ((), 0)),
        ((4, 6), [(6, 1), (6, 1)], ((), 24)),
        ((4, 6), [(12, 1), (6, 1)], (((4, 12, 6),), 6)),
        ((2, 4, 6), [(24, 6, 1), (48, 6, 1)], (((2, 24, 48),), 24)),
        ((6, 4), [(1, 6), (4, 1)], (((4, 6, 1), (6, 1, 4)), 1)),
        ((3, 5), [(0, 1), (5, 1)], (((3, 0, 5),), 5)),
        ((1, 7, 1), [(99, 2, 99), (99, 1, 99)], (((7, 2, 1),), 1)),
    ],
)
def test_views_are_reduced_to_the_longest_runs_both_sides_have(shape, strides, want) -> None:
    assert canonical(shape, *strides) == want


def test_overlapping_windows_are_told_from_nested_dims() -> None:
    assert is_nested(((4, 12), (2, 6)), 6)
    assert not is_nested(((4, 5),), 6)
    assert not is_nested(((3, 0),), 1)


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (3,)), ((2,), (-1,)), ((-2,), (1,))])
def test_a_view_that_no_tensor_has_is_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="no view has shape"):
        canonical(shape, strides)
