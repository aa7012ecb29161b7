"""Qwen3-30B-A3B (sizes of the Hugging Face config of Qwen/Qwen3-30B-A3B) as trainers hold it and as vLLM's ranks store it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from weightsync.layout.forms import BLOCK, FP8, SCALE_SUFFIX, scale_grid
from weightsync.layout.records import Copy, Shape, SourceTensor, Target, TargetLayout

HIDDEN, EXPERTS, INTERMEDIATE, VOCABULARY = 2048, 128, 768, 151936
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
LAYERS = 48
EXPERT_SHAPES = {"w13": (EXPERTS, 2 * INTERMEDIATE, HIDDEN), "w2": (EXPERTS, HIDDEN, INTERMEDIATE)}
MATRICES = {
    "q": (HEADS * HEAD_DIM, HIDDEN),
    "k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
}
"""Attention's projections."""


def trainer_parameters(layers: int, device: torch.device, *, distinct: int) -> dict[str, torch.Tensor]:
    """A trainer's bf16 parameters under transformers' names, experts fused; layers share the memory of `distinct` ones.

    Random values; a layer is far larger than any cache, so that shared memory is read anew each time.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    made = [_layer(generator, device) for _ in range(min(distinct, layers))]
    parameters = {"model.embed_tokens.weight": _random(generator, device, (VOCABULARY, HIDDEN))}
    for i in range(layers):
        parameters |= {f"model.layers.{i}.{name}": value for name, value in made[i % len(made)].items()}
    parameters["model.norm.weight"] = _random(generator, device, (HIDDEN,))
    parameters["lm_head.weight"] = _random(generator, device, (VOCABULARY, HIDDEN))
    return parameters


def _layer(generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
    shapes: dict[str, Shape] = {f"self_attn.{name}_proj.weight": shape for name, shape in MATRICES.items()}
    shapes |= {"mlp.experts.gate_up_proj": EXPERT_SHAPES["w13"], "mlp.experts.down_proj": EXPERT_SHAPES["w2"]}
    shapes |= {"mlp.gate.weight": (EXPERTS, HIDDEN)}
    shapes |= {f"self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    shapes |= {f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return {name: _random(generator, device, shape) for name, shape in shapes.items()}


def _random(generator: torch.Generator, device: torch.device, shape: Shape) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """How one vLLM rank splits the model: its place in tensor parallelism, or (`ep`) its share of whole experts."""

    layers: int
    tp: int = 1
    rank: int = 0
    ep: bool = False
    quantized: bool = True

    def layout(self) -> TargetLayout:
        """What the rank wants, as a trace of vLLM's loader records it."""
        parts = list(self._parts())
        targets, sources, copies = {}, {}, []
        for target, source, copy in parts:
            targets[target.name], sources[source.name] = target, source
            copies.append(copy)
        return TargetLayout(tuple(targets.values()), tuple(sources.values()), tuple(copies))

    def _parts(self) -> Iterator[tuple[Target, SourceTensor, Copy]]:
        yield from self._rows("embed_tokens", "model.embed_tokens.weight", (VOCABULARY, HIDDEN), quantized=False)
        for i in range(self.layers):
            yield from self._attention(f"model.layers.{i}")
            yield from self._experts(f"model.layers.{i}.mlp.experts")
            yield from self._whole(f"model.layers.{i}.mlp.gate.weight", (EXPERTS, HIDDEN))
            for name in ("input", "post_attention"):
                yield from self._whole(f"model.layers.{i}.{name}_layernorm.weight", (HIDDEN,))
        yield from self._whole("model.norm.weight", (HIDDEN,))
        yield from self._rows("lm_head", "lm_head.weight", (VOCABULARY, HIDDEN), quantized=False)

    def _attention(self, layer: str) -> Iterator[tuple[Target, SourceTensor, Copy]]:
        rows = [MATRICES[name][0] // self.tp for name in "qkv"]
        for name, count, at in zip("qkv", rows, (0, rows[0], rows[0] + rows[1]), strict=True):
            matrix = f"{layer}.self_attn.{name}_proj.weight"
            place = (f"{layer}.self_attn.qkv_proj", (sum(rows), HIDDEN), at * HIDDEN)
            yield from self._matrix(matrix, MATRICES[name], (self.rank * count, count), (0, HIDDEN), place)
        width = MATRICES["o"][1] // self.tp
        place = (f"{layer}.self_attn.o_proj", (HIDDEN, width), 0)
        matrix = f"{layer}.self_attn.o_proj.weight"
        yield from self._matrix(matrix, MATRICES["o"], (0, HIDDEN), (self.rank * width, width), place)
        for name in "qk":
            yield from self._whole(f"{layer}.self_attn.{name}_norm.weight", (HEAD_DIM,))

    def _experts(self, prefix: str) -> Iterator[tuple[Target, SourceTensor, Copy]]:
        ranks, rank = (1, 0) if self.ep else (self.tp, self.rank)
        mine = (
            range(EXPERTS // self.tp * self.rank, EXPERTS // self.tp * (self.rank + 1)) if self.ep else range(EXPERTS)
        )
        width = INTERMEDIATE // ranks
        for local, expert in enumerate(mine):
            w13 = (len(mine), 2 * width, HIDDEN)
            for half, kind in enumerate(("gate", "up")):
                place = (f"{prefix}.w13", w13, (local * 2 + half) * width * HIDDEN)
                matrix = f"{prefix}.{expert}.{kind}_proj.weight"
                yield from self._matrix(matrix, (INTERMEDIATE, HIDDEN), (rank * width, width), (0, HIDDEN), place)
            place = (f"{prefix}.w2", (len(mine), HIDDEN, width), local * HIDDEN * width)
            matrix = f"{prefix}.{expert}.down_proj.weight"
            yield from self._matrix(matrix, (HIDDEN, INTERMEDIATE), (0, HIDDEN), (rank * width, width), place)

    def _whole(self, name: str, shape: Shape) -> Iterator[tuple[Target, SourceTensor, Copy]]:
        source = SourceTensor(name, shape, "bfloat16")
        yield Target(name, shape, "bfloat16"), source, Copy(name, 0, (1,), name, 0, (1,), (source.numel,))

    def _rows(
        self, target: str, name: str, shape: tuple[int, int], *, quantized: bool
    ) -> Iterator[tuple[Target, SourceTensor, Copy]]:
        count = shape[0] // self.tp
        place = (target, (count, shape[1]), 0)
        yield from self._matrix(name, shape, (self.rank * count, count), (0, shape[1]), place, quantized=quantized)

    def _matrix(
        self,
        name: str,
        shape: tuple[int, int],
        rows: tuple[int, int],
        columns: tuple[int, int],
        place: tuple[str, Shape, int],
        *,
        quantized: bool = True,
    ) -> Iterator[tuple[Target, SourceTensor, Copy]]:
        """Rows and columns (first, count) of a matrix at `place` (target, its shape, first element), with scales in FP8."""
        quantized = quantized and self.quantized
        yield _block(name, shape, FP8 if quantized else "bfloat16", rows, columns, place)
        if quantized:
            target, whole, at = place
            scale_shape = (*whole[:-2], whole[-2] // BLOCK, whole[-1] // BLOCK)
            scales = (target + SCALE_SUFFIX, scale_shape, at // BLOCK // BLOCK)
            blocks = [(first // BLOCK, count // BLOCK) for first, count in (rows, columns)]
            yield _block(name + SCALE_SUFFIX, scale_grid(shape), "float32", blocks[0], blocks[1], scales)


def _block(
    name: str,
    shape: Shape,
    dtype: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    place: tuple[str, Shape, int],
) -> tuple[Target, SourceTensor, Copy]:
    target, whole, at = place
    copy = Copy(
        name,
        rows[0] * shape[1] + columns[0],
        (shape[1], 1),
        target,
        at,
        (whole[-1], 1),
        (rows[1], columns[1]),
    )
    return Target(target, whole, dtype), SourceTensor(name, shape, dtype), copy
