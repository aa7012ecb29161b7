"""The modules of one engine rank that a push replays: what is staged for them, made into what their kernels want, copied live.

Everything is made beside the live modules and counted there, on the thread that verifies a push; only `apply` touches what the
engine computes with, and it is a copy. Memory: the staged tensors and the finished modules, both taken at start, and one group of
modules more while it is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsync.errors import CoverageError, PlanError, PushAborted, UnsupportedLayout
from weightsync.layout.records import SourceTensor
from weightsync.meter import TensorMeter
from weightsync.replay import Count, require_complete, storage_of, target_of
from weightsync.staging import StagingArena
from weightsync.vllm.kernels import swapped
from weightsync.vllm.livememory import dense, reachable
from weightsync.vllm.reloading import Group, LoadFormat, Reload


@dataclasses.dataclass(frozen=True)
class _Swap:
    """An object that takes another's place in a live module."""

    module: nn.Module
    attribute: str
    value: Any


class ModuleReplay:
    """A `weightsync.replay.Replay` of groups of vLLM's modules; `learn` once, with the loaded checkpoint staged.

    Raises ConfigError when what is staged takes more than `budget_bytes`.
    """

    def __init__(
        self,
        model: LoadFormat,
        groups: Sequence[Group],
        *,
        place: Literal["device", "pinnedHost"],
        budget_bytes: int | None,
    ) -> None:
        self._model, self._groups = model, tuple(groups)
        self.sources = {source.name: source for group in groups for source in group.sources}
        self._empty = {target_of(s.name): _sized(s, model.device) for s in self.sources.values()}
        self._arena = StagingArena(self._empty, place=place, budget_bytes=budget_bytes)
        self._expected: dict[Group, Count] = {}
        self._paths: dict[str, frozenset[str]] = {}
        """Tensors that a replay makes of each module, by full path."""
        self._made: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._swaps: list[_Swap] = []
        self._made_meter = self._live_meter = TensorMeter({})

    @property
    def staged(self) -> Mapping[str, Tensor]:
        """Where writers write, by target name."""
        return self._arena.tensors

    @property
    def memory(self) -> Tensor:
        """[length_bytes] uint8, to be registered as a whole."""
        return self._arena.buffer

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that are replayed."""
        return tuple(name for group in self._groups for name in group.modules)

    @torch.no_grad()
    def learn(self) -> dict[str, str]:
        """Replay what is staged, the checkpoint that the engine has loaded, and count it; that is expected of each push.

        Returns why not, by module, for each that does not come out as what is live, bit by bit.
        """
        faults: dict[str, str] = {}
        for group in self._groups:
            try:
                faults |= self._learn(group)
            except PlanError as error:
                faults |= dict.fromkeys(group.modules, str(error))
        self._made_meter = TensorMeter({name: dense(tensor, name) for name, tensor in self._made.items()})
        self._live_meter = TensorMeter({name: dense(tensor, name) for name, tensor in self._live.items()})
        return faults

    @torch.no_grad()
    def prepare(self, wanted: Callable[[], bool]) -> None:
        """Make every module of what is staged, as long as it is `wanted`, on any thread.

        Raises CoverageError when one was loaded in part, before anything live changed, PushAborted when it is not wanted any more.
        """
        with torch.cuda.device_of(next(iter(self._made.values()), self.memory)):  # a thread begins on the first device
            self._prepare(wanted)

    def _prepare(self, wanted: Callable[[], bool]) -> None:
        self._swaps = []
        for group in self._groups:
            if not wanted():
                raise PushAborted("the push ended before all modules were made")
            with self._model.reloaded(group, self._weights(group)) as reload:
                require_complete(self._expected[group], reload.count, group.name)
                self._model.process(group, reload)
                for name, module in reload.modules.items():
                    pairs = self._pairs(name, reload)
                    _require_same(name, self._paths[name], pairs.keys())
                    for path, (_, made) in pairs.items():
                        self._made[path].copy_(made)
                    self._swaps += [_Swap(self._model.live[name], a, getattr(module, a)) for a in swapped(module)]
        self._wait()

    @torch.no_grad()
    def apply(self) -> Mapping[str, int]:
        """Copy what was prepared into live memory, at the same addresses; the engine is paused. Returns the digests of it."""
        for path, made in self._made.items():
            self._live[path].copy_(made)
        for swap in self._swaps:
            setattr(swap.module, swap.attribute, swap.value)
        self._wait()
        return self._made_meter.measure()

    def measure(self) -> Mapping[str, int]:
        """Digests of the live memory of all replayed modules; what is swapped has no memory that could be measured."""
        return self._live_meter.measure()

    def retire(self) -> None:
        """Stage elsewhere from now on; the old addresses are sealed."""
        self._arena = self._arena.retire(self._empty)

    def _learn(self, group: Group) -> dict[str, str]:
        with self._model.reloaded(group, self._weights(group)) as reload:
            params = self._model.params
            everything = Count({name: params[name].numel() for name in group.params}, {})
            require_complete(everything, reload.count, group.name)
            self._expected[group] = reload.count
            loaded = {name: module.weight for name, module in reload.modules.items() if hasattr(module, "weight")}
            self._model.process(group, reload)
            return {name: why for name in reload.modules if (why := self._compare(name, reload, loaded.get(name)))}

    def _compare(self, name: str, reload: Reload, weight: Any) -> str:
        """Take room for what comes of a module; returns how that differs from the live one, or nothing."""
        wrong = []
        pairs, module = self._pairs(name, reload), reload.modules[name]
        self._paths[name] = frozenset(pairs)
        for path, (live, made) in pairs.items():
            self._live[path], self._made[path] = live, _room_like(live)
            if not same_bits(live, made):
                wrong.append(path)
        for attribute in swapped(module):
            if not _computes_alike(self._model.live[name], module, attribute, weight):
                wrong.append(f"{name}.{attribute}")
        return f"a reload of the checkpoint leaves {', '.join(wrong[:5])} otherwise than it is" if wrong else ""

    def _pairs(self, name: str, reload: Reload) -> dict[str, tuple[Tensor, Tensor]]:
        """(live, made) of each tensor of a module that loading or processing made, by full path."""
        live, module = self._model.live[name], reload.modules[name]
        pairs = pairs_of(live, module, swapped(module), name)
        return {f"{name}.{p}": pair for p, pair in pairs.items() if storage_of(pair[1]) not in reload.untouched}

    def _weights(self, group: Group) -> dict[str, Tensor]:
        return {source.name: self.staged[target_of(source.name)] for source in group.sources}

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def pairs_of(
    live: nn.Module, made: nn.Module, leave_out: Container[str], name: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(live, made) of each tensor of two modules of one kind that they do not share.

    Raises UnsupportedLayout when one has a tensor that the other has not, or in another form.
    """
    old, new = reachable(live, leave_out), reachable(made, leave_out)
    if old.keys() != new.keys():
        differ = sorted(old.keys() ^ new.keys())
        raise UnsupportedLayout(f"{name}: a reload has other tensors than the live module: {', '.join(differ[:5])}")
    for path, tensor in old.items():
        if form(tensor) != form(new[path]):
            raise UnsupportedLayout(f"{name}.{path} is {form(tensor)}, a reload makes it {form(new[path])}")
    return {
        path: (old[path], new[path])
        for path in old
        if old[path].data_ptr() != new[path].data_ptr() and old[path].numel()
    }


