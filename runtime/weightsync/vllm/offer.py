"""Which parameters of an engine rank are written directly and which modules are replayed, decided once, when the model is loaded.

Direct: the loader can be followed, the kernel is on the allow-list (`kernels`), and a probe agrees (`probing`). Everything else is
replayed by module, and a replay of the loaded checkpoint must come out as what is live. What is neither is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from weightsync.errors import UnsupportedLayout
from weightsync.layout.coverage import listed
from weightsync.layout.records import ITEM_BYTES, SourceTensor, TargetLayout
from weightsync.layout.trace import Followed, follow_loader
from weightsync.replay import target_of, with_replayed
from weightsync.vllm.kernels import DIRECT, Kernel, kernel_of
from weightsync.vllm.probing import Checkpoint, differs_from_reload, repacked
from weightsync.vllm.reloading import Group, LoadFormat
from weightsync.vllm.replaying import ModuleReplay, form

logger = logging.getLogger(__name__)

REFRESHED = ("W_UV", "W_UK_T")
"""Parameters that multi-head latent attention derives of `kv_b_proj`, which `worker.refresh_derived` computes anew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """What one engine rank offers to writers."""

    params: Mapping[str, Tensor]
    """Live parameters that are written directly."""
    layout: TargetLayout
    """Their elements, and those of what is staged for a replay."""
    replay: ModuleReplay | None
    reasons: Mapping[str, str]
    """Why a module is replayed, by its name."""

    @property
    def replayed_bytes(self) -> int:
        """Payload of a push that lands in load format."""
        targets = () if self.replay is None else self.replay.sources.values()
        return sum(source.numel * ITEM_BYTES[source.dtype] for source in targets)


