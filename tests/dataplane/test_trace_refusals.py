"""What a loader's trace cannot follow it refuses by name, and leaves the parameters alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.dataplane.toy_models import Weights, chunked, flat_bits, poisoned, source
from weightsync.errors import CoverageError, UnsupportedLayout
from weightsync.layout.trace import trace_loader
from weightsync.plan import make_plan


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


def test_a_name_offered_twice_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="sources list a name twice"):
        trace_loader(lambda weights: None, {}, [source("s", 1), source("s", 2)])


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
