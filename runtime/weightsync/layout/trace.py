"""Learns what an engine wants by watching its own loader: meta tensors in, every `copy_` into a parameter noted, none
performed.

A view of a meta tensor keeps its storage, offset and strides, so any chain of narrow, chunk, view and transpose is
understood without a list of operations. Block scales are real tensors of numbers instead, which a loader may gather and repeat
(`numbered`). What cannot be expressed as a copy is refused by name. Imports torch and the records, not vLLM.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.errors import UnsupportedLayout, WeightSyncError
from weightsync.layout.coverage import coverage_faults, prove_coverage
from weightsync.layout.fills import surviving_fills
from weightsync.layout.forms import SCALE_SUFFIX
from weightsync.layout.numbered import Numbered, is_numbered
from weightsync.layout.records import Copy, Fill, SourceTensor, Target, TargetLayout
from weightsync.layout.table import Axis

_aten = torch.ops.aten
_TRACED_DTYPES = ("bfloat16", "float32", "float8_e4m3fn")
"""What a source may be offered as."""
_PRODUCIBLE = {("float8_e4m3fn", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")}
"""(offered, wanted): a trainer holds the unquantized value, so it can send what the checkpoint does not hold."""


def trace_loader(
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    params: Mapping[str, Tensor],
    sources: Sequence[SourceTensor],
    *,
    faults: MutableMapping[str, str] | None = None,
) -> TargetLayout:
    """Run `load` on tensors of `sources` that have no values and note where each of their elements goes in `params`.

    `params` may be live: nothing is written to them. A source that a parameter wants in another dtype than the checkpoint's is
    offered again in that one where a trainer can produce it; its block scales are then not offered. Raises UnsupportedLayout naming
    the tensor when the loader does what cannot be noted, and CoverageError when an element of a parameter gets no value, or two.
    With `faults`, a parameter of which that is so is left out of the layout, and the reason noted there under its name.
    """
    return _record(load, params, sources, faults).layout()


@dataclasses.dataclass(frozen=True)
class Followed:
    """A loader, followed as far as that goes."""

    layout: TargetLayout
    """Of the parameters that can be written directly."""
    faults: Mapping[str, str]
    """Why not, for each other parameter."""
    feeds: Mapping[str, tuple[SourceTensor, ...]]
    """The sources, in the dtype that a parameter wants, that the loader was given when it wrote into each parameter."""


def follow_loader(
    load: Callable[[Iterable[tuple[str, Tensor]]], Any], params: Mapping[str, Tensor], sources: Sequence[SourceTensor]
) -> Followed:
    """As `trace_loader` with faults; also tells what each parameter is made from, whether it can be followed or not."""
    faults: dict[str, str] = {}
    recorder = _record(load, params, sources, faults)
    layout = recorder.layout()
    feeds = {name: tuple(recorder.sources[source] for source in sorted(fed)) for name, fed in recorder.feeds.items()}
    return Followed(layout, faults, feeds)


def _record(
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    params: Mapping[str, Tensor],
    sources: Sequence[SourceTensor],
    faults: MutableMapping[str, str] | None,
) -> _Recorder:
    """What the loader did when each source was offered in the dtype that its parameter wants."""
    offered = {source.name: source for source in sources}
    if len(offered) != len(sources):
        raise UnsupportedLayout("sources list a name twice: offer each checkpoint tensor once")
    recorder = _watch(load, params, list(offered.values()), faults)
    if recorder.wanted:
        for name, dtype in recorder.wanted.items():
            offered[name] = dataclasses.replace(offered[name], dtype=dtype)
            offered.pop(name + SCALE_SUFFIX, None)
        if faults is not None:
            faults.clear()
        recorder = _watch(load, params, list(offered.values()), faults)
    recorder.check_storage(params)
    return recorder


def _watch(
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    params: Mapping[str, Tensor],
    sources: Sequence[SourceTensor],
    faults: MutableMapping[str, str] | None,
) -> _Recorder:
    recorder = _Recorder(params, sources, faults)
    try:
        with recorder:
            load(recorder.offer())
    except WeightSyncError:
        raise
    except Exception as error:
        raise UnsupportedLayout(
            f"the loader failed on a tensor without data, {recorder.offered or 'before it took any'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return recorder


class _Parameters:
    """Finds the parameter that a view lies in, also where several share one storage."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.by_storage: dict[int, list[tuple[int, int, str]]] = {}
        self.targets: dict[str, Target] = {}
        for name in sorted(params):
            self._add(name, params[name])
        for spans in self.by_storage.values():
            spans.sort()
            for (_, stop, one), (start, _, other) in itertools.pairwise(spans):
                if start < stop:
                    raise UnsupportedLayout(
                        f"parameters {one} and {other} overlap in memory without being the same tensor"
                    )

    def _add(self, name: str, param: Tensor) -> None:
        if not param.is_contiguous():
            raise UnsupportedLayout(
                f"parameter {name} {list(param.shape)} is not contiguous (strides {param.stride()}): "
                "its kernel does not keep the load format"
            )
        if param.numel() == 0:
            return
        spans = self.by_storage.setdefault(_storage(param), [])
        start = int(param.storage_offset())
        stop = start + param.numel()
        if not any((start, stop) == known[:2] for known in spans):
            spans.append((start, stop, name))
            self.targets[name] = Target(name, tuple(param.shape), _dtype(param))

    def find(self, view: Tensor) -> tuple[str, int] | None:
        """(name, first element) of the parameter that a view begins in, or None."""
        spans = self.by_storage.get(_storage(view))
        if spans is None:
            return None
        at = int(view.storage_offset())
        start, stop, name = spans[max(0, bisect.bisect_right(spans, at, key=lambda span: span[0]) - 1)]
        return (name, at - start) if start <= at < stop else None


