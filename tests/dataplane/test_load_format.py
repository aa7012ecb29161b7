"""An engine's parameter is written directly only where a full reload would leave the same: of toy modules, without vLLM."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weightsync.errors import CoverageError, UnsupportedLayout
from weightsync.layout.records import SourceTensor
from weightsync.replay import target_of
from weightsync.vllm import kernels
from weightsync.vllm.kernels import Kernel
from weightsync.vllm.offer import Offer, make_offer

SOURCES = ("a", "b", "norm")


class Method:
    """A quantization method that leaves weights alone."""

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...


class Reversing(Method):
    """Shuffles rows, to the same size."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = nn.Parameter(layer.weight.data.flip(0).contiguous(), requires_grad=False)


class Caching(Method):
    """Keeps an fp32 copy in an attribute, and one that only a closure reaches."""

    def process_weights_after_loading(self, layer: Any) -> None:
        copied = layer.weight.data.float()
        layer.cache = {"fp32": [copied]}
        hidden = layer.weight.data * 2
        layer.compute = lambda x: x @ hidden.t()


class Rounding(Method):
    """Makes scales powers of two, as DeepGEMM does with E8M0: the loaded ones already are, those of a later push are not."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data.copy_(layer.weight.data.float().abs().log2().ceil().exp2())


class Deriving(Reversing):
    """Computes a buffer of the weights, in place."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        if hasattr(layer, "peak"):
            layer.peak.copy_(layer.weight.data.float().abs().amax(1))


class Linear(nn.Module):
    """Two sources stacked into one parameter."""

    def __init__(self, method: Method | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16), requires_grad=False)
        self.quant_method = method


class Model(nn.Module):
    """`lost` names sources that its loader silently leaves out."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.up, self.norm = Linear(method), nn.Module()
        self.norm.weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
        self.lost: set[str] = set()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name in self.lost:
                continue
            if name == "norm":
                self.norm.weight.data.copy_(tensor)
            else:
                self.up.weight.data[{"a": slice(3), "b": slice(3, 6)}[name]].copy_(tensor)


def weights_of(seed: int) -> dict[str, Tensor]:
    """Powers of two for seed 0, as a checkpoint whose scales round to themselves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (3, 4), "norm": (4,)}
    if seed == 0:
        return {n: torch.randint(-3, 3, s, generator=generator).float().exp2().bfloat16() for n, s in shapes.items()}
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Offer]]:
    """A loaded model whose method is, or is not, on the allow-list, and what of it is offered."""
    save_file(weights_of(0), tmp_path / "model.safetensors")
    sources = [SourceTensor(n, tuple(t.shape), "bfloat16") for n, t in weights_of(0).items()]

    def load(method: Method, *, listed: bool = True, buffers: bool = False) -> tuple[Model, Callable[[], Offer]]:
        model = fresh(method, 0, buffers=buffers)
        if listed:
            monkeypatch.setitem(kernels.DIRECT, Kernel(type(method).__name__, "torch"), "test")
        return model, functools.partial(make_offer, model, sources, str(tmp_path))

    return load


def replay(offer: Offer, seed: int, *, serve: Callable[[], Any] = lambda: None) -> None:
    """Bring other weights, as a push does: in place of what is written directly, into staging of what is not.

    serve: what the engine does until the commit.
    """
    assert offer.replay is not None
    for name, tensor in weights_of(seed).items():
        if name != "norm":
            offer.replay.staged[target_of(name)].copy_(tensor)
    offer.params["norm.weight"].copy_(weights_of(seed)["norm"])
    offer.replay.prepare(lambda: True)
    serve()
    offer.replay.apply()


def fresh(method: Method, seed: int, *, buffers: bool = False) -> Any:
    """Loaded and processed; with `buffers` for what a method derives of the weights, and for what a forward counts."""
    model = Model(method)
    if buffers:
        model.up.register_buffer("peak", torch.zeros(6))
        model.up.register_buffer("steps", torch.zeros((), dtype=torch.int32))
    model.load_weights(weights_of(seed).items())
    method.process_weights_after_loading(model.up)
    return model


def test_parameters_as_loaded_are_written_directly_and_the_probe_leaves_them_alone(make: Callable[..., Any]) -> None:
    model, offer_of = make(Method())
    offer = offer_of()
    assert (offer.reasons, offer.replay, offer.replayed_bytes) == ({}, None, 0)
    assert sorted(offer.params) == ["norm.weight", "up.weight"]
    assert torch.equal(model.up.weight, torch.cat([weights_of(0)["a"], weights_of(0)["b"]]))


def test_a_kernel_that_is_not_on_the_list_is_replayed_though_it_keeps_the_layout(make: Callable[..., Any]) -> None:
    _, offer_of = make(Method(), listed=False)
    offer = offer_of()
    assert offer.reasons == {"up": "Method on torch is not known to compute with weights as they are loaded"}
    assert sorted(target.name for target in offer.layout.targets) == ["load:a", "load:b", "norm.weight"]
    assert offer.replayed_bytes == 2 * 24


