"""A safetensors checkpoint as what a trainer holds, so that a push needs no trainer.

safetensors maps its files into memory: the tensors here cost nothing until a push converts them, one after the other in the order
of the files, and the pages that it has read may be dropped again. Imports torch and safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from weightsync.conversion.registry import CASTS
from weightsync.errors import ConfigError
from weightsync.layout.families import DENSE
from weightsync.layout.shards import LocalSources, sources_of


def sources_of_checkpoint(folder: Path) -> LocalSources:
    """One rank that holds every tensor of a checkpoint whole, in the dtype that it is stored in.

    Raises ConfigError when the folder holds no safetensors file, or a tensor that nothing is converted from (FP8, integers).
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder} has no safetensors file: give the folder of a checkpoint, as save_pretrained writes it"
        )
    return sources_of(_tensors(files), DENSE, dtype=None)


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = opened.get_tensor(name)
                if tensor.dtype not in CASTS:
                    raise ConfigError(
                        f"{file.name}: {name} is {tensor.dtype}: push the checkpoint in bf16 or fp32, engines that serve FP8 get "
                        "it converted"
                    )
                yield name, tensor
