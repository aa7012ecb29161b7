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

STORED_BYTES = {"BF16": 2, "F32": 4}
"""An element of what engines keep in their own dtype."""

QUANTIZED_DTYPES = frozenset({"F8_E4M3"})
BLOCK = [128, 128]
"""Rows and columns of an FP8 block that a push can write."""

TP_FIELD = "spec.inference.parallelism.tp"
EP_FIELD = "spec.inference.parallelism.ep"
BUDGET_FIELD = "spec.transfer.stagingBudgetGiB"
QUANTIZATION_FIELD = "spec.inference.quantization"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What the spec wants of the model."""

    model_path: Path
    model_field: str
    """Field of the spec that says where the model is."""
    tensor_parallel: int
    data_parallel: int = 1
    expert_parallel: int = 1
    quantization: str = "none"
    """none, or fp8: a serialized checkpoint with blocks of 128 x 128."""
    dtype: str = "bfloat16"
    """bfloat16 or float32: what engines keep what is not FP8 in."""
    staging_budget_bytes: int | None = None
    """What a staged push may take in one engine rank; None for no bound."""
    host_limit_bytes: int | None = None
    """Memory limit of an engine's container that stages in host memory; None for no limit."""

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError if $WEIGHTSYNC_PREFLIGHT is missing or malformed."""
        try:
            value = json.loads(environ["WEIGHTSYNC_PREFLIGHT"])
            return cls(
                model_path=Path(value["modelPath"]),
                model_field=value["modelField"],
                tensor_parallel=int(value["tensorParallel"]),
                data_parallel=int(value.get("dataParallel", 1)),
                expert_parallel=int(value.get("expertParallel", 1)),
                quantization=str(value.get("quantization", "none")),
                dtype=str(value.get("dtype", "bfloat16")),
                staging_budget_bytes=_whole(value.get("stagingBudgetBytes")),
                host_limit_bytes=_whole(value.get("hostLimitBytes")),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"WEIGHTSYNC_PREFLIGHT is not what the operator writes: {error!r}") from error


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


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
        *_memory_faults(config, tensors, question),
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
    yield from _quantization_faults(config.get("quantization_config"), question)


def _quantization_faults(stored: Any, question: Question) -> Iterator[Fault]:
    method = (stored or {}).get("quant_method", "unknown")
    if question.quantization == "none":
        if stored is not None:
            yield Fault(question.model_field, f"the checkpoint is quantized ({method}); format bf16 needs a plain one")
    elif stored is None:
        yield Fault(
            QUANTIZATION_FIELD, "fp8 is a checkpoint that holds FP8 weights, and this one is plain: leave it out"
        )
    elif method != "fp8" or stored.get("weight_block_size") != BLOCK:
        found = f"{method} with blocks {stored.get('weight_block_size')}"
        yield Fault(
            QUANTIZATION_FIELD, f"the checkpoint is quantized as {found}; a push writes fp8 with blocks {BLOCK}"
        )


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
    # Expert parallelism gives each rank whole experts; without it each is sliced over data-parallel ranks, too.
    sliced = {"intermediate_size": tp}
    if question.expert_parallel == 1:
        sliced["moe_intermediate_size"] = tp * question.data_parallel
    for field, ranks in sliced.items():
        size = config.get(field)
        if isinstance(size, int) and size % ranks:
            words = f"tp {tp}" if ranks == tp else f"tp * dp {ranks}"
            yield Fault(TP_FIELD, f"{field} {size} is not divisible by {words}")
    yield from _expert_faults(config, question)


def _experts(config: Mapping[str, Any]) -> int:
    """Experts of a layer; 0 of a dense model."""
    fields = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((config[field] for field in fields if isinstance(config.get(field), int)), 0)


def _expert_faults(config: Mapping[str, Any], question: Question) -> Iterator[Fault]:
    ep, experts = question.expert_parallel, _experts(config)
    if ep > 1 and not experts:
        yield Fault(EP_FIELD, f"the model has no experts that ep {ep} could share out")
    elif experts % ep:
        yield Fault(EP_FIELD, f"{experts} experts are not divisible by ep {ep}; possible: {_divisors(experts)}")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, 17) if number % n == 0)


def _tensor_faults(tensors: Mapping[str, Any], question: Question) -> Iterator[Fault]:
    known = PUSHED_DTYPES | (QUANTIZED_DTYPES if question.quantization == "fp8" else frozenset())
    others = sorted({tensor["dtype"] for tensor in tensors.values()} - known)
    if others:
        example = next(name for name, tensor in sorted(tensors.items()) if tensor["dtype"] in others)
        message = f"dtype {', '.join(others)} (as in {example}) cannot be pushed as bf16; supported: BF16, F32"
        yield Fault(question.model_field, message)


def _memory_faults(config: Mapping[str, Any], tensors: Mapping[str, Any], question: Question) -> Iterator[Fault]:
    """What cannot fit for certain: a rank stages at least its even share of the weights. Engines hold all but FP8 in their dtype.

    Data-parallel ranks of a dense model hold a copy each; of a mixture of experts they share at least the experts.
    """
    stored = ((tensor["dtype"], tensor["data_offsets"]) for tensor in tensors.values())
    kept_bytes = 4 if question.dtype == "float32" else 2
    once = sum((end - start) * kept_bytes // STORED_BYTES.get(dtype, kept_bytes) for dtype, (start, end) in stored)
    staged = once if _experts(config) else once * question.data_parallel
    share = staged // (question.tensor_parallel * question.data_parallel)
    budget, limit = question.staging_budget_bytes, question.host_limit_bytes
    if budget is not None and share > budget:
        words = f"staging takes at least {share} bytes of weights a rank ({_gib(share)}), the budget is {budget} bytes"
        yield Fault(BUDGET_FIELD, f"{words} ({_gib(budget)})")
    if limit is not None and staged > limit:
        words = f"staging pinnedHost takes at least {staged} bytes in all ranks ({_gib(staged)}), the engine's memory limit is"
        yield Fault("spec.inference.podTemplate", f"{words} {limit} bytes ({_gib(limit)})")


def _gib(length_bytes: int) -> str:
    return f"{length_bytes / 2**30:.1f} GiB"


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