@pytest.mark.failure_mode(3)
@pytest.mark.failure_mode(53)
@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Reversing(), "up.weight is not as it was loaded"),
        (Caching(), "a reload leaves up.cache.fp32.0 otherwise than a direct write"),
        (Rounding(), "a reload leaves up.weight otherwise than a direct write"),
    ],
)
def test_a_listed_kernel_that_the_probe_disproves_is_replayed(
    make: Callable[..., Any], method: Method, why: str
) -> None:
    """1. the reason names the tensor; 2. addresses stay; 3. every tensor is what a fresh load of other weights has.

    Seen to fail, offering a direct write, with `repacked` empty (Reversing) and with `differs_from_reload` returning nothing
    (Caching, and Rounding: the loaded scales are powers of two, so that only other values show what is done to them).
    """
    model, offer_of = make(method)
    offer = offer_of()
    assert [(name, reason.startswith(why)) for name, reason in offer.reasons.items()] == [("up", True)]
    address = model.up.weight.data_ptr()
    replay(offer, 5)
    wanted = fresh(method, 5)
    assert model.up.weight.data_ptr() == address
    assert torch.equal(model.up.weight, wanted.up.weight)
    if hasattr(wanted.up, "cache"):
        assert torch.equal(model.up.cache["fp32"][0], wanted.up.cache["fp32"][0])
        assert torch.equal(model.up.compute(torch.eye(4).bfloat16()), wanted.up.compute(torch.eye(4).bfloat16()))


@pytest.mark.failure_mode(54)
def test_a_replay_in_part_is_refused_and_live_memory_is_untouched(make: Callable[..., Any]) -> None:
    """One source of two is left out by the loader, which says nothing. Seen to fail with `require_complete` returning at once:
    half of the parameter is then poison.
    """
    model, offer_of = make(Reversing())
    offer = offer_of()
    before, digests = model.up.weight.clone(), offer.replay.measure()
    offer.replay._model.model.lost.add("b")
    with pytest.raises(
        CoverageError, match=r"up was replayed in part \(up.weight: 12 of 24 elements written; b: 0 of 12"
    ):
        replay(offer, 5)
    assert torch.equal(model.up.weight, before)
    assert offer.replay.measure() == digests


@pytest.mark.failure_mode(54)
def test_a_replay_leaves_alone_what_neither_loading_nor_processing_made(make: Callable[..., Any]) -> None:
    """A staged engine serves between `prepare` and `apply`, and its forward may count in a buffer of a replayed module.

    1. a buffer that processing derives of the weights, in place, is that of a fresh load; 2. one that only a forward changes
    keeps what the forward made of it; 3. nor is it measured. Seen to fail with every buffer of the copy carried over: the
    count was put back to what it was before the forward.
    """
    model, offer_of = make(Deriving(), buffers=True)
    offer = offer_of()
    digests = offer.replay.measure()
    model.up.steps += 1
    assert offer.replay.measure() == digests
    replay(offer, 5, serve=lambda: model.up.steps.add_(1))
    wanted = fresh(Deriving(), 5, buffers=True)
    assert torch.equal(model.up.weight, wanted.up.weight)
    assert torch.equal(model.up.peak, wanted.up.peak)
    assert model.up.steps == 2


@pytest.mark.failure_mode(54)
def test_processing_that_makes_other_tensors_than_for_the_checkpoint_is_refused(make: Callable[..., Any]) -> None:
    """A buffer that is derived of some weights only: left out, it would be that of the old ones."""
    model, offer_of = make(Deriving(), buffers=True)
    offer = offer_of()
    before = model.up.weight.clone()
    offer.replay._model.modules["up"].quant_method = Reversing()
    with pytest.raises(
        CoverageError, match=r"up: the checkpoint's load made up.peak, up.weight, this one made up.weight"
    ):
        replay(offer, 5)
    assert torch.equal(model.up.weight, before)


@pytest.mark.failure_mode(7)
def test_what_no_reload_can_make_is_refused_by_name(make: Callable[..., Any]) -> None:
    model, offer_of = make(Reversing())
    model.up.weight.data[0, 0] += 1
    with pytest.raises(
        UnsupportedLayout, match=r"1 modules can neither be written nor replayed: up \(up.weight is not as"
    ):
        offer_of()


@pytest.mark.failure_mode(7)
def test_a_parameter_that_the_checkpoint_lacks_is_refused_by_name(make: Callable[..., Any]) -> None:
    model, offer_of = make(Method())
    model.norm.bias = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
    with pytest.raises(UnsupportedLayout, match=r"norm.bias \[4\]: 4 of 4 elements are written by nobody"):
        offer_of()


def test_modules_that_share_a_parameter_are_replayed_together(make: Callable[..., Any]) -> None:
    """The norm's weight is also the bias of the module that is replayed: it is no target of its own."""
    model, offer_of = make(Reversing())
    model.up.bias = model.norm.weight
    offer = offer_of()
    assert offer.reasons["norm"] == "it shares up.bias with up"
    assert [target.name for target in offer.layout.targets if not target.name.startswith("load:")] == []


def test_the_allow_list_is_the_documented_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()
    rows = re.findall(
        r"^\| `(.+)` \| `(.+)` \| (.+) \|$", text.split("kernels.DIRECT")[1].split("<!-- end -->")[0], re.MULTILINE
    )
    assert {Kernel(method, backend): where for method, backend, where in rows} == kernels.DIRECT
