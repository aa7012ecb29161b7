"""Digests of tensors that add up: the sum of the digests of disjoint element ranges is the digest of the whole.

digest = sum modulo 2^64 over elements of (bits + 1) * T[i mod 256] * H(name, i div 256), with `bits` the element's
pattern as an unsigned integer, i its linear index, T odd 32-bit and H odd 64-bit pseudo-random numbers. Odd factors are
invertible modulo 2^64, so one changed element always changes the sum, and so do two of at most 2 bytes that change places
within a row of 256; other swaps, a shift or another name do but for a chance of about 2^-32. It proves that bytes arrived
where they belong, not that nobody forged them. An element costs one 32 by 32 bit multiplication and a row one of 64 bits,
which a GPU does while it reads (`weightsync.digest_kernels`). numpy releases the GIL throughout.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor

    from weightsync.layout.records import Target

ROW_ELEMENTS = 256
_BATCH_ROWS = 256
"""Rows taken at once: their products stay in the L2 cache."""
_GATHER_ELEMENTS = 1 << 20
_SHORT_RUN = 1 << 13
_SEED = 0x5EED_0F_9E37_79B9
MASK = (1 << 64) - 1
SAMPLE_SHARE = 8


def digest_tensor(name: str, tensor: Tensor) -> int:
    """Digest of a whole contiguous tensor, any shape, 1, 2 or 4 bytes an element, in host memory."""
    return digest_range(name, 0, tensor.reshape(-1))


def digest_range(name: str, start: int, flat: Tensor) -> int:
    """Digest of elements [start, start + len(flat)) of tensor `name`; `flat` is 1-D, contiguous, in host memory."""
    return _digest(name, start, _bits(flat))


def digest_writes(arena: Tensor, writes: np.ndarray, targets: Sequence[Target]) -> dict[int, int]:
    """Partial digests, by target index, of what a rank's writes (dtype `plan.WRITE`) bring from its slot arena.

    arena: flat, any dtype; seen as elements of each target's dtype. `targets` are the plan's; those that get nothing are absent.
    """
    views = views_of(arena, writes, targets)
    totals: dict[int, int] = {}
    for index in np.unique(writes["target_index"]).tolist():
        name, elements = targets[index].name, views[targets[index].dtype]
        mine = writes[writes["target_index"] == index]
        long = mine["length"] >= _SHORT_RUN
        total = _digest_short(elements, mine[~long], name)
        for slot, _, offset, length in mine[long].tolist():
            total += digest_range(name, offset, elements[slot : slot + length])
        totals[index] = total & MASK
    return totals


def chosen_names(names: Iterable[str], *, mode: str, push_id: str) -> frozenset[str]:
    """Which targets a push measures: all (`full`), none (`off`), or (`sampled`) one in SAMPLE_SHARE, at least one, by push id.

    Both sides choose alike whatever the order of `names`; over many pushes every target's turn comes.
    """
    if mode == "full":
        return frozenset(names)
    if mode == "off":
        return frozenset()
    ranked = sorted(set(names), key=lambda name: hashlib.blake2b(f"{push_id}/{name}".encode(), digest_size=8).digest())
    return frozenset(ranked[: -(-len(ranked) // SAMPLE_SHARE)])


def to_hex(digest: int) -> str:
    """16 hexadecimal digits of a digest or of a sum of digests."""
    return f"{digest & MASK:016x}"


def sum_hex(digests: Iterable[str]) -> str:
    """The sum of digests as `to_hex` writes them, written alike."""
    return to_hex(sum(int(digest, 16) for digest in digests))


def _digest(name: str, start: int, bits: np.ndarray) -> int:
    """Whole rows in batches; the part of a row before the first whole one and after the last by itself."""
    hashed = name_hash(name)
    head = min(-start % ROW_ELEMENTS, len(bits))
    rows = (len(bits) - head) // ROW_ELEMENTS
    tail = head + rows * ROW_ELEMENTS
    total = _digest_part(hashed, start, bits[:head]) + _digest_part(hashed, start + tail, bits[tail:])
    buffer = np.empty((_BATCH_ROWS, ROW_ELEMENTS), dtype=np.uint64)
    first_row = (start + head) // ROW_ELEMENTS
    for low in range(0, rows, _BATCH_ROWS):
        high = min(low + _BATCH_ROWS, rows)
        product = buffer[: high - low]
        product[:] = bits[head + low * ROW_ELEMENTS : head + high * ROW_ELEMENTS].reshape(-1, ROW_ELEMENTS)
        product += 1
        product *= column_factors()
        sums = product.sum(axis=1)
        sums *= _row_factors(hashed, np.arange(first_row + low, first_row + high, dtype=np.uint64))
        total += int(sums.sum())
    return total & MASK


def _digest_part(hashed: np.uint64, start: int, bits: np.ndarray) -> int:
    """Elements that lie in one row."""
    if not len(bits):
        return 0
    row, column = divmod(start, ROW_ELEMENTS)
    sums = (bits.astype(np.uint64) + np.uint64(1)) * column_factors()[column : column + len(bits)]
    return int(sums.sum()) * int(_row_factors(hashed, np.array([row], dtype=np.uint64))[0])


def _digest_short(arena: Tensor, writes: np.ndarray, name: str) -> int:
    """Many short runs at once: their elements are gathered, a million at a time."""
    bits, hashed, total = _bits(arena), name_hash(name), 0
    ends = np.cumsum(writes["length"])
    batches = np.split(writes, np.flatnonzero(np.diff(ends // _GATHER_ELEMENTS)) + 1) if len(writes) else []
    for batch in batches:
        run = np.repeat(np.arange(len(batch)), batch["length"])
        number = np.arange(len(run)) - (np.cumsum(batch["length"]) - batch["length"])[run]
        element = (batch["target_offset"][run] + number).astype(np.uint64)
        value = bits[batch["slot_offset"][run] + number].astype(np.uint64) + np.uint64(1)
        value *= column_factors()[element % ROW_ELEMENTS]
        value *= _row_factors(hashed, element // np.uint64(ROW_ELEMENTS))
        total += int(value.sum())
    return total


def views_of(arena: Tensor, writes: np.ndarray, targets: Sequence[Target]) -> dict[str, Tensor]:
    """The memory as elements of each dtype that is written from it; memory of a model may be aligned for no other."""
    return {dtype: seen_as(arena, dtype) for dtype in {targets[i].dtype for i in np.unique(writes["target_index"])}}


def seen_as(arena: Tensor, dtype: str) -> Tensor:
    """The arena's memory as elements of `dtype`, a remainder left out."""
    import torch

    memory = arena.view(torch.uint8)
    wanted: torch.dtype = getattr(torch, dtype)
    return memory[: len(memory) // wanted.itemsize * wanted.itemsize].view(wanted)


def _bits(flat: Tensor) -> np.ndarray:
    """The elements as unsigned integers, sharing memory."""
    import torch

    views = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    if flat.element_size() not in views or flat.dim() != 1 or not flat.is_contiguous() or flat.device.type != "cpu":
        raise ConversionError(
            f"cannot digest a {flat.dtype} tensor of shape {list(flat.shape)} on {flat.device}: "
            "want 1, 2 or 4 bytes an element, flat, contiguous, in host memory"
        )
    integer, unsigned = views[flat.element_size()]
    return flat.detach().view(integer).numpy().view(unsigned)


@functools.lru_cache(maxsize=65536)
def name_hash(name: str) -> np.uint64:
    """64 bits of a target's name."""
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


@functools.cache
def column_factors() -> np.ndarray:
    """[256] odd factors below 2^32 as uint64, one for each place in a row."""
    factors = _splitmix(np.arange(ROW_ELEMENTS, dtype=np.uint64) ^ np.uint64(_SEED)) & np.uint64(0xFFFFFFFF)
    factors |= np.uint64(1)
    factors.setflags(write=False)
    return factors


def _row_factors(hashed: np.uint64, rows: np.ndarray) -> np.ndarray:
    """[n] odd factors of row numbers (uint64) of the tensor whose name hashes to `hashed`."""
    return _splitmix(rows + hashed) | np.uint64(1)


def _splitmix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, elementwise modulo 2^64 on an array (numpy warns of overflow on scalars only)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
