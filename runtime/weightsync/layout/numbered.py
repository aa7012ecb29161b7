"""Small sources offered to a loader as real tensors whose elements are their own numbers: what it makes of them can be read.

vLLM refines a grid of block scales for a tensor-parallel rank whose rows are no whole blocks (Qwen3-30B FP8 at TP 8 has 96 rows
a rank): repeats and gathers that a meta tensor does not survive. Numbers are bit patterns, not values: moving them keeps them,
and a computation on them is not followed. Imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsync.errors import UnsupportedLayout
from weightsync.layout.forms import SCALE_SUFFIX
from weightsync.layout.indexmaps import Box, boxes
from weightsync.layout.records import SourceTensor

_aten = torch.ops.aten
_MOVES = {
    _aten._to_copy,
    _aten.cat,
    _aten.clone,
    _aten.constant_pad_nd,
    _aten.flip,
    _aten.gather,
    _aten.index,
    _aten.index_select,
    _aten.repeat,
    _aten.stack,
}
"""Operators whose result has its arguments' elements as they are; views need not be listed."""
LARGEST = 0x7F7FFFFF
"""Bits of the greatest finite float32: a NaN's bits might not survive."""


def is_numbered(source: SourceTensor) -> bool:
    """Block scales: one element for 16,384 of the weight."""
    return source.dtype == "float32" and source.name.endswith(SCALE_SUFFIX)


class Numbered:
    """The numbered sources of one trace, and every tensor that was made by moving their elements."""

    def __init__(self, sources: Sequence[SourceTensor]) -> None:
        numbered = [source for source in sources if is_numbered(source)]
        self._names = [source.name for source in numbered]
        self._bounds = np.cumsum([1, *(source.numel for source in numbered)], dtype=np.int64)
        """Number 0 is nobody's: it is what a loader's own zeros would read as."""
        self._place = {name: i for i, name in enumerate(self._names)}
        self._moved: dict[int, Tensor] = {}
        """By storage; the tensors are kept so that no other storage takes their place."""
        if self._bounds[-1] > LARGEST:
            raise UnsupportedLayout(
                f"the checkpoint has {self._bounds[-1] - 1} block scales, more than {LARGEST} can be traced"
            )

    def offer(self, source: SourceTensor) -> Tensor:
        """What the loader gets for it: its shape, float32, on the CPU."""
        first, stop = self._bounds[self._place[source.name]], self._bounds[self._place[source.name] + 1]
        numbers = torch.arange(int(first), int(stop), dtype=torch.int32).view(torch.float32)
        self._keep(numbers)
        return numbers.view(source.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether its elements are numbers, or a loader's own among them."""
        return tensor.untyped_storage()._cdata in self._moved

    def follow(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """After an operator ran: its result has numbers when it moved some."""
        if func.overloadpacket in _MOVES and isinstance(result, Tensor) and result.dtype == torch.float32:
            tensors = [a for argument in args for a in (argument if isinstance(argument, list | tuple) else [argument])]
            if any(isinstance(tensor, Tensor) and self.holds(tensor) for tensor in tensors):
                self._keep(result)

    def receive(self, scratch: Tensor) -> None:
        """Numbers were copied into a tensor of the loader's own."""
        self._keep(scratch)

    def origins(self, view: Tensor) -> Iterator[tuple[str, int, Box]] | None:
        """(source, its element, box of the view) that a view of numbers is made of; None if a loader mixed in others."""
        numbers = view.detach().cpu().contiguous().view(torch.int32).numpy().astype(np.int64)
        if numbers.size and not 0 < numbers.min() <= numbers.max() < self._bounds[-1]:
            return None
        return self._located(boxes(numbers, self._bounds))

    def _located(self, found: Iterator[Box]) -> Iterator[tuple[str, int, Box]]:
        for box in found:
            place = int(np.searchsorted(self._bounds, box.start, side="right")) - 1
            yield self._names[place], box.start - int(self._bounds[place]), box

    def _keep(self, tensor: Tensor) -> None:
        self._moved[tensor.untyped_storage()._cdata] = tensor
