"""`weightsync inspect` plans a push that nobody can make yet, or says in one line why there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.fixtures.models import make_tiny_qwen3_moe_of_blocks, quantize_checkpoint
from weightsync.cli import main
from weightsync.inspection.checkpoint import read_checkpoint
from weightsync.inspection.figures import Spread, count, sampled
from weightsync.inspection.run import trace
from weightsync.inspection.tracing import Refusal
from weightsync.layout.meshes import EngineMesh, Parameter, TrainerMesh
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout

MODELS = Path(__file__).parents[2] / "bench" / "configs"


def two_layers(name: str, folder: Path, **changes: Any) -> Path:
    """A published config with fewer layers: one of each kind."""
    config = json.loads((MODELS / f"{name}.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 2, **changes}))
    return path


def inspected(model: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """The document that the command prints."""
    done = CliRunner().invoke(main, ["inspect", str(model), *options, "--json"])
    assert done.exit_code == code, done.output[-4000:]
    return json.loads(done.stdout)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("engine", "format_", "dense_copies", "expert_copies"),
    [("tp=8", "bf16", 1, 1), ("tp=8,ep", "bf16", 1, 8), ("tp=8,dp=4,ep", "bf16", 1, 8), ("tp=8,ep", "fp8", 1, 8)],
)
def test_two_layers_of_qwen3_30b_are_planned_at_their_true_widths(
    engine: str, format_: str, dense_copies: int, expert_copies: int, tmp_path: Path
) -> None:
    """1. coverage is proved, nothing falls back; 2. an engine rank gets what vLLM's slices amount to; 3. sent is received."""
    found = inspected(
        two_layers("qwen3-30b-a3b", tmp_path),
        "--trainer",
        "fsdp=16,ep=4",
        "--engine",
        engine,
        "--format",
        format_,
        "--ranks",
        "3",
    )
    figures = found["figures"]
    assert (found["ok"], found["trainer_ranks"], figures["fallbacks"]) == (True, 64, [])

    hidden, inner, experts, vocabulary = 2048, 768, 128, 151_936
    n_expert_ranks = 8 if "dp" not in engine else 32
    # Experts are cut or shared out: the same elements. A rank has 4 of 32 heads, and a copy of one of the 4 key-value heads.
    in_experts = 2 * experts * 3 * inner * hidden // n_expert_ranks
    in_attention = 2 * (2 * 4 * 128 + 2 * 128) * hidden
    plain = 2 * vocabulary * hidden // 8 + 2 * (experts * hidden + 2 * hidden + 2 * 128) + hidden
    assert figures["covered_elements"] == 3 * (
        in_experts + in_attention + plain + scales(format_, in_experts + in_attention)
    )
    width = 2 if format_ == "bf16" else 1
    wanted = width * (in_experts + in_attention) + 2 * plain + 4 * scales(format_, in_experts + in_attention)
    assert figures["engine_bytes_received"] == {"least": wanted, "mean": wanted, "most": wanted}

    assert figures["trainer_bytes_sent"]["mean"] == pytest.approx(wanted * found["engine_ranks"] / 64, abs=1)
    assert found["expected_seconds"] == pytest.approx(8 * max(wanted, figures["trainer_bytes_sent"]["most"]) / 400e9)


def scales(format_: str, elements: int) -> int:
    """One for each block; all matrices here are whole blocks on every rank."""
    return 0 if format_ == "bf16" else elements // 128**2


@pytest.mark.vllm
def test_scales_that_vllm_refines_for_a_rank_without_whole_blocks_are_planned(tmp_path: Path) -> None:
    """At TP 8 a rank has 96 rows of each expert: vLLM repeats each scale for blocks of 32 by 32. All of them are covered."""
    model = two_layers("qwen3-30b-a3b", tmp_path)
    found = inspected(model, "--trainer", "fsdp=8", "--engine", "tp=8", "--format", "fp8", "--ranks", "2")
    assert (found["ok"], found["figures"]["fallbacks"]) == (True, [])
    assert [c["tensors"] for c in found["figures"]["conversions"] if c["wanted"] == "float8_e4m3fn"] == [
        2 * (3 * 128 + 4)
    ]


