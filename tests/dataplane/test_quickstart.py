"""docs/quickstart.md, run as it stands: its bash blocks are the test, in order, in one shell.

What a reader is told to have is put on PATH: the servers, `vllm` (here its CPU build) and `weightsync`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.lab.tools import ensure_tool
from tests.fixtures.fleet import CPU_ENGINE
from tests.fixtures.models import make_tiny_qwen3_moe
from tests.fixtures.plain_engine import ENGINE_ARGUMENTS, REPOSITORY
from tests.fixtures.servers import free_port

DOCUMENT = REPOSITORY / "docs" / "quickstart.md"
SECTION = "## Push a checkpoint into a running engine"
LIMIT_S = 280

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(LIMIT_S + 20)]


def script() -> str:
    section = DOCUMENT.read_text().split(SECTION, 1)[1].split("\n## ", 1)[0]
    return "\n".join(["set -eu", *re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)])


def put_on_path(folder: Path) -> str:
    """A PATH that begins with what the reader has installed."""
    folder.mkdir()
    programs = {
        "modelexpress-server": f'exec {ensure_tool("modelexpress")} "$@"',
        "vllm": f'cd {REPOSITORY}; exec {sys.executable} -m tests.fixtures.plain_vllm "$@"',
        "weightsync": f'exec {sys.executable} -m weightsync.cli "$@"',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_commands_push_a_checkpoint_into_a_plain_vllm(tmp_path: Path) -> None:
    """1. every command ends well, so the plain engine joined by VLLM_PLUGINS and WEIGHTSYNC_CONFIG alone; 2. the push brought
    version 1; 3. the answer says that it is of version 1; 4. verify found it in the engine's memory."""
    model = make_tiny_qwen3_moe(tmp_path / "model")
    ports = {name: str(free_port()) for name in ("REDIS_PORT", "MX_PORT", "PORT")}
    environment = {
        **os.environ,
        **CPU_ENGINE,
        **ports,
        "PATH": put_on_path(tmp_path / "bin"),
        "MODEL": str(model),
        "CHECKPOINT": str(model),
        "VLLM_ARGUMENTS": " ".join(ENGINE_ARGUMENTS),
        "MODEL_EXPRESS_CACHE_DIRECTORY": str(tmp_path),
        "POD_NAME": "engine-0",
    }
    log = tmp_path / "output"
    with log.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script()], cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        status = shell.wait(LIMIT_S)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)  # the servers and the engine, which run on in the background
        output = log.read_text()
        print(output[-5000:])
    assert status == 0
    assert "version  1 (epoch 1, step 0)" in output
    assert "x-weight-version: 1" in output.lower()
    body = next(json.loads(line) for line in output.splitlines() if line.startswith('{"id"'))
    assert len(body["choices"][0]["token_ids"]) == 8
    assert re.search(r"^ok +engine-0: holds version 1, digest [0-9a-f]{16}$", output, flags=re.MULTILINE)