class _Recorder(TorchDispatchMode):
    """Notes `copy_`, `fill_` and `zero_` on parameters and performs none; refuses every other change of one."""

    def __init__(
        self, params: Mapping[str, Tensor], sources: Sequence[SourceTensor], faults: MutableMapping[str, str] | None
    ) -> None:
        super().__init__()
        self._faults = faults
        self.parameters = _Parameters(params)
        self.copies: list[Copy] = []
        self.fills: list[tuple[Fill, int]] = []
        """Each with the number of copies that came before it."""
        self.wanted: dict[str, str] = {}
        """Sources that parameters want in another dtype than they were offered in, which a trainer can send."""
        self.feeds: dict[str, set[str]] = defaultdict(set)
        """The sources that were offered when each parameter was written to."""
        self.offered = ""
        self.sources = {source.name: source for source in sources}
        self._numbered = Numbered(sources)
        self._tensors: list[Tensor] = []
        """Kept until the end, so that a storage's identity stays that of its source."""
        self._source_of: dict[int, str] = {}

    def offer(self) -> Iterator[tuple[str, Tensor]]:
        """What the loader iterates over."""
        for name, source in self.sources.items():
            tensor = self._numbered.offer(source) if is_numbered(source) else _meta_tensor(source)
            self._tensors.append(tensor)
            self._source_of[_storage(tensor)] = self.offered = name
            yield name, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten.copy_.default and self._note_copy(args[0], args[1]):
            return args[0]
        filling = func in (_aten.fill_.Scalar, _aten.zero_.default)
        if filling and (found := self.parameters.find(args[0])) is not None:
            view, *value = args
            self._note_fill(view, found, *(value or (0,)))
            return view
        unchanged = self._refuse_other_changes(func, args, kwargs or {})
        if unchanged is not None:
            return unchanged
        result = func(*args, **(kwargs or {}))
        self._numbered.follow(func, args, result)
        return result

    def _note_copy(self, into: Tensor, view: Tensor) -> bool:
        """True when there is nothing left to do; False when it touches neither a source nor a parameter."""
        if into.numel() == 0:
            return True
        source, found = self._source_of.get(_storage(view)), self.parameters.find(into)
        if found is not None:
            self.feeds[found[0]] |= {self.offered if source is None else source}
        if source is None:
            return self._note_other(into, view, found)
        if found is None:
            return self._note_scratch(into, source)
        name, offset = found
        want, have = self.parameters.targets[name].dtype, self.sources[source].dtype
        if (have, want) in _PRODUCIBLE and want == _dtype(into) and have == _dtype(view):
            self._want(source, want)
            return True
        if not want == have == _dtype(into) == _dtype(view):
            return self._fault(
                name,
                f"parameter {name} is {want} (copied as {_dtype(into)}), but {source} is offered as {have} "
                f"(copied as {_dtype(view)}): a push does not change the dtype",
            )
        view = view.expand(into.shape)
        self.copies.append(
            Copy(source, int(view.storage_offset()), view.stride(), name, offset, into.stride(), tuple(into.shape))
        )
        return True

    def _note_scratch(self, into: Tensor, source: str) -> bool:
        """As `_note_copy`, for a source that is copied into a tensor which is no parameter."""
        if is_numbered(self.sources[source]):
            self._numbered.receive(into)
            return False
        raise UnsupportedLayout(
            f"{source} is copied into a tensor {list(into.shape)} that is no parameter (a buffer or a scratch "
            "tensor): it cannot be written remotely"
        )

    def _note_other(self, into: Tensor, view: Tensor, found: tuple[str, int] | None) -> bool:
        """As `_note_copy`, for a view of no source: block scales that the loader gathered, or what it computed."""
        numbers = self._numbered.holds(view)
        if found is None:
            if numbers:
                self._numbered.receive(into)
            return False
        name, offset = found
        if not numbers:
            origin = "computed from other tensors" if view.device.type == "meta" else "with data of its own"
            return self._fault(
                name,
                f"parameter {name} is copied from a {view.dtype} tensor {list(view.shape)} {origin}, "
                "not from a view of a source",
            )
        want = self.parameters.targets[name].dtype
        if not want == _dtype(into) == _dtype(view):
            return self._fault(name, f"parameter {name} is {want}, but its scales are copied as {_dtype(view)}")
        origins = self._numbered.origins(view.expand(into.shape))
        if origins is None:
            return self._fault(name, f"parameter {name} gets block scales that the loader mixed with values of its own")
        for source, start, box in origins:
            self.feeds[name].add(source)
            place = offset + sum(at * stride for at, stride in zip(box.at, into.stride(), strict=True))
            strides = tuple(places * into.stride(dim) for dim, places in box.steps)
            self.copies.append(Copy(source, start, box.strides, name, place, strides, box.shape))
        return True

    def _fault(self, name: str, message: str) -> bool:
        """Parameter `name` cannot be written remotely: an error, or noted and left alone. Always True."""
        if self._faults is None:
            raise UnsupportedLayout(message)
        self._faults.setdefault(name, message)
        return True

    def _want(self, source: str, dtype: str) -> None:
        if self.wanted.setdefault(source, dtype) != dtype:
            raise UnsupportedLayout(
                f"parameters want {source} as {self.wanted[source]} and as {dtype}: a push sends it in one dtype"
            )

    def _note_fill(self, view: Tensor, found: tuple[str, int], value: Any) -> None:
        name, offset = found
        if view.numel():
            fill = Fill(name, offset, view.stride(), tuple(view.shape), _bits(value, view.dtype))
            self.fills.append((fill, len(self.copies)))

    def _refuse_other_changes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The parameter that the operator would have changed, when that is noted as its fault instead of an error."""
        for i, argument in written_arguments(func):
            value = args[i] if i < len(args) else kwargs.get(argument)
            if not isinstance(value, Tensor):
                continue
            if (found := self.parameters.find(value)) is not None:
                self.feeds[found[0]].add(self.offered)
                self._fault(
                    found[0],
                    f"the loader changes parameter {found[0]} with {func} (at source {self.offered}): "
                    "only copy_, fill_ and zero_ can be noted",
                )
                return value
            if (source := self._source_of.get(_storage(value))) is not None:
                raise UnsupportedLayout(
                    f"the loader changes source {source} in place with {func}: the trainer's values would stay"
                )
        return None

    def check_storage(self, params: Mapping[str, Tensor]) -> None:
        """Raises UnsupportedLayout when a parameter was given other memory meanwhile (`param.data = ...`)."""
        for name in self.parameters.targets:
            if self.parameters.find(params[name]) != (name, 0):
                raise UnsupportedLayout(
                    f"the loader gave parameter {name} other memory: what was offered to writers would be stale"
                )

    def layout(self) -> TargetLayout:
        """The record, with coverage proved."""
        if self._faults is not None:
            whole = self._layout_without(self._faults)
            self._faults.update(coverage_faults(whole, Axis(whole.targets)))
        layout = self._layout_without(self._faults or ())
        prove_coverage(layout, Axis(layout.targets))
        return layout

    def _layout_without(self, faulty: Container[str]) -> TargetLayout:
        copies = tuple(copy for copy in self.copies if copy.target not in faulty)
        fills = [entry for entry in self.fills if entry[0].target not in faulty]
        targets = tuple(target for target in self.parameters.targets.values() if target.name not in faulty)
        used = {copy.source for copy in copies}
        return TargetLayout(
            targets=targets,
            sources=tuple(source for name, source in self.sources.items() if name in used),
            copies=copies,
            fills=surviving_fills(fills, copies, Axis(targets)),
            unused=tuple(name for name in self.sources if name not in used),
        )


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operator changes in place."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _meta_tensor(source: SourceTensor) -> Tensor:
    if source.dtype not in _TRACED_DTYPES:
        raise UnsupportedLayout(
            f"source {source.name} is {source.dtype}: only {', '.join(_TRACED_DTYPES)} can be pushed"
        )
    return torch.empty(source.shape, dtype=getattr(torch, source.dtype), device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(value: Any, dtype: torch.dtype) -> int:
    """Bit pattern of `value` as an element of `dtype`."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    element = torch.tensor(value, dtype=dtype)
    width = element.element_size()
    return int(element.view(integers[width]).item()) & ((1 << (8 * width)) - 1)
