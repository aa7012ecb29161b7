"""The model a second time, in load format and on the meta device: what its loader is watched on, and where modules are made anew.

vLLM records how each module was before its weights were loaded (model_loader/reload). Its own layerwise reload works with the
modules that serve, and fills what was not loaded from uninitialised memory. Here the modules are shallow copies: they take memory
only while one group of them is loaded, and nothing that they do reaches the live ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsync.errors import UnsupportedLayout, WeightSyncError
from weightsync.layout.records import SourceTensor
from weightsync.replay import Count, LoadWatch, storage_of
from weightsync.vllm.livememory import reachable

_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"
_POISON = 0x5A
"""Each byte of a parameter that its loader has yet to write."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that can only be loaded together, since they share a parameter; mostly one."""

    modules: tuple[str, ...]
    params: tuple[str, ...]
    """Full names, each parameter once."""
    sources: tuple[SourceTensor, ...]

    @property
    def name(self) -> str:
        return " + ".join(self.modules)


@dataclasses.dataclass(frozen=True)
class Reload:
    """A group of modules while it is loaded anew."""

    modules: Mapping[str, nn.Module]
    """Copies, by the live ones' names, loaded and not yet processed."""
    count: Count
    """What the loader did."""
    untouched: dict[int, Tensor]
    """Copied buffers that nothing has changed so far, by storage: they hold what the live ones held when they were copied, and a
    forward of the engine may have changed those since."""