@pytest.mark.vllm
@pytest.mark.failure_mode(8)
def test_every_copy_of_a_redundant_expert_is_a_target(tmp_path: Path) -> None:
    """Four experts and two more copies of the first two, over two ranks: both ranks' three are written from the checkpoint's four.

    A trace that knew each expert's place once would leave the copies out, and prove nothing covered.
    """
    model = read_checkpoint(make_tiny_qwen3_moe_of_blocks(tmp_path))
    traces = trace(model, EngineMesh(tensor=2, expert_parallel=True, redundant_experts=2), "bf16", [0, 1])
    assert not isinstance(traces, Refusal), traces
    written: Counter[int] = Counter()
    for each in traces.values():
        assert each.faults == {}
        target = next(t for t in each.layout.targets if t.name == "model.layers.0.mlp.experts.routed_experts.w2_weight")
        assert target.shape[0] == 3
        written.update(int(c.source.split(".")[5]) for c in each.layout.copies if c.target == target.name)
    assert written == {0: 2, 1: 2, 2: 1, 3: 1}


@pytest.mark.vllm
def test_a_size_that_vllm_refuses_is_reported_in_its_own_words(tmp_path: Path) -> None:
    found = inspected(
        two_layers("glm-4.5", tmp_path, first_k_dense_replace=1),
        *("--trainer", "fsdp=8", "--engine", "tp=8", "--format", "fp8", "--ranks", "1"),
        code=1,
    )
    assert found["refusal"]["kind"] == "refused"
    assert "192 is not divisible by weight quantization block_k = 128" in found["refusal"]["message"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["nowhere", "--trainer", "fsdp=8", "--engine", "tp=8"],
            "nowhere: No such file or directory; give a model's folder",
        ),
        (["{model}", "--trainer", "fsdp8", "--engine", "tp=8"], "'fsdp8' is not an axis"),
        (["{model}", "--trainer", "fsdp=8", "--engine", "pp=8"], "'pp' is not an axis"),
        (
            ["{model}", "--trainer", "fsdp=8", "--engine", "tp=8", "--format", "int4"],
            "'int4' is not one of 'bf16', 'fp8'",
        ),
        (["{model}", "--trainer", "fsdp=8", "--engine", "tp=8", "--fabric-gbps", "0"], "0.0 is not in the range x>0"),
        (["{empty}", "--trainer", "fsdp=8", "--engine", "tp=8"], "lacks model_type or architectures"),
        (["{unknown}", "--trainer", "fsdp=8", "--engine", "tp=8"], "model_type 'mamba' has no mapping; known are"),
        (
            ["{int4}", "--trainer", "fsdp=8", "--engine", "tp=8", "--format", "fp8"],
            "quantized by awq in blocks of None",
        ),
        (["{model}", "--engine", "tp=8"], "Missing option '--trainer'"),
    ],
)
def test_a_wrong_question_is_one_line_with_the_cure_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    qwen = json.loads((MODELS / "qwen3-30b-a3b.json").read_text()) | {"num_hidden_layers": 1}
    configs = {
        "{model}": qwen,
        "{empty}": {},
        "{unknown}": {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        "{int4}": {**qwen, "quantization_config": {"quant_method": "awq"}},
    }
    for name, config in configs.items():
        (tmp_path / f"{name[1:-1]}.json").write_text(json.dumps(config))
    done = CliRunner().invoke(
        main, ["inspect", *(str(tmp_path / f"{a[1:-1]}.json") if a in configs else a for a in arguments)]
    )
    assert done.exit_code == 2
    assert says in done.output
    errors = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert done.output.endswith(errors[0] + "\n")


def test_help_teaches_and_loads_neither_torch_nor_vllm() -> None:
    done = CliRunner().invoke(main, ["inspect", "--help"])
    assert "weightsync inspect ./Qwen3-30B-A3B --trainer hsdp=2x32" in done.output
    code = "import sys; from weightsync.cli import main; main(['inspect', '--help'], standalone_mode=False); "
    code += "sys.exit(bool({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def test_a_config_alone_and_the_headers_of_a_checkpoint_tell_the_same_tensors(tmp_path: Path) -> None:
    """Names, shapes and fused parameters; and those of an FP8 checkpoint with its scales."""
    plain = make_tiny_qwen3_moe_of_blocks(tmp_path / "bf16")
    fp8 = quantize_checkpoint(plain, tmp_path / "fp8")
    from_headers, from_config = read_checkpoint(plain), read_checkpoint(plain / "config.json")
    assert (from_headers.learnt_from, from_config.learnt_from) == ("safetensors headers", "config.json")

    def told(parameter: Parameter) -> tuple[Any, ...]:
        return parameter.name, parameter.shape, parameter.parts

    assert sorted(map(told, from_headers.parameters)) == sorted(map(told, from_config.parameters))
    stored = load_file(fp8 / "model.safetensors")
    for checkpoint in (from_config, read_checkpoint(fp8)):
        offered = {source.name: (source.shape, source.dtype) for source in checkpoint.sources("fp8")}
        assert offered == {
            name: (tuple(t.shape), "float32" if name.endswith("_scale_inv") else str(t.dtype).removeprefix("torch."))
            for name, t in stored.items()
        }
    said = from_config.engine_config("fp8")["quantization_config"]
    assert set(said["modules_to_not_convert"]) >= {"lm_head", "model.layers.0.mlp.gate"}


def test_figures_are_those_of_the_plan_and_a_fault_takes_its_module_along() -> None:
    """Two trainer ranks with 3 and 2 rows of a [5, 4] matrix, which two engine ranks want in columns; a bias is faulty.

    The columns are carried packed, so each pair has one write; slots begin at 16 bytes.
    """
    parameters = [
        Parameter(name, shape, ((name, shape, 0),)) for name, shape in (("a.weight", (5, 4)), ("b.weight", (5, 4)))
    ]
    sources = [SourceTensor(p.name, p.shape, p.dtype) for p in parameters]

    def layout(rank: int) -> TargetLayout:
        targets = tuple(Target(f"{m}.weight", (5, 2), "bfloat16") for m in "ab")
        copies = tuple(Copy(f"{m}.weight", 2 * rank, (4, 1), f"{m}.weight", 0, (2, 1), (5, 2)) for m in "ab")
        return TargetLayout(targets, tuple(sources), copies)

    figures = count(
        parameters=parameters,
        sources=sources,
        trainer=TrainerMesh(shards=2),
        engine=EngineMesh(tensor=2),
        layouts={rank: layout(rank) for rank in range(2)},
        faults={"b.bias": "computed"},
    )
    assert figures.covered_elements == 2 * 10
    assert figures.engine_bytes_received == Spread(20, 20, 20)
    assert figures.trainer_bytes_sent == Spread(2 * 2 * 2 * 2, 20, 2 * 3 * 2 * 2)
    assert figures.trainer_arena_bytes == Spread(32, 32, 32)
    assert figures.writes_a_peer == Spread(1, 1, 1)
    assert figures.writes_an_engine_rank == Spread(2, 2, 2)
    assert (figures.pairs, figures.mean_write_bytes, figures.replayed_bytes) == (4, 10, 20)
    assert figures.seconds(8e-9) == 24.0
    assert [(f.parameter, f.reason) for f in figures.fallbacks] == [("b.bias", "computed")]


def test_sampled_ranks_reach_from_the_first_to_the_last() -> None:
    assert list(sampled(8, None)) == list(range(8)) == list(sampled(8, 8))
    assert list(sampled(32, 3)) == [0, 16, 31]
    assert list(sampled(32, 1)) == [0]


@pytest.mark.failure_mode(9)
def test_a_buffer_that_the_checkpoint_keeps_is_offered_in_its_own_dtype(tmp_path: Path) -> None:
    """DeepSeek's router bias: in the config's bf16, a conversion would be counted that nobody makes."""
    model = read_checkpoint(two_layers("deepseek-v3", tmp_path, first_k_dense_replace=1))
    dtypes = {source.name: source.dtype for source in model.sources("bf16")}
    assert dtypes.pop("model.layers.1.mlp.gate.e_score_correction_bias") == "float32"
    assert set(dtypes.values()) == {"bfloat16"}
    assert {"model.layers.1.mlp.experts.255.down_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= dtypes.keys()
