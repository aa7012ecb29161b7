"""vLLM's own CPU kernels repack almost everything: what cannot be written directly is replayed, and comes out as a load does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the probe prints, by family."""
    command = [sys.executable, "-m", "tests.dataplane.vllm_replay_probe", str(tmp_path_factory.mktemp("replay"))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"family')]
    return {line["family"]: line for line in lines}


@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_a_replay_leaves_what_a_load_of_the_same_weights_does(found: dict[str, Any], family: str) -> None:
    """1. only norms, and what latent attention reads itself, are written directly; 2. the probe changed nothing; 3. after a
    replay answers and every tensor are those of an engine that loaded the same checkpoint, W_UV and W_UK_T too.
    """
    replayed, fresh = found[family]["replayed"], found[family]["fresh"]
    assert all("norm" in name or "kv_b_proj" in name for name in replayed["direct"])
    assert any(kernel.endswith(("/oneDNN", "/SGL")) for kernel in replayed["kernels"])  # the latter where the CPU has AMX
    assert ("UnquantizedFusedMoEMethod/CPU" in replayed["kernels"]) == (family != "llama")
    assert replayed["untouched_by_the_probe"]
    assert replayed["answers"] == fresh["answers"] != replayed["before"]
    assert [name for name, digest in fresh["digests"].items() if replayed["digests"].get(name) != digest] == []
    assert any("W_UV" in name for name in fresh["digests"]) == (family == "deepseek")
    assert replayed["addresses_stay"]


@pytest.mark.failure_mode(54)
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_a_replay_that_lacks_one_tensor_changes_nothing(found: dict[str, Any], family: str) -> None:
    replayed = found[family]["replayed"]
    assert "was replayed in part" in replayed["refusal"]
    assert f"{replayed['dropped']}: 0 of" in replayed["refusal"]
    assert replayed["untouched_by_a_part"]


@pytest.mark.failure_mode(55)
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_copies_on_meta_leave_rotary_cache_and_layer_names_alone(found: dict[str, Any], family: str) -> None:
    """Copies of modules are not built by their constructors, which register in these globals."""
    assert found[family]["replayed"]["globals_stay"]
