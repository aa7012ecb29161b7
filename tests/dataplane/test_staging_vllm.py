"""vLLM finds the staging arena there when it measures what memory is left for its KV cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.mark.failure_mode(52)
def test_staging_is_taken_before_the_kv_cache_is_sized(tmp_path: Path) -> None:
    """Without `plugin._stage_when_loaded` the arena is not there yet, and would be made when the KV cache has the memory."""
    command = [sys.executable, "-m", "tests.dataplane.vllm_staging_probe", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (seen,) = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["staged"] == seen["parameters"] != []
    assert seen["same"]
