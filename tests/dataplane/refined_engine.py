"""An engine that refines its grid of FP8 scales, as vLLM does for a rank whose share of a matrix ends inside a block."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from weightsync.conversion import fp8
from weightsync.layout.forms import BLOCK, FP8, SCALE_SUFFIX, scale_grid
from weightsync.layout.records import SourceTensor, TargetLayout
from weightsync.layout.trace import trace_loader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Stacked experts of which each tensor-parallel rank keeps `inner` / `tp` rows of gate and up and columns of down."""

    count: int
    hidden: int
    inner: int
    tp: int
    block: int
    """One scale for so many rows and columns; divides BLOCK, hidden and inner / tp."""

    @property
    def share(self) -> int:
        return self.inner // self.tp

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the checkpoint's matrices."""
        kinds = {"gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner)}
        return {f"experts.{e}.{kind}": shape for e in range(self.count) for kind, shape in kinds.items()}

    def sources(self) -> list[SourceTensor]:
        matrices = [SourceTensor(name, shape, FP8) for name, shape in self.shapes().items()]
        scales = [
            SourceTensor(name + SCALE_SUFFIX, scale_grid(shape), "float32") for name, shape in self.shapes().items()
        ]
        return [*matrices, *scales]

    def params(self) -> dict[str, Tensor]:
        """Poisoned memory of one rank."""
        refined, hidden = self.share // self.block, self.hidden // self.block
        quantized = {"w13": (2 * self.share, self.hidden), "w2": (self.hidden, self.share)}
        scales = {"w13_scale_inv": (2 * refined, hidden), "w2_scale_inv": (hidden, refined)}
        made = {name: torch.full((self.count, *shape), 7, dtype=torch.uint8) for name, shape in quantized.items()}
        return {name: value.view(torch.float8_e4m3fn) for name, value in made.items()} | {
            name: torch.full((self.count, *shape), -1.0) for name, shape in scales.items()
        }

    def load(self, params: dict[str, Tensor], rank: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The loader of rank `rank`: repeats scales, then takes its share as of the weights."""
        for name, tensor in weights:
            _, expert, kind = name.removesuffix(SCALE_SUFFIX).split(".")
            share, suffix, value = self.share, "", tensor
            if name.endswith(SCALE_SUFFIX):
                share, suffix = share // self.block, SCALE_SUFFIX
                value = tensor.repeat_interleave(BLOCK // self.block, 0).repeat_interleave(BLOCK // self.block, 1)
            into = params[("w2" if kind == "down" else "w13") + suffix][int(expert)]
            mine = slice(rank * share, (rank + 1) * share)
            if kind == "down":
                into.copy_(value[: into.shape[0], mine])
            else:
                half = into[:share] if kind == "gate" else into[share:]
                half.copy_(value[mine, : into.shape[1]])

    def layout(self, rank: int) -> TargetLayout:
        """What a trace of that loader records."""
        params = self.params()
        return trace_loader(functools.partial(self.load, params, rank), params, self.sources())

    def loaded(self, rank: int, weights: dict[str, Tensor], *, ue8m0: bool) -> dict[str, Tensor]:
        """What the loader leaves of a checkpoint of these weights, each quantized as a whole."""
        params, checkpoint = self.params(), {}
        for name, weight in weights.items():
            checkpoint[name + SCALE_SUFFIX] = scales = fp8.scales_of(fp8.block_amax(weight), ue8m0=ue8m0)
            checkpoint[name] = fp8.quantize(weight, scales)
        self.load(params, rank, checkpoint.items())
        return params

    def weights(self, seed: int) -> dict[str, Tensor]:
        """fp32, of other magnitude in each row and column, so that each block has another scale."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(*shape, generator=generator)
            * torch.logspace(-3, 3, shape[0])[:, None]
            * torch.logspace(2, -2, shape[1])
            for name, shape in self.shapes().items()
        }
