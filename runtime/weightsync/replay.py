"""What a push cannot write directly: checkpoint tensors as targets of their own, and the ledger of loading them.

A kernel that repacks weights, or a loader that computes with them, leaves nothing that bytes in load format could be written to.
Such modules are replayed: the checkpoint's tensors land in staging under their own names, and the engine's own loader makes the
module of them. A loader that misses a tensor says nothing, and what it did not write is whatever memory held: so every element is
counted, before anything live changes (failure mode 54). Imports torch and the records, never vLLM.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.errors import CoverageError, UnsupportedLayout
from weightsync.layout.coverage import listed, target_ranges
from weightsync.layout.records import Copy, Shape, SourceTensor, Target, TargetLayout
from weightsync.layout.table import Axis
from weightsync.layout.trace import written_arguments

PREFIX = "load:"
"""Begins the name of a target that is a checkpoint tensor in load format; no parameter has a colon in its name."""

View = tuple[str, int, Shape, Shape]
"""(tensor, first element, strides, shape)"""


class Replay(Protocol):
    """The modules of one engine rank that are loaded anew by each push."""

    @property
    def staged(self) -> Mapping[str, Tensor]:
        """Where writers write, by target name: a checkpoint tensor in load format each."""
        ...

    @property
    def memory(self) -> Tensor:
        """[length_bytes] uint8 that has all of them, to be registered as a whole."""
        ...

    def prepare(self, wanted: Callable[[], bool]) -> None:
        """Make the modules of what is staged, beside the live ones, which may serve meanwhile, as long as it is `wanted`.

        Raises CoverageError when the loader left an element out, PushAborted when it is not wanted: nothing live has changed then.
        """
        ...

    def apply(self) -> Mapping[str, int]:
        """Copy what was prepared into live memory, at its addresses, while the engine is paused; returns its digests."""
        ...

    def measure(self) -> Mapping[str, int]:
        """Digests of the live memory that `apply` writes, as it is now."""
        ...

    def retire(self) -> None:
        """Give `memory` back, its addresses sealed, and stage elsewhere from now on."""
        ...


def target_of(source: str) -> str:
    """Name of the target that takes a checkpoint tensor in load format."""
    return PREFIX + source


def with_replayed(direct: TargetLayout, sources: Iterable[SourceTensor]) -> TargetLayout:
    """The layout `direct` with a target more for each of these sources, which a push brings as they are."""
    added = sorted({source.name: source for source in sources}.values(), key=lambda source: source.name)
    known = {source.name: source for source in direct.sources}
    for source in added:
        if known.setdefault(source.name, source) != source:
            raise UnsupportedLayout(
                f"{source.name} is wanted as {known[source.name].dtype} by a parameter that is written directly and as "
                f"{source.dtype} by a module that is replayed: a push sends it in one dtype"
            )
    targets = tuple(Target(target_of(source.name), source.shape, source.dtype) for source in added)
    copies = tuple(Copy(s.name, 0, (1,), target_of(s.name), 0, (1,), (s.numel,)) for s in added)
    return dataclasses.replace(
        direct,
        targets=direct.targets + targets,
        sources=tuple(known.values()),
        copies=direct.copies + copies,
        unused=tuple(name for name in direct.unused if name not in known),
    )


@dataclasses.dataclass(frozen=True)
class Count:
    """Elements of a load: written of each parameter, read of each source; one that was met twice counts once."""

    written: Mapping[str, int]
    read: Mapping[str, int]


def require_complete(expected: Count, found: Count, module: str) -> None:
    """Raise CoverageError naming every parameter and source of which other than the expected elements were written or read."""
    faults = [
        f"{name}: {other.get(name, 0)} of {count} elements {word}"
        for word, one, other in (("written", expected.written, found.written), ("read", expected.read, found.read))
        for name, count in sorted(one.items())
        if other.get(name, 0) != count
    ]
    if faults:
        raise CoverageError(f"{module} was replayed in part ({listed(faults)}): live memory is as it was")


class LoadWatch(TorchDispatchMode):
    """Counts what a loader writes of `params` and reads of `sources`, and lets it; refuses a change of what is `kept`.

    params, sources: contiguous tensors by name, which do not overlap; looked at in their own dtype only.
    Raises UnsupportedLayout, before the change, from the operation that would change a storage of `kept`.
    """

    def __init__(
        self, params: Mapping[str, Tensor], sources: Mapping[str, Tensor], kept: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self._params, self._sources = _Spans(params), _Spans(sources)
        self._kept = kept
        self.changed: set[int] = set()
        """Storages of all tensors that were changed in place."""

    def count(self) -> Count:
        """Of all that happened so far."""
        return Count(self._params.count(), self._sources.count())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [
            value
            for i, name in written_arguments(func)
            for value in _tensors(args[i] if i < len(args) else kwargs.get(name))
        ]
        for tensor in written:
            if storage_of(tensor) in self._kept:
                raise UnsupportedLayout(
                    f"{func} would change a tensor {list(tensor.shape)} that the engine computes with"
                )
        result = func(*args, **kwargs)
        for tensor in written:
            self.changed.add(storage_of(tensor))
            self._params.note(tensor)
        if not _is_view(func):
            changed = {id(tensor) for tensor in written}
            for tensor in _tensors([*args, *kwargs.values()]):
                if id(tensor) not in changed:
                    self._sources.note(tensor)
        return result


class _Spans:
    """Which elements of some tensors were met; several may lie one behind the other in a storage."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._kept = dict(tensors)  # a storage's identity is its own as long as the storage is there
        self._spans: dict[int, list[tuple[int, str]]] = defaultdict(list)
        """First byte and name of each tensor, by storage."""
        for name, tensor in tensors.items():
            self._spans[storage_of(tensor)].append((_first_byte(tensor), name))
        for spans in self._spans.values():
            spans.sort()
        self._axis = Axis([Target(name, tuple(t.shape), "") for name, t in tensors.items()])
        self._views: dict[str, list[View]] = defaultdict(list)

    def note(self, view: Tensor) -> None:
        spans = self._spans.get(storage_of(view))
        if not spans or not view.numel():
            return
        first = _first_byte(view)
        at, name = spans[max(0, bisect.bisect_right(spans, first, key=lambda span: span[0]) - 1)]
        if at <= first < at + self._kept[name].nbytes:
            dims = [(n, stride) for n, stride in zip(view.shape, view.stride(), strict=True) if stride]
            shape, strides = tuple(n for n, _ in dims), tuple(stride for _, stride in dims)
            self._views[name].append((name, (first - at) // view.element_size(), strides, shape))

    def count(self) -> dict[str, int]:
        return {name: _union(*target_ranges(self._axis, views)) for name, views in self._views.items()}


def _first_byte(tensor: Tensor) -> int:
    """Where in its storage a tensor begins."""
    return int(tensor.storage_offset()) * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage, for as long as it lives."""
    return tensor.untyped_storage()._cdata


def _union(start: np.ndarray, stop: np.ndarray) -> int:
    """Elements that lie in any of these ranges."""
    order = np.argsort(start, kind="stable")
    start, stop = start[order], stop[order]
    reached = np.concatenate([[0], np.maximum.accumulate(stop)[:-1]])
    return int(np.maximum(stop - np.maximum(start, reached), 0).sum())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _tensors(each)


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at its argument's memory in another way."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
