"""The start-up probe: what a direct write leaves in live memory is what a full reload leaves, in every tensor that is reachable.

It is asked twice. Of every parameter: is it, as loaded, what a direct write of the checkpoint would make of it? And of one module
of each kind: with other values than the loaded ones, does a direct write leave nothing behind that a reload would change, such as
a cache that is derived from the weight, or scales that are rounded (failure modes 3 and 53)? Live values are put back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from weightsync.layout.records import Copy, SourceTensor, TargetLayout
from weightsync.vllm.livememory import reachable
from weightsync.vllm.reloading import Group, LoadFormat
from weightsync.vllm.replaying import form, same_bits


class Checkpoint:
    """Tensors of a folder of safetensors files by name, on the CPU."""

    def __init__(self, path: str) -> None:
        self._file: dict[str, Path] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._file |= dict.fromkeys(opened.keys(), file)

    def get(self, source: SourceTensor) -> Tensor:
        """The tensor, in the dtype that it is offered in."""
        with safe_open(self._file[source.name], framework="pt") as opened:
            return opened.get_tensor(source.name).to(getattr(torch, source.dtype))


@torch.no_grad()
def repacked(params: Mapping[str, Tensor], layout: TargetLayout, loaded: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Names of live parameters that are not what a direct write of the loaded checkpoint would make of them.

    Their kernel changed them after loading, to the same size or another: bytes in load format would be garbage to it.
    """
    wrong: set[str] = set()
    copies = _by_source(layout)
    for name, tensor in loaded:
        for copy in copies.get(name, ()):
            live = _target(params, copy)
            if not same_bits(live, _source(tensor, copy).to(live)):
                wrong.add(copy.target)
    return wrong


@torch.no_grad()
def differs_from_reload(
    model: LoadFormat, group: Group, layout: TargetLayout, params: Mapping[str, Tensor], checkpoint: Checkpoint
) -> str:
    """Write other values directly into a group of live modules and load the same ones anew beside them.

    Returns the first tensor in which they differ, in words, or nothing. Live memory is then as it was.
    """
    weights = {source.name: _other(checkpoint.get(source)).to(model.device) for source in group.sources}
    with model.reloaded(group, weights) as reload:
        model.process(group, reload)
        wanted = {name: reachable(module) for name, module in reload.modules.items()}
        mine = {name: params[name] for name in group.params}
        before = {name: param.clone() for name, param in mine.items()}
        try:
            copies = _by_source(layout)
            for name, tensor in weights.items():
                for copy in copies.get(name, ()):
                    if copy.target in mine:
                        _target(mine, copy).copy_(_source(tensor, copy))
            for name, tensors in wanted.items():
                if fault := _difference(name, reachable(model.live[name]), tensors):
                    return fault
        finally:
            for name, value in before.items():
                mine[name].copy_(value)
    return ""


def _difference(name: str, live: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    for path in sorted(live.keys() | wanted.keys()):
        one, other = live.get(path), wanted.get(path)
        if one is None or other is None:
            return f"{name}.{path} is there {'before' if other is None else 'after'} a reload only"
        if form(one) != form(other):
            return f"a reload makes {name}.{path} {form(other)}, it is {form(one)}"
        if not same_bits(one, other):
            return f"a reload leaves {name}.{path} otherwise than a direct write"
    return ""


def _other(tensor: Tensor) -> Tensor:
    """Values that differ from those of `tensor` in every element: a power of two does not stay one."""
    if tensor.element_size() == 1:
        return (tensor.view(torch.uint8) ^ 0x80).view(tensor.dtype)
    return tensor * 0.75 + 0.0625


def _by_source(layout: TargetLayout) -> dict[str, list[Copy]]:
    copies: dict[str, list[Copy]] = defaultdict(list)
    for copy in layout.copies:
        copies[copy.source].append(copy)
    return copies


def _target(params: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return params[copy.target].as_strided(copy.shape, copy.target_strides, copy.target_offset)


def _source(tensor: Tensor, copy: Copy) -> Tensor:
    return tensor.as_strided(copy.shape, copy.source_strides, copy.source_offset)
