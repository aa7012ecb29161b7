"""The preflight judges a checkpoint by its headers and says which field of the spec would have to change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightsync.errors import ConfigError
from weightsync.preflight import MESSAGE_LIMIT_BYTES, Fault, Question, Verdict, inspect_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}


def _write_tensors(path: Path, *, dtype: str = "BF16", names: tuple[str, ...] = ("a", "b"), cut_bytes: int = 0) -> None:
    """A safetensors file of tensors of 8 bytes, written by hand so that it can be wrong."""
    header = {n: {"dtype": dtype, "shape": [4], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8 * len(names))
    path.write_bytes(data[: len(data) - cut_bytes])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    _write_tensors(tmp_path / "model.safetensors")
    return tmp_path


def _config(model: Path, **changes: Any) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def _ask(model: Path, tp: int = 1, **more: Any) -> Verdict:
    return inspect_model(Question(model_path=model, model_field="spec.model.hostPath", tensor_parallel=tp, **more))


def test_a_good_model_passes_with_its_sizes(model: Path) -> None:
    assert _ask(model) == Verdict(errors=(), architecture="LlamaForCausalLM", weights_bytes=16, tensors=2)
    assert _ask(model, tp=3).ok


def test_heads_that_tp_does_not_divide_are_told_with_what_would_fit(model: Path) -> None:
    assert (
        Fault("spec.inference.parallelism.tp", "9 heads are not divisible by tp 2; possible: 1, 3, 9")
        in _ask(model, 2).errors
    )


@pytest.mark.parametrize(
    ("kv_heads", "tp", "ok"), [(8, 4, True), (2, 8, True), (8, 8, True), (6, 4, False), (3, 8, False)]
)
def test_key_value_heads_follow_vllms_rule(model: Path, kv_heads: int, tp: int, ok: bool) -> None:
    _config(model, num_attention_heads=48, num_key_value_heads=kv_heads)
    assert _ask(model, tp).ok is ok


def test_mlp_sizes_must_be_divisible_too(model: Path) -> None:
    _config(model, num_attention_heads=8, num_key_value_heads=8, intermediate_size=12, moe_intermediate_size=10)
    assert [fault.message for fault in _ask(model, 4).errors] == ["moe_intermediate_size 10 is not divisible by tp 4"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausalLM is not supported; supported: Deepseek",
        ),
        ({"architectures": None}, "architecture (none) is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantized (fp8)"),
        ({"num_attention_heads": None}, "config.json has num_attention_heads None"),
        ({"num_attention_heads": 0}, "config.json has num_attention_heads 0"),
    ],
)
def test_what_cannot_be_served_is_named(model: Path, changes: dict[str, Any], words: str) -> None:
    _config(model, **changes)
    (fault,) = _ask(model).errors
    assert fault.field == "spec.model.hostPath"
    assert words in fault.message


@pytest.mark.failure_mode(9)
def test_a_dtype_that_cannot_be_pushed_is_named_with_a_tensor(model: Path) -> None:
    _write_tensors(model / "model.safetensors", dtype="F8_E4M3", names=("layers.0.w",))
    assert "dtype F8_E4M3 (as in layers.0.w)" in _ask(model).errors[0].message


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (BLOCKS, ""),
        (None, "this one is plain: leave it out"),
        ({"quant_method": "fp8"}, "quantized as fp8 with blocks None; a push writes fp8 with blocks [128, 128]"),
        ({"quant_method": "awq", "weight_block_size": [128, 128]}, "quantized as awq"),
    ],
)
def test_fp8_is_a_serialized_checkpoint_with_blocks_that_a_push_writes(
    model: Path, stored: dict[str, Any] | None, words: str
) -> None:
    _config(model, **({} if stored is None else {"quantization_config": stored}))
    _write_tensors(model / "model.safetensors", dtype="F8_E4M3")
    faults = _ask(model, quantization="fp8").errors
    assert [fault.field for fault in faults] == (["spec.inference.quantization"] if words else [])
    assert all(words in fault.message for fault in faults)


def test_without_expert_parallelism_experts_are_sliced_over_data_parallel_ranks_too(model: Path) -> None:
    """As vLLM does it; attention is not."""
    _config(
        model, num_attention_heads=8, num_key_value_heads=8, intermediate_size=8, num_experts=4, moe_intermediate_size=6
    )
    assert _ask(model, 2).ok
    (fault,) = _ask(model, 2, data_parallel=2).errors
    assert fault.message == "moe_intermediate_size 6 is not divisible by tp * dp 4"
    assert _ask(model, 2, data_parallel=2, expert_parallel=4).ok


def test_data_parallel_ranks_of_a_dense_model_stage_a_copy_each(model: Path) -> None:
    """16 bytes of weights: one copy fits into the pod, two do not; a rank's share is what it is without data parallelism."""
    assert _ask(model, host_limit_bytes=16, staging_budget_bytes=16).ok
    (fault,) = _ask(model, data_parallel=2, host_limit_bytes=16, staging_budget_bytes=16).errors
    assert fault.message.startswith("staging pinnedHost takes at least 32 bytes in all ranks")
    _config(model, num_experts=4)
    assert _ask(model, data_parallel=2, host_limit_bytes=16, staging_budget_bytes=8).ok


