"""Asks vLLM about the models that WeightSync knows, while the image is built, and keeps the answers in a folder of the image.

vLLM inspects a model's class in a process of its own, which imports all of vLLM once more: 11 of the 35 seconds in which an engine
starts on 2 cores. `weightsync.vllm.serve` puts the folder into the engine's cache. Runs in the image's environment.
"""

import os
import sys
from pathlib import Path

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def main(folder: Path) -> None:
    """Fill `folder` as vLLM fills VLLM_CACHE_ROOT. Raises FileNotFoundError when vLLM has kept nothing."""
    os.environ["VLLM_CACHE_ROOT"] = str(folder)
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.models[architecture].inspect_model_cls()
    kept = sorted((folder / "modelinfos").glob("*.json"))
    if len(kept) != len(ARCHITECTURES):
        raise FileNotFoundError(
            f"{folder}: {len(kept)} answers of {len(ARCHITECTURES)}: does vLLM cache them elsewhere now?"
        )
    for path in kept:
        path.chmod(0o644)  # vLLM writes them for its own user alone


if __name__ == "__main__":
    main(Path(sys.argv[1]))
