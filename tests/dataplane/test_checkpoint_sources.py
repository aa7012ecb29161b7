"""A checkpoint that is pushed without a trainer arrives as an engine would have loaded it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dataplane.family_makers import build, saved
from tests.dataplane.slot_makers import deliver, engine, fill_all, same
from weightsync.checkpoint import sources_of_checkpoint
from weightsync.layout.records import SourceTensor


@pytest.mark.failure_mode(9)
def test_what_a_checkpoint_stores_in_fp32_is_sent_unrounded(tmp_path: Path) -> None:
    """An engine whose router is fp32: the weight is stored in bf16, the bias in fp32.

    Announced in one dtype for all, the bias arrives rounded to bf16: seen to fail with `dtype=None` taken out.
    """
    stored = saved(build("glm4_moe"), tmp_path)
    router = {name: tensor for name, tensor in stored.items() if ".mlp.gate." in name}
    assert {tensor.dtype for tensor in router.values()} == {torch.bfloat16, torch.float32}
    wanted = engine(
        [
            SourceTensor(name, tuple(tensor.shape), "float32" if name in router else "bfloat16")
            for name, tensor in stored.items()
        ]
    )
    memory = deliver(fill_all([sources_of_checkpoint(tmp_path)], wanted), wanted)
    for name, tensor in stored.items():
        assert same(memory[f"p.{name}"], tensor.flatten().float() if name in router else tensor.flatten()), name