def test_experts_must_be_there_and_divisible_and_are_not_sliced(model: Path) -> None:
    assert "has no experts that ep 3 could share out" in _ask(model, 3, expert_parallel=3).errors[0].message
    _config(model, num_experts=8, moe_intermediate_size=10)
    (fault,) = _ask(model, 3, expert_parallel=3).errors
    assert fault == Fault("spec.inference.parallelism.ep", "8 experts are not divisible by ep 3; possible: 1, 2, 4, 8")
    _config(model, n_routed_experts=9, moe_intermediate_size=10)
    assert _ask(model, 3, expert_parallel=3).ok


@pytest.mark.failure_mode(52)
def test_staging_that_cannot_fit_is_refused_with_the_numbers(model: Path) -> None:
    """16 bytes of bf16 weights: 8 a rank at tp 2. Those of fp32 are staged as bf16, half of it."""
    _config(model, num_attention_heads=8, num_key_value_heads=8)
    (fault,) = _ask(model, 2, staging_budget_bytes=7).errors
    assert fault.field == "spec.transfer.stagingBudgetGiB"
    assert "8 bytes of weights a rank" in fault.message and "7 bytes" in fault.message
    assert _ask(model, 2, staging_budget_bytes=8).ok
    (fault,) = _ask(model, 2, host_limit_bytes=15).errors
    assert fault.field == "spec.inference.podTemplate"
    assert "16 bytes in all ranks" in fault.message and "15 bytes" in fault.message
    assert _ask(model, 2, host_limit_bytes=16).ok
    _write_tensors(model / "model.safetensors", dtype="F32")
    assert _ask(model, 2, staging_budget_bytes=4).ok
    assert "8 bytes of weights a rank" in _ask(model, 2, staging_budget_bytes=4, dtype="float32").errors[0].message
    _write_tensors(model / "model.safetensors")
    assert "16 bytes of weights a rank" in _ask(model, 2, staging_budget_bytes=8, dtype="float32").errors[0].message


def test_a_missing_folder_config_or_weights_is_told(tmp_path: Path, model: Path) -> None:
    assert "is no folder in the pod" in _ask(tmp_path / "none").errors[0].message
    (model / "model.safetensors").unlink()
    assert "holds no *.safetensors file" in _ask(model).errors[0].message
    (model / "config.json").unlink()
    assert "config.json: No such file" in _ask(model).errors[0].message


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_broken_config_is_told(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert "config.json" in _ask(model).errors[0].message


@pytest.mark.failure_mode(7)
def test_a_file_that_was_copied_in_part_is_told_with_its_sizes(model: Path) -> None:
    _write_tensors(model / "model.safetensors", cut_bytes=3)
    assert "copy it again" in _ask(model).errors[0].message


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, bytes(8), (5).to_bytes(8, "little") + b"nojso"])
def test_a_file_of_another_kind_is_told(model: Path, data: bytes) -> None:
    (model / "model.safetensors").write_bytes(data)
    (fault,) = _ask(model).errors
    assert "model.safetensors" in fault.message


@pytest.mark.failure_mode(7)
def test_a_shard_that_the_index_names_must_be_there(model: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tensors(model / "model-1.safetensors", names=("a",))
    assert "model-2.safetensors: No such file" in _ask(model).errors[0].message
    _write_tensors(model / "model-2.safetensors", names=("b",))
    assert _ask(model).weights_bytes == 16


def test_a_verdict_always_fits_the_termination_message() -> None:
    verdict = Verdict(errors=tuple(Fault("spec.model.hostPath", "x" * 5000) for _ in range(50)))
    text = verdict.to_json()
    assert len(text.encode()) <= MESSAGE_LIMIT_BYTES
    assert json.loads(text)["ok"] is False


@pytest.mark.parametrize(
    "value", ["", "{", "{}", '{"modelPath": "/m"}', '{"modelPath": 1, "modelField": "f", "tensorParallel": 1}']
)
def test_a_question_that_makes_no_sense_is_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match="WEIGHTSYNC_PREFLIGHT"):
        Question.load({"WEIGHTSYNC_PREFLIGHT": value})


def test_the_program_prints_its_verdict_and_starts_without_torch(model: Path) -> None:
    question = {"modelPath": str(model), "modelField": "spec.model.hostPath", "tensorParallel": 2}
    environ = {**os.environ, "WEIGHTSYNC_PREFLIGHT": json.dumps(question)}
    run = "runpy.run_module('weightsync.preflight', run_name='__main__')"
    code = f"import runpy, sys\ntry: {run}\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["errors"][0]["field"] == "spec.inference.parallelism.tp"
