"""The records that a plan is made of. They travel as JSON between trainer ranks and engines, hold no tensor and no
address.

Offsets, strides and lengths count elements, never bytes. A tensor is addressed by its row-major linear element index.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

from weightsync.errors import PlanError

FORMAT = 1
"""Version of the encoded records; a reader refuses any other."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
"""Bytes of one element of each dtype that a record may name."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SourceTensor:
    """A checkpoint tensor that the trainer can produce, under the checkpoint's name."""

    name: str
    shape: Shape
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A parameter of an engine: contiguous, elements in storage order."""

    name: str
    shape: Shape
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """A rank holds elements [start, stop) of tensor `name`, from element `local_offset` of its slot arena on.

    The arena counts in elements of the tensor's dtype: what has 4 bytes an element begins at byte 4 * local_offset.
    """

    name: str
    start: int
    stop: int
    local_offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """One `copy_` of the loader: `shape` elements of a source view become the same elements of a target view."""

    source: str
    source_offset: int
    source_strides: Shape
    target: str
    target_offset: int
    target_strides: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Fill:
    """Elements of a target that no source touches and the loader set to one value (vocabulary padding).

    A trace records contiguous ranges only: strides (1,) and shape (length,).
    """

    target: str
    offset: int
    strides: Shape
    shape: Shape
    value_bits: int
    """The element's bit pattern as an unsigned integer of the target's width."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class SourceLayout:
    """What one trainer rank holds, and the whole shapes of the tensors that it holds something of."""

    rank: int
    tensors: tuple[SourceTensor, ...]
    holdings: tuple[Holding, ...]

    def to_bytes(self) -> bytes:
        """Compressed JSON, smaller than a tenth of its text."""
        index = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        try:
            holdings = [[index[h.name], h.start, h.stop, h.local_offset] for h in self.holdings]
        except KeyError as error:
            raise PlanError(
                f"rank {self.rank} holds {error}, whose shape it does not state: list it in `tensors`"
            ) from error
        return _pack(
            {
                "kind": "source",
                "rank": self.rank,
                "tensors": _columns([[t.name, t.shape, t.dtype] for t in self.tensors]),
                "holdings": _columns(holdings),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises PlanError when `data` is no source layout of this FORMAT."""
        with _decoding(data, "source") as document:
            tensors = tuple(
                SourceTensor(name, tuple(shape), dtype) for name, shape, dtype in _rows(document["tensors"])
            )
            holdings = tuple(Holding(tensors[i].name, *numbers) for i, *numbers in _rows(document["holdings"]))
            return cls(rank=document["rank"], tensors=tensors, holdings=holdings)


@dataclasses.dataclass(frozen=True)
class TargetLayout:
    """What one engine rank wants: its parameters, and which source element each of their elements comes from."""

    targets: tuple[Target, ...]
    sources: tuple[SourceTensor, ...]
    """The source tensors that `copies` name, with the shapes that the engine expects."""
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...] = ()
    unused: tuple[str, ...] = ()
    """Offered sources that the loader took nothing from (rotary inv_freq, experts of other ranks)."""
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where the layout was learnt: vLLM's version, platform, model class. Not part of the digest."""
    derived_from: str = ""
    """Digest of all that this layout was made of, where it was made of another one: it stands for its contents. Does not travel."""

    @cached_property
    def numel(self) -> int:
        """Elements of all targets together."""
        return sum(target.numel for target in self.targets)

    @cached_property
    def wanted_bytes(self) -> int:
        """Payload that writers bring: all targets, but for what the loader filled."""
        item_bytes = {target.name: ITEM_BYTES[target.dtype] for target in self.targets}
        whole = sum(target.numel * item_bytes[target.name] for target in self.targets)
        return whole - sum(fill.numel * item_bytes[fill.target] for fill in self.fills)

    @cached_property
    def _digest(self) -> str:
        return _digest(
            [
                FORMAT,
                "target",
                sorted((t.name, t.shape, t.dtype) for t in self.targets),
                sorted((s.name, s.shape, s.dtype) for s in self.sources),
                sorted((c.target, c.target_offset, c.source, c.source_offset, *_form(c)) for c in self.copies),
                sorted((f.target, f.offset, f.strides, f.shape, f.value_bits) for f in self.fills),
            ]
        )

    def digest(self) -> str:
        """Hexadecimal; equal for equal layouts whatever the order they list things in, wherever they were learnt."""
        return self.derived_from or self._digest

    def to_bytes(self) -> bytes:
        """Compressed JSON: 18,867 copies of a Qwen3-30B take 0.3 MB."""
        source = {tensor.name: i for i, tensor in enumerate(self.sources)}
        target = {tensor.name: i for i, tensor in enumerate(self.targets)}
        forms = {form: i for i, form in enumerate(dict.fromkeys(map(_form, self.copies)))}
        return _pack(
            {
                "kind": "target",
                "targets": _columns([[t.name, t.shape, t.dtype] for t in self.targets]),
                "sources": _columns([[s.name, s.shape, s.dtype] for s in self.sources]),
                "forms": list(forms),
                "copies": _columns(
                    [
                        [source[c.source], c.source_offset, target[c.target], c.target_offset, forms[_form(c)]]
                        for c in self.copies
                    ]
                ),
                "fills": [dataclasses.astuple(fill) for fill in self.fills],
                "unused": self.unused,
                "meta": dict(self.meta),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises PlanError when `data` is no target layout of this FORMAT."""
        with _decoding(data, "target") as document:
            targets = tuple(Target(name, tuple(shape), dtype) for name, shape, dtype in _rows(document["targets"]))
            sources = tuple(
                SourceTensor(name, tuple(shape), dtype) for name, shape, dtype in _rows(document["sources"])
            )
            forms = [tuple(map(tuple, form)) for form in document["forms"]]
            copies = tuple(
                Copy(
                    sources[s].name,
                    source_offset,
                    forms[f][1],
                    targets[t].name,
                    target_offset,
                    forms[f][2],
                    forms[f][0],
                )
                for s, source_offset, t, target_offset, f in _rows(document["copies"])
            )
            fills = tuple(
                Fill(t, offset, tuple(strides), tuple(shape), bits)
                for t, offset, strides, shape, bits in document["fills"]
            )
            return cls(targets, sources, copies, fills, tuple(document["unused"]), document["meta"])


def _form(copy: Copy) -> tuple[Shape, Shape, Shape]:
    return copy.shape, copy.source_strides, copy.target_strides


def _digest(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _columns(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows as columns: like stands beside like, which compresses far better."""
    return [list(column) for column in zip(*rows, strict=True)]


def _rows(columns: list[list[Any]]) -> Any:
    return zip(*columns, strict=True)


def _pack(document: dict[str, Any]) -> bytes:
    return zlib.compress(json.dumps({"format": FORMAT, **document}, separators=(",", ":")).encode(), 6)


@contextmanager
def _decoding(data: bytes, kind: str) -> Iterator[dict[str, Any]]:
    """The document in `data`; whatever is wrong with it, here or in the block that reads it, is a PlanError."""
    try:
        document = json.loads(zlib.decompress(data))
        found = (document["format"], document["kind"])
        if found == (FORMAT, kind):
            yield document
    except (zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise PlanError(f"{len(data)} bytes are no {kind} layout: {type(error).__name__}: {error}") from error
    if found != (FORMAT, kind):
        raise PlanError(
            f"have a layout of (format, kind) {found}, want {(FORMAT, kind)}: run one weightsync version on both sides"
        )