def _require_same(module: str, expected: Set[str], made: Set[str]) -> None:
    """Raise CoverageError unless a replay made the tensors that the checkpoint's load made: what it left out would stay old."""
    if expected != made:
        told = (", ".join(sorted(paths)) or "nothing" for paths in (expected, made))
        raise CoverageError(
            "{}: the checkpoint's load made {}, this one made {}: live memory is as it was".format(module, *told)
        )


def form(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors must have in common for one to be copied into the other."""
    return (*tensor.shape, str(tensor.dtype).removeprefix("torch."))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one form have the same elements, bit by bit."""
    return torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def _computes_alike(live: Any, made: Any, attribute: str, weight: Tensor) -> bool:
    """Whether two linear kernels that hide their `weight` [out, in] give the same for one input."""
    tokens = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    one, other = (getattr(module, attribute)(tokens, module.weight, None) for module in (live, made))
    return same_bits(one, other)


def _room_like(live: Tensor) -> Tensor:
    """Memory for a tensor with the elements where `live` has them."""
    return torch.empty_strided(live.shape, live.stride(), dtype=live.dtype, device=live.device)


def _sized(source: SourceTensor, device: torch.device) -> Tensor:
    """A tensor of the source's form that takes no memory."""
    return torch.zeros((), dtype=getattr(torch, source.dtype), device=device).expand(source.shape)
