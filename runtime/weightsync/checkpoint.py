"""A safetensors checkpoint as what a trainer holds, so that a push needs no trainer; and the newest one of a folder of them.

safetensors maps its files into memory: the tensors here cost nothing until a push converts them, one after the other in the order
of the files, and the pages that it has read may be dropped again. Imports torch and safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
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


def newest_checkpoint(folder: Path) -> tuple[Path, int]:
    """(checkpoint, step): of the checkpoints in `folder` the one whose name ends with the highest number, which is its step.

    A torn one, whose files end early or lack one that its index names, is passed over: its trainer may have died as it wrote. A
    folder that is a checkpoint itself is the newest one, at step 0. Raises ConfigError when there is none, with what is wrong
    with the newest of those that are torn.
    """
    if any(folder.glob("*.safetensors")):
        return folder, 0
    torn = ""
    for step, checkpoint in sorted(_numbered(folder), reverse=True):
        if not (what := _damage(checkpoint)):
            return checkpoint, step
        torn = torn or f"; {checkpoint.name} is torn: {what}"
    raise ConfigError(
        f"{folder} holds no complete checkpoint{torn}: expected safetensors files, or folders of them whose names end with a "
        "number, such as step-500"
    )


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    """By the number at the end of their names; hidden ones are somebody's work in progress."""
    for child in folder.iterdir() if folder.is_dir() else ():
        number = re.search(r"(\d+)$", child.name)
        if number and child.is_dir() and not child.name.startswith("."):
            yield int(number[1]), child


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, by their headers and sizes; empty when nothing is."""
    files = {file.name for file in checkpoint.glob("*.safetensors")}
    try:
        missing = sorted(_expected_files(checkpoint, files) - files)
    except (ValueError, KeyError, AttributeError) as error:
        return f"its index cannot be read: {error!r}"
    if missing or not files:
        return f"{len(missing)} files are missing, {missing[0]} first" if missing else "it has no safetensors file"
    for file in sorted(files):
        try:
            with safe_open(checkpoint / file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file}: {error}"
    return ""


def _expected_files(checkpoint: Path, files: set[str]) -> set[str]:
    """What an index names, or the count in a file's name (model-00001-of-00004) tells: the index is written last."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"].values())
    parts = [match for file in files if (match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\.safetensors)", file))]
    return {f"{p[1]}-{i:0{len(p[2])}d}-of-{p[3]}{p[4]}" for p in parts for i in range(1, int(p[3]) + 1)}


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
