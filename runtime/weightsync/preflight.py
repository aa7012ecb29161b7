"""`python -m weightsync.preflight`: can this model be served and pushed as the spec says? Runs before anything else is made.

Reads $WEIGHTSYNC_PREFLIGHT (JSON, written by the operator) and the headers of the checkpoint, never its weights; leaves its
verdict as one line of JSON in the pod's termination message. Standard library only, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from weightsync.errors import ConfigError

TERMINATION_MESSAGE = Path("/dev/termination-log")
MESSAGE_LIMIT_BYTES = 4096
"""The kubelet cuts what is longer, and a cut JSON is no verdict."""
HEADER_LIMIT_BYTES = 100_000_000
ERRORS_KEPT = 8

ARCHITECTURES = frozenset(
    {
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Glm4MoeForCausalLM",
        "GlmMoeDsaForCausalLM",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
"""Families with a mapping in `layout.families`, each tested against what its module saves."""
PUSHED_DTYPES = frozenset({"BF16", "F32"})

TP_FIELD = "spec.inference.parallelism.tp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What the spec wants of the model."""

    model_path: Path
    model_field: str
    """Field of the spec that says where the model is."""
    tensor_parallel: int

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError if $WEIGHTSYNC_PREFLIGHT is missing or malformed."""
        try:
            value = json.loads(environ["WEIGHTSYNC_PREFLIGHT"])
            return cls(
                model_path=Path(value["modelPath"]),
                model_field=value["modelField"],
                tensor_parallel=int(value["tensorParallel"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"WEIGHTSYNC_PREFLIGHT is not what the operator writes: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong, by the field of the spec that would have to change."""

    field: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found."""

    errors: tuple[Fault, ...]
    architecture: str = ""
    weights_bytes: int = 0
    tensors: int = 0

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_json(self) -> str:
        """One line that fits the termination message, whatever was found."""
        faults = [{"field": fault.field, "message": fault.message[:300]} for fault in self.errors[:ERRORS_KEPT]]
        model = {"architecture": self.architecture, "weightsBytes": self.weights_bytes, "tensors": self.tensors}
        return json.dumps({"ok": self.ok, "errors": faults, "model": model})


def inspect_model(question: Question) -> Verdict:
    """Judge the checkpoint. Never raises for what a user may have got wrong."""
    try:
        config = read_config(question.model_path)
        headers = dict(read_headers(question.model_path))
    except ModelFault as fault:
        return Verdict(errors=(Fault(question.model_field, str(fault)),))
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    faults = [
        *_family_faults(config, question),
        *_parallel_faults(config, question),
        *_tensor_faults(tensors, question),
    ]
    return Verdict(
        errors=tuple(faults),
        architecture=_architecture(config),
        weights_bytes=sum(end - start for start, end in (tensor["data_offsets"] for tensor in tensors.values())),
        tensors=len(tensors),
    )


class ModelFault(Exception):
    """The checkpoint cannot be read; the message says what is missing, without the field."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises ModelFault."""
    if not folder.is_dir():
        raise ModelFault(f"{folder} is no folder in the pod")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ModelFault(f"{path}: {error.strerror}; a checkpoint has config.json and *.safetensors") from error
    except ValueError as error:
        raise ModelFault(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelFault(f"{path} holds no object")
    return config


def read_headers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, tensors by name) of each safetensors file; every file that the index names must be there. Raises ModelFault."""
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelFault(f"{index} cannot be read: {error}") from error
    if not names:
        raise ModelFault(f"{folder} holds no *.safetensors file")
    for name in names:
        yield name, read_header(folder / name)


def read_header(path: Path) -> dict[str, Any]:
    """Tensors of one file: {name: {dtype, shape, data_offsets}}. Raises ModelFault if the file is cut short."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < length_bytes <= min(size_bytes - 8, HEADER_LIMIT_BYTES):
                raise ModelFault(f"{path} is no safetensors file: its header would have {length_bytes} bytes")
            header = json.loads(file.read(length_bytes))
    except OSError as error:
        raise ModelFault(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelFault(f"{path} has a broken header: {error}") from error
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    end_bytes = 8 + length_bytes + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if end_bytes != size_bytes:
        raise ModelFault(f"{path} has {size_bytes} bytes, its header speaks of {end_bytes}: copy it again")
    return tensors


def _architecture(config: Mapping[str, Any]) -> str:
    return next(iter(config.get("architectures") or []), "")


def _family_faults(config: Mapping[str, Any], question: Question) -> Iterator[Fault]:
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        yield Fault(
            question.model_field, f"architecture {architecture or '(none)'} is not supported; supported: {known}"
        )
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        yield Fault(question.model_field, f"the checkpoint is quantized ({method}); format bf16 needs a plain one")


def _parallel_faults(config: Mapping[str, Any], question: Question) -> Iterator[Fault]:
    """vLLM's own rules for tensor parallelism, which it would tell only after minutes of loading."""
    tp = question.tensor_parallel
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        yield Fault(question.model_field, f"config.json has num_attention_heads {heads!r}")
        return
    if heads % tp:
        yield Fault(TP_FIELD, f"{heads} heads are not divisible by tp {tp}; possible: {_divisors(heads)}")
    kv_heads = config.get("num_key_value_heads") or heads
    if kv_heads % tp and tp % kv_heads:
        yield Fault(TP_FIELD, f"{kv_heads} key-value heads can be neither split nor repeated evenly over tp {tp}")
    for field in ("intermediate_size", "moe_intermediate_size"):
        size = config.get(field)
        if isinstance(size, int) and size % tp:
            yield Fault(TP_FIELD, f"{field} {size} is not divisible by tp {tp}")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, 17) if number % n == 0)


def _tensor_faults(tensors: Mapping[str, Any], question: Question) -> Iterator[Fault]:
    others = sorted({tensor["dtype"] for tensor in tensors.values()} - PUSHED_DTYPES)
    if others:
        example = next(name for name, tensor in sorted(tensors.items()) if tensor["dtype"] in others)
        message = f"dtype {', '.join(others)} (as in {example}) cannot be pushed as bf16; supported: BF16, F32"
        yield Fault(question.model_field, message)


def main() -> int:
    """Print and leave the verdict; 0 if nothing is wrong, 1 if something is, 2 if the question makes no sense."""
    try:
        question = Question.load()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    verdict = inspect_model(question)
    line = verdict.to_json()
    print(line)
    if TERMINATION_MESSAGE.exists():
        TERMINATION_MESSAGE.write_text(line[:MESSAGE_LIMIT_BYTES])
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