def make_offer(
    model: nn.Module,
    sources: Sequence[SourceTensor],
    path: str,
    *,
    place: Literal["device", "pinnedHost"] = "device",
    budget_bytes: int | None = None,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Offer:
    """Decide for a model that has loaded the checkpoint in folder `path`, of which `sources` can be sent.

    around: entered while weights are processed. Raises UnsupportedLayout naming what can neither be written nor replayed, and
    ConfigError when what is staged for replays takes more than `budget_bytes`.
    """
    followed = Following(model, sources, around)
    reasons = followed.doubtful()
    checkpoint = Checkpoint(path)
    reasons = followed.together({**followed.disproved(checkpoint, reasons), **reasons})
    layout = followed.layout_without(reasons)
    params = {target.name: followed.live[target.name] for target in layout.targets}
    if not reasons:
        return Offer(params=params, layout=layout, replay=None, reasons={})
    groups = followed.groups(reasons)
    replay = ModuleReplay(followed.model, groups, place=place, budget_bytes=budget_bytes)
    for source in replay.sources.values():
        replay.staged[target_of(source.name)].copy_(checkpoint.get(source))
    if faults := replay.learn():
        told = [f"{name} ({reasons[name]}; {why})" for name, why in sorted(faults.items())]
        raise UnsupportedLayout(
            f"{len(faults)} modules can neither be written nor replayed: {listed(told)}; choose another backend for them "
            "(docs/operations.md)"
        )
    for name, why in sorted(reasons.items()):
        logger.info("%s is replayed: %s", name, why)
    return Offer(params=params, layout=with_replayed(layout, replay.sources.values()), replay=replay, reasons=reasons)


class Following:
    """A model's loader as followed in load format, and what that says of each module."""

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[SourceTensor],
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.model = LoadFormat(model, around)
        self.live = {name: parameter.data for name, parameter in model.named_parameters()}
        params = self.model.params
        self._loaded: Followed = follow_loader(self.model.load_weights, params, sources)
        self._params = {
            name: param for name, param in params.items() if name in self._loaded.feeds or self._is_needed(name)
        }
        names: dict[int, str] = {id(param): name for name, param in self._params.items()}
        self._of_module: dict[str, list[str]] = {}
        """Parameters, by the name that they have in the layout, of each module that the loader gives something."""
        for name, module in self.model.modules.items():
            own = [names[id(p)] for p in module._parameters.values() if p is not None and id(p) in names]
            if own:
                self._of_module[name] = own
        self._meta = _learnt_where(model)
        self._refuse_unfed()

    def doubtful(self) -> dict[str, str]:
        """Why a direct write cannot even be tried, for each module of which that is so."""
        reasons: dict[str, str] = {}
        for name, own in self._of_module.items():
            why = [*self._faults(own), *self._other_forms(own)]
            kernel = kernel_of(self.model.live[name])
            if kernel not in DIRECT:
                why.append(
                    f"{kernel.method} on {kernel.backend} is not known to compute with weights as they are loaded"
                )
            if why:
                reasons[name] = why[0]
        return self.together(reasons)

    def disproved(self, checkpoint: Checkpoint, without: Container[str]) -> dict[str, str]:
        """Why the probe does not agree to a direct write, for each module of which that is so, but those of `without`."""
        reasons: dict[str, str] = {}
        layout = self.layout_without(without)
        loaded = ((source.name, checkpoint.get(source)) for source in layout.sources)
        wrong = repacked(self.live, layout, loaded)
        for name, own in self._of_module.items():
            if name not in without and (found := wrong.intersection(own)):
                reasons[name] = f"{', '.join(sorted(found))} is not as it was loaded: its kernel repacks it"
        reasons = self.together(reasons)
        kinds: dict[Any, list[str]] = defaultdict(list)
        for name in self._of_module:
            if name not in without and name not in reasons:
                kinds[_kind(self.model.live[name])].append(name)
        for names in kinds.values():
            (group,) = self.groups([names[0], *self.together({names[0]: ""})])
            if why := differs_from_reload(self.model, group, layout, self.live, checkpoint):
                reasons |= dict.fromkeys(names, why)
        return reasons

    def together(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """With the modules that share a parameter with one that cannot be written: it has one memory."""
        result = dict(reasons)
        grown = True
        while grown:
            theirs = {param: name for name in result for param in self._of_module[name]}
            new = {
                name: f"it shares {param} with {theirs[param]}"
                for name, own in self._of_module.items()
                for param in own
                if name not in result and param in theirs
            }
            result |= new
            grown = bool(new)
        return result

    def groups(self, modules: Container[str]) -> list[Group]:
        """These modules, those that share a parameter in one group."""
        members: dict[str, list[str]] = {}
        """Modules by the first parameter of their group."""
        first: dict[str, str] = {}
        for name, own in self._of_module.items():
            if name not in modules:
                continue
            roots = sorted({first.get(param, param) for param in own})
            joined = [name for root in roots for name in members.pop(root, [])]
            members[roots[0]] = [*joined, name]
            first |= {param: roots[0] for each in members[roots[0]] for param in self._of_module[each]}
        return [self._group(names) for names in members.values()]

    def layout_without(self, modules: Container[str]) -> TargetLayout:
        """What the loader does with the parameters of all other modules."""
        left_out = {param for name, own in self._of_module.items() if name in modules for param in own}
        layout = self._loaded.layout
        targets = tuple(t for t in layout.targets if t.name in self._params and t.name not in left_out)
        names = {target.name for target in targets}
        copies = tuple(copy for copy in layout.copies if copy.target in names)
        used = {copy.source for copy in copies}
        return dataclasses.replace(
            layout,
            targets=targets,
            copies=copies,
            fills=tuple(fill for fill in layout.fills if fill.target in names),
            sources=tuple(source for source in layout.sources if source.name in used),
            unused=(*layout.unused, *(s.name for s in layout.sources if s.name not in used)),
            meta=self._meta,
        )

    def _group(self, modules: Sequence[str]) -> Group:
        params = tuple(dict.fromkeys(param for name in modules for param in self._of_module[name]))
        feeds = {source.name: source for param in params for source in self._loaded.feeds.get(param, ())}
        return Group(tuple(modules), params, tuple(feeds[name] for name in sorted(feeds)))

    def _is_needed(self, name: str) -> bool:
        """Whether the engine has this parameter: vLLM drops some that no checkpoint has brought (attention's scales)."""
        return name in self.live

    def _faults(self, own: Sequence[str]) -> Iterator[str]:
        yield from (self._loaded.faults[name] for name in own if name in self._loaded.faults)

    def _other_forms(self, own: Sequence[str]) -> Iterator[str]:
        for name in own:
            live, loaded = self.live.get(name), self._params[name]
            if live is None:
                yield f"{name} is gone after loading"
            elif form(live) != form(loaded) or not live.is_contiguous():
                yield f"{name} is {form(live)}, it was loaded as {form(loaded)}: its kernel repacks it"

    def _refuse_unfed(self) -> None:
        """Raise UnsupportedLayout for parameters that nothing computes anew when a push has changed what they are made of."""
        of_nobody = [
            f"{name}: {self._loaded.faults[name]}"
            for name in sorted(self._params)
            if name not in self._loaded.feeds and name in self._loaded.faults
        ]
        for name, module in self.model.live.items():
            derived = [p for p in module._parameters if module._parameters[p] is not None]
            derived = [p for p in derived if self.model.modules[name]._parameters.get(p) is None]
            if name not in self._of_module and not set(derived) <= set(REFRESHED):
                of_nobody.append(f"{name}: derives {', '.join(derived)} of other modules' weights")
        if of_nobody:
            raise UnsupportedLayout(f"parameters that no checkpoint tensor is loaded into: {listed(of_nobody)}")


def _kind(module: nn.Module) -> tuple[type, Kernel, tuple[Any, ...]]:
    """Modules of one kind are processed alike."""
    params = tuple((name, str(p.dtype)) for name, p in module._parameters.items() if p is not None)
    return type(module), kernel_of(module), params


def _learnt_where(model: nn.Module) -> dict[str, str]:
    import vllm

    platform = next(model.parameters()).device.type
    return {"vllm": vllm.__version__, "model": type(model).__name__, "platform": platform}
