"""A map of element numbers is the boxes it is split into, whatever a loader did to get it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from weightsync.layout.indexmaps import Box, boxes


def rebuilt(found: list[Box], shape: tuple[int, ...]) -> np.ndarray:
    """The map from its boxes; an element in two boxes or in none fails."""
    numbers, hits = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=int)
    for box in found:
        ramps = np.indices(box.shape)
        place = [np.full(box.shape, at) for at in box.at]
        for ramp, (dim, places) in zip(ramps, box.steps, strict=True):
            place[dim] = place[dim] + ramp * places
        numbers[tuple(place)] = box.start + sum(ramp * step for ramp, step in zip(ramps, box.strides, strict=True))
        np.add.at(hits, tuple(place), 1)
    assert (hits == 1).all()
    return numbers


GRID = np.arange(6 * 16).reshape(6, 16)


@pytest.mark.parametrize(
    ("numbers", "count"),
    [
        (GRID, 1),
        (GRID[2:4, 3:9], 1),
        (GRID.T, 1),
        (GRID.repeat(4, axis=0)[3:6], 2),
        (GRID.repeat(4, axis=0)[4:8].repeat(2, axis=1), 1),
        (GRID.repeat(4, axis=0).repeat(2, axis=1), 1),
        (np.broadcast_to(GRID[:, :1], (6, 5)), 1),
        (np.concatenate([GRID[4:], GRID[:2]]), 2),
        (GRID[::-1], 6),
    ],
)
def test_what_loaders_do_to_a_grid_is_few_boxes(numbers: np.ndarray, count: int) -> None:
    found = list(boxes(numbers, np.array([0])))
    assert len(found) == count
    assert np.array_equal(rebuilt(found, numbers.shape), numbers)


def test_no_box_crosses_from_one_tensor_into_the_next() -> None:
    """Two tensors one behind the other: without the bounds their numbers are a single run, and a copy of the wrong tensor."""
    fused = np.concatenate([GRID[:3, :4], GRID[3:, :4]])
    assert len(list(boxes(fused, np.array([0])))) == 1
    split = list(boxes(fused, np.array([0, 48])))
    assert [(box.at, box.shape, box.start) for box in split] == [((0, 0), (3, 4), 0), ((3, 0), (3, 4), 48)]
    assert split[0].steps == ((0, 1), (1, 1))
    beside = list(boxes(np.concatenate([GRID[:3, :4], GRID[3:, :4]], axis=1), np.array([0, 48])))
    assert np.array_equal(rebuilt(beside, (3, 8)), np.concatenate([GRID[:3, :4], GRID[3:, :4]], axis=1))
    assert all(
        box.start // 48 == (box.start + sum((n - 1) * s for n, s in zip(box.shape, box.strides, strict=True))) // 48
        for box in beside
    )


@given(
    arrays.arrays(
        np.int64, arrays.array_shapes(min_dims=0, max_dims=3, max_side=6, min_side=0), elements=st.integers(0, 40)
    )
)
def test_any_map_is_its_boxes(numbers: np.ndarray) -> None:
    bounds = np.array([0, 7, 20])
    found = list(boxes(numbers, bounds))
    assert np.array_equal(rebuilt(found, numbers.shape), numbers)
    for box in found:
        last = box.start + sum((n - 1) * step for n, step in zip(box.shape, box.strides, strict=True))
        assert np.searchsorted(bounds, box.start, side="right") == np.searchsorted(bounds, last, side="right")
        assert min(box.strides, default=0) >= 0
