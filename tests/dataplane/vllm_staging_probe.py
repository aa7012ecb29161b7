"""Run by test_staging_vllm in a process of its own: `python -m tests.dataplane.vllm_staging_probe FOLDER`.

Starts vLLM's CPU build on a tiny random model in this one process, with a contract that stages; prints as JSON on its last line
what there was of the staging arena when vLLM sized its KV cache.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")


def main(folder: str) -> None:
    from tests.fixtures.models import make_tiny_llama

    make_tiny_llama(Path(folder, "model"))
    contract = {
        "session": "s1",
        "name": "probe",
        "model": {"path": f"{folder}/model"},
        "redis": {"host": "none"},
        "modelExpress": {"address": "none:1"},
        "endpoint": {"tokenFile": "/none"},
        "fabric": {"profile": "tcp", "transports": ["tcp"]},
        "transfer": {"commit": "staged", "staging": "device"},
    }
    config = Path(folder, "contract.json")
    config.write_text(json.dumps(contract))
    os.environ["WEIGHTSYNC_CONFIG"] = str(config)
    from weightsync.vllm.plugin import register

    register()
    register()  # vLLM calls it several times
    from vllm import LLM
    from vllm.v1.worker.cpu_worker import CPUWorker

    seen: list[dict[str, Any]] = []
    sizes = CPUWorker.determine_available_memory

    def look_and_size(worker: Any) -> int:
        arena = getattr(worker, "_weightsync_staging", None)
        parameters = dict(worker.model_runner.model.named_parameters())
        seen.append(
            {
                "staged": [] if arena is None else sorted(arena.tensors),
                "parameters": sorted(parameters),
                "same": arena is not None and all(bool((arena.tensors[n] == p).all()) for n, p in parameters.items()),
            }
        )
        return sizes(worker)

    CPUWorker.determine_available_memory = look_and_size  # type: ignore[method-assign]
    extension = "weightsync.vllm.worker.WorkerExtension"
    LLM(
        f"{folder}/model",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        dtype="bfloat16",
        worker_extension_cls=extension,
    )
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