class LoadFormat:
    """Copies of all modules of `model`, with the parameters that they had before loading.

    `around` is entered while a module's weights are processed (vLLM's current configuration).
    """

    def __init__(
        self, model: nn.Module, around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> None:
        self.live: dict[str, nn.Module] = dict(model.named_modules())
        self._around = around
        memo: dict[int, nn.Module] = {}
        self.model = _copied(model, memo)
        self.modules = {name: memo[id(module)] for name, module in self.live.items()}
        tied: dict[Any, Tensor] = {}
        for name, module in self.live.items():
            self.modules[name].__dict__["_parameters"] = _unloaded(module, self.modules[name], tied)
        self.device = next(model.parameters()).device
        tensors = [*model.parameters(), *model.buffers()]
        self._computed_with = frozenset(storage_of(tensor) for tensor in tensors if tensor.numel())

    @property
    def params(self) -> dict[str, Tensor]:
        """Parameters in load format, on the meta device; one that several modules share has the first one's name."""
        return dict(self.model.named_parameters())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """The model's own loader, on the copies."""
        return self.model.load_weights(weights)  # type: ignore[operator]

    @contextlib.contextmanager
    @torch.no_grad()
    def reloaded(self, group: Group, weights: Mapping[str, Tensor]) -> Iterator[Reload]:
        """The group's modules, loaded from `weights`; `process` is next.

        Raises UnsupportedLayout when the loader fails, or would change what the engine computes with.
        """
        modules = {name: self.modules[name] for name in group.modules}
        methods = [module._modules.get("quant_method") for module in modules.values()]  # some are modules, too
        changing = [module for module in (*modules.values(), *methods) if module is not None]
        before = [dict(module.__dict__) for module in changing]
        memory: dict[int, Tensor] = {}
        try:
            for module in modules.values():
                self._materialize(module, memory)
            params = {name: param for name, param in self.model.named_parameters() if name in group.params}
            with LoadWatch(params, weights, self._kept(group)) as watch:
                self._guarded(group, lambda: self.load_weights(iter(weights.items())))
            buffers = (buffer for module in modules.values() for buffer in module._buffers.values())
            copied = {storage_of(buffer): buffer for buffer in buffers if buffer is not None}
            untouched = {key: buffer for key, buffer in copied.items() if key not in watch.changed}
            yield Reload(modules, watch.count(), untouched)
        finally:
            for module, attributes in zip(changing, before, strict=True):
                module.__dict__.clear()
                module.__dict__.update(attributes)

    @torch.no_grad()
    def process(self, group: Group, reload: Reload) -> None:
        """What vLLM does to modules whose weights are loaded. Raises as `reloaded`."""
        with LoadWatch({}, {}, self._kept(group)) as watch, self._around():
            for module in reload.modules.values():
                self._guarded(group, lambda module=module: _process(module))
        for changed in watch.changed & reload.untouched.keys():
            del reload.untouched[changed]

    def _kept(self, group: Group) -> frozenset[int]:
        live = [reachable(self.live[name]) for name in group.modules]
        return self._computed_with.union(storage_of(t) for found in live for t in found.values() if t.numel())

    def _materialize(self, module: nn.Module, memory: dict[int, Tensor]) -> None:
        own: Any = module.__dict__
        for name, param in own["_parameters"].items():
            if param is not None and id(param) not in memory:
                memory[id(param)] = _like(param, self.device)
                memory[id(param)].detach().view(-1).view(torch.uint8).fill_(_POISON)
            own["_parameters"] = {**own["_parameters"], name: None if param is None else memory[id(param)]}
        own["_buffers"] = {n: None if b is None else b.clone() for n, b in own["_buffers"].items()}
        own.pop("_already_called_process_weights_after_loading", None)
        if own.get("quant_method") is not None:
            own["quant_method"] = copy.copy(own["quant_method"])
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # else it takes this for an update of weights, and does not pack them

    def _guarded(self, group: Group, work: Callable[[], Any]) -> None:
        try:
            work()
        except WeightSyncError:
            raise
        except Exception as error:
            raise UnsupportedLayout(f"{group.name} cannot be loaded anew: {type(error).__name__}: {error}") from error


def _process(module: Any) -> None:
    method: Any = getattr(module, "quant_method", None)
    if hasattr(method, "process_weights_after_loading"):
        method.process_weights_after_loading(module)
        if hasattr(module, "update_param_tp_status"):
            module.update_param_tp_status()


def _copied(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The module and all below it, each a new object with the old one's attributes."""
    known = memo.get(id(module))
    if known is not None:
        return known
    new = memo[id(module)] = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = dict(module.__dict__[kind])
    new.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _copied(child, memo)
    return new


def _unloaded(live: nn.Module, new: nn.Module, tied: dict[Any, Tensor]) -> dict[str, Tensor | None]:
    """The parameters of a module before loading, without memory, bound to its copy."""
    recorded, skipped = _recorded(live)
    own = {
        name: param for name, param in live._parameters.items() if recorded is None or name in skipped or param is None
    }
    result: dict[str, Tensor | None] = {}
    for name, template in {**own, **(recorded or {})}.items():
        if template is None:
            result[name] = None
            continue
        param = live._parameters.get(name)
        key = object() if param is None else (id(param), template.shape)
        if key not in tied:
            tied[key] = _bound(_like(template, torch.device("meta")), live, new)
        result[name] = tied[key]
    return result


def _recorded(live: nn.Module) -> tuple[Mapping[str, Tensor] | None, frozenset[str]]:
    """Parameters as vLLM noted them before loading (None: it did not), and the names that it never notes."""
    layerwise: Any = sys.modules.get(_LAYERWISE)
    if layerwise is None or live not in layerwise.LAYERWISE_INFO:
        return None, frozenset()
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    return layerwise.LAYERWISE_INFO[live].restore_metadata[0], frozenset(SKIP_TENSORS)


def _like(template: Tensor, device: torch.device) -> Any:
    """A tensor of its shape, strides, dtype, class and attributes, with memory of its own."""
    new: Any = torch.empty_strided(template.shape, template.stride(), dtype=template.dtype, device=device)
    new.__class__ = template.__class__
    new.__dict__ = dict(template.__dict__)
    return new


def _bound(param: Any, live: nn.Module, new: nn.Module) -> Tensor:
    """Bind the parameter's loaders to the module's copy; vLLM's record has them bound to a bare object."""
    for name, value in param.__dict__.items():
        if isinstance(value, types.MethodType) and (value.__self__ is live or type(value.__self__) is object):
            param.__dict__[name] = value.__func__.__get__(new)
    return param
