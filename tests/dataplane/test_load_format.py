"""An engine offers its live parameters only where they are what the loader wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsync.errors import UnsupportedLayout
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.vllm.worker import check_load_format


def stacked(folder: Path) -> tuple[dict[str, torch.Tensor], TargetLayout]:
    """A parameter `up` [6, 4] that two checkpoint tensors, in two files, are stacked into."""
    weights = {name: torch.randn(3, 4, dtype=torch.bfloat16) for name in ("a", "b")}
    for name, tensor in weights.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    copies = tuple(Copy(name, 0, (4, 1), "up", 12 * i, (4, 1), (3, 4)) for i, name in enumerate(weights))
    sources = tuple(SourceTensor(name, (3, 4), "bfloat16") for name in weights)
    layout = TargetLayout(targets=(Target("up", (6, 4), "bfloat16"),), sources=sources, copies=copies)
    return {"up": torch.cat(list(weights.values()))}, layout


def test_parameters_as_loaded_are_accepted(tmp_path: Path) -> None:
    params, layout = stacked(tmp_path)
    check_load_format(params, layout, str(tmp_path))


@pytest.mark.failure_mode(3)
def test_a_parameter_repacked_to_the_same_size_is_refused_by_name(tmp_path: Path) -> None:
    params, layout = stacked(tmp_path)
    params["up"] = params["up"].flip(0).contiguous()
    with pytest.raises(UnsupportedLayout, match="up"):
        check_load_format(params, layout, str(tmp_path))
