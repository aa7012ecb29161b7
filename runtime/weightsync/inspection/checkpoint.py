"""Which tensors a model's checkpoint has, and which parameters of the trainer's module they lie in.

From the headers of its safetensors files where there are any, else from transformers' model built on the meta device: names and
shapes follow from config.json. A trainer holds everything unquantized; what an engine wants in FP8 is in `sources`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from weightsync.errors import ConfigError, UnsupportedLayout
from weightsync.layout.families import family_of
from weightsync.layout.forms import BLOCK, SCALE_SUFFIX, scale_grid
from weightsync.layout.meshes import Parameter
from weightsync.layout.records import SourceTensor
from weightsync.preflight import ModelFault, read_headers

FORMATS = ("bf16", "fp8")
QUANTIZED = re.compile(r".*(_proj|_proj_with_mqa|\.indexer\.wq_b|\.indexer\.wk)\.weight")
"""Matrices that block-FP8 checkpoints of the known families quantize: projections and experts; no router, no embedding, no head."""
_EXPERT = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<kind>gate_proj|up_proj|down_proj)\.weight")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model, as a trainer holds it."""

    config: Mapping[str, Any]
    """config.json."""
    parameters: tuple[Parameter, ...]
    quantized: frozenset[str]
    """Tensors that are FP8 in an FP8 checkpoint of it."""
    learnt_from: str

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    def sources(self, format_: str) -> tuple[SourceTensor, ...]:
        """What a checkpoint in this format offers a loader: FP8 matrices come with one fp32 scale a block."""
        offered: list[SourceTensor] = []
        for tensor in (tensor for parameter in self.parameters for tensor in parameter.tensors()):
            if format_ == "fp8" and tensor.name in self.quantized:
                offered.append(dataclasses.replace(tensor, dtype="float8_e4m3fn"))
                offered.append(SourceTensor(tensor.name + SCALE_SUFFIX, scale_grid(tensor.shape), "float32"))
            else:
                offered.append(tensor)
        return tuple(offered)

    def engine_config(self, format_: str) -> dict[str, Any]:
        """config.json of that checkpoint."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        if format_ == "bf16":
            return config
        stated = self.config.get("quantization_config")
        if stated is None:
            tensors = [tensor for parameter in self.parameters for tensor in parameter.tensors()]
            plain = [
                t.name.removesuffix(".weight") for t in tensors if len(t.shape) == 2 and t.name not in self.quantized
            ]
            stated = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": plain,
            }
        elif (stated.get("quant_method"), stated.get("weight_block_size")) != ("fp8", [BLOCK, BLOCK]):
            method, block = stated.get("quant_method"), stated.get("weight_block_size")
            raise ConfigError(
                f"the model is quantized by {method} in blocks of {block}, but only FP8 of {BLOCK} by {BLOCK} can be pushed: "
                "use --format bf16, or a config.json without quantization_config"
            )
        return {**config, "quantization_config": stated}


def read_checkpoint(path: Path) -> Checkpoint:
    """`path`: a model's folder, or its config.json under any name.

    Raises ConfigError when it cannot be read, UnsupportedLayout when its family is not known.
    """
    folder = path if path.is_dir() else None
    config = _read_json(path / "config.json" if folder else path)
    if folder is not None and any(folder.glob("*.safetensors")):
        try:
            tensors = {name: tensor for _, header in read_headers(folder) for name, tensor in header.items()}
        except ModelFault as fault:
            raise ConfigError(str(fault)) from fault
        return _from_headers(config, tensors)
    return _from_config(config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a model's folder or its config.json") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("model_type") or not config.get("architectures"):
        raise ConfigError(f"{path} is no model's config.json: it lacks model_type or architectures")
    return config


def _from_headers(config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> Checkpoint:
    held = [
        SourceTensor(name, tuple(tensor["shape"]), "float32" if tensor["dtype"] == "F32" else "bfloat16")
        for name, tensor in sorted(tensors.items())
        if not name.endswith(SCALE_SUFFIX)
    ]
    fp8 = frozenset(name for name, tensor in tensors.items() if tensor["dtype"] == "F8_E4M3")
    quantized = fp8 or _quantizable(config, held)
    return Checkpoint(config, tuple(_fused(held)), quantized, "safetensors headers")


def _fused(tensors: Iterable[SourceTensor]) -> Iterable[Parameter]:
    """Experts as transformers' module holds them: gate_up_proj and down_proj of a layer, all experts in one."""
    experts: dict[tuple[str, str], dict[tuple[int, str], SourceTensor]] = defaultdict(dict)
    for tensor in tensors:
        found = _EXPERT.fullmatch(tensor.name)
        if found is None:
            yield Parameter(tensor.name, tensor.shape, ((tensor.name, tensor.shape, 0),), tensor.dtype)
        else:
            fused = "down_proj" if found["kind"] == "down_proj" else "gate_up_proj"
            experts[found["prefix"], fused][int(found["expert"]), found["kind"]] = tensor
    for (prefix, fused), parts in experts.items():
        ordered = [parts[key] for key in sorted(parts)]
        kinds = 1 if fused == "down_proj" else 2
        n_experts = 1 + max(expert for expert, _ in parts)
        shape = ordered[0].shape
        if len(ordered) != n_experts * kinds or any(tensor.shape != shape for tensor in ordered):
            raise UnsupportedLayout(
                f"{prefix}: {len(ordered)} tensors of {n_experts} experts; each needs gate_proj, up_proj and down_proj"
            )
        numel = math.prod(shape)
        whole = (n_experts, kinds * shape[0], *shape[1:])
        places = tuple((tensor.name, tensor.shape, i * numel) for i, tensor in enumerate(ordered))
        yield Parameter(f"{prefix}.{fused}", whole, places, ordered[0].dtype)


def _from_config(config: Mapping[str, Any]) -> Checkpoint:
    family = family_of(config)
    parameters = tuple(
        Parameter(name, shape, parts, family.dtype(name, "bfloat16"))
        for name, shape in _module_tensors(config)
        if (parts := family.parts(name, shape))
    )
    tensors = [tensor for parameter in parameters for tensor in parameter.tensors()]
    return Checkpoint(config, parameters, _quantizable(config, tensors), "config.json")


def _module_tensors(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the module's parameters and of the buffers that it saves."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from weightsync.layout.shards import named_tensors

    with TemporaryDirectory() as folder:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        Path(folder, "config.json").write_text(json.dumps(plain))
        try:
            known = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(known)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"transformers builds no {config['model_type']} of this config.json: {error}") from error
    return [(name, tuple(tensor.shape)) for name, tensor in named_tensors(model)]


def _quantizable(config: Mapping[str, Any], tensors: Sequence[SourceTensor]) -> frozenset[str]:
    stated = config.get("quantization_config") or {}
    plain = {f"{module}.weight" for module in stated.get("modules_to_not_convert") or ()}
    return frozenset(
        t.name for t in tensors if len(t.shape) == 2 and QUANTIZED.fullmatch(t.name) and t.name not in plain
    )
