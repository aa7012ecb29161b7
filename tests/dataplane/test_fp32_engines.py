"""Engines that compute in fp32 (`model.dtype`), by a push of fp32 masters whose checkpoint is in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.fleet import running_fleet, until
from tests.fixtures.models import make_tiny_qwen3_moe

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [100, 200, 300, 400], [42]]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_an_engine_in_fp32_answers_as_a_fresh_one_and_one_in_bf16_says_why_it_does_not_join(tmp_path: Path) -> None:
    with running_fleet(tmp_path, make_tiny_qwen3_moe(tmp_path / "model"), dtype="float32") as fleet:
        live, other = fleet.start_engine("engine-0"), fleet.start_engine("engine-1", more=("--dtype", "bfloat16"))
        trainer = fleet.start_trainer()
        until("engine-0 has joined", live.wait_up().ready, 60)
        assert trainer.push(1)["replicas"] == ["engine-0"]
        other.wait_up()

        def refused() -> bool:
            answer = other.get("/weightsync/v1/ready")
            return answer is not None and (answer.status_code, "computes in torch.bfloat16" in answer.text) == (
                503,
                True,
            )

        until("engine-1 says why", refused, 60)
        other.kill()
        trainer.ask(do="save", path=str(tmp_path / "saved"))
        fresh = fleet.start_engine("fresh", model=tmp_path / "saved", joins=False).wait_up()
        for prompt in PROMPTS:
            assert live.answer(prompt) == fresh.answer(prompt)
