"""Every tensor that a module of the model reaches: its parameters and buffers, and what its attributes and closures hold.

A kernel may keep a repacked copy of a weight anywhere. What a probe compares, and what a replay writes, is therefore not a list of
parameters. Imports torch only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weightsync.errors import UnsupportedLayout

DEPTH = 8
"""Attributes within attributes that are followed."""
_OWN = ("_parameters", "_buffers")
_SKIPPED = frozenset({"_modules", "_non_persistent_buffers_set", "kv_cache", *_OWN})
_LEAVES = (str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType)


def reachable(module: nn.Module, leave_out: Container[str] = ()) -> dict[str, Tensor]:
    """Tensors by the path that leads to them, parameters first; one that several paths lead to is named by the first.

    Other modules are not entered: each is asked for itself. `leave_out` names attributes of this one.
    """
    found: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name, value in _attributes(module):
        if name not in leave_out:
            for path, tensor in _tensors(name, value, seen, 0):
                found[path] = tensor
    return found


def dense(tensor: Tensor, name: str) -> Tensor:
    """The tensor's elements in the order of their addresses, contiguous, without a copy.

    Raises UnsupportedLayout for one with holes.
    """
    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim))
    ordered = tensor.detach().permute(order)
    if not ordered.is_contiguous():
        raise UnsupportedLayout(f"{name} {list(tensor.shape)} has holes in memory (strides {tensor.stride()})")
    return ordered


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for kind in _OWN:
        yield from getattr(module, kind).items()
    for name, value in vars(module).items():
        if name not in _SKIPPED and not name.endswith("_hooks"):
            yield name, value
    if isinstance(method := module._modules.get("quant_method"), nn.Module):  # some quantization methods are modules
        yield from ((f"quant_method.{name}", value) for name, value in _attributes(method))


def _tensors(path: str, value: Any, seen: set[Any], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
        if key not in seen:
            seen.add(key)
            yield path, value
        return
    if value is None or isinstance(value, (*_LEAVES, nn.Module)) or id(value) in seen or depth == DEPTH:
        return
    seen.add(id(value))
    for name, part in _parts(value):
        yield from _tensors(f"{path}.{name}", part, seen, depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), part) for i, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, *value.args, value.keywords))
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        for name, cell in zip(names, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
    else:
        yield from getattr(value, "__dict__", {}).items()
