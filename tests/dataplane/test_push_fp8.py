"""bf16 in the trainer, FP8 in the engines: what a push leaves in an engine is what it would have loaded from an FP8 checkpoint.

Real Redis, ModelExpress, NIXL, trainer ranks and vLLM's own model and loader; the engines cannot compute
(tests/fixtures/fp8_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures.fleet import Engine, Fleet, running_fleet, until
from tests.fixtures.models import make_tiny_qwen3_moe_of_blocks, quantize_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
RANKS = 3
"""Rows of 256, 86 a rank: FP8 blocks straddle them; of the four experts the last rank holds none."""


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    bf16 = make_tiny_qwen3_moe_of_blocks(tmp_path / "bf16")
    fp8 = quantize_checkpoint(bf16, tmp_path / "fp8", ue8m0=request.param.endswith("ue8m0"))
    with running_fleet(tmp_path, fp8, trained=bf16, format=request.param) as fleet:
        yield fleet


def parameters(engine: Engine, file: Path) -> dict[str, torch.Tensor]:
    """What is in an engine's memory, as bytes."""
    answer = engine.get(f"/parameters?path={file}")
    assert answer is not None and answer.status_code == 200, answer
    return {name: value.reshape(-1).view(torch.uint8) for name, value in torch.load(file).items()}


@pytest.mark.failure_mode(6)
@pytest.mark.failure_mode(4)
@pytest.mark.parametrize("fleet", ["auto", "fp8-128x128-ue8m0"], indirect=True)
def test_an_engine_holds_what_it_would_have_loaded(fleet: Fleet, tmp_path: Path) -> None:
    live = fleet.start_fp8_engine("engine-0")
    trainer = fleet.start_trainer(ranks=RANKS)
    live.wait_up()
    until("the engine has joined", live.ready, 60)
    loaded = parameters(live, tmp_path / "before.pt")
    for step in (1, 2):
        report = trainer.push(step)
        assert (report["version"], report["replicas"]) == (step, ["engine-0"])
    trainer.ask(do="save", path=str(tmp_path / "saved"))
    saved = quantize_checkpoint(
        tmp_path / "saved", tmp_path / "saved-fp8", ue8m0=fleet.contract.transfer.format != "auto"
    )
    fresh = fleet.start_fp8_engine("fresh", model=saved, joins=False).wait_up()
    found, wanted = parameters(live, tmp_path / "live.pt"), parameters(fresh, tmp_path / "fresh.pt")
    assert found.keys() == wanted.keys() == loaded.keys()
    assert sum(name.endswith("scale_inv") for name in found) >= 8
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    # Weights change by some percent, which moves few powers of two to the next: their scales prove nothing here.
    coarse = "scale_inv" if fleet.contract.transfer.format != "auto" else "(none)"
    unchanged = [name for name in found if torch.equal(found[name], loaded[name]) and not name.endswith(coarse)]
    assert len(unchanged) <= 1, unchanged  # of two steps' factors one pair nearly cancels
    assert live.verify()["digest"] == report["digest"]


@pytest.mark.failure_mode(9)
@pytest.mark.parametrize("fleet", ["bf16"], indirect=True)
def test_engines_of_another_format_than_the_contracts_are_refused(fleet: Fleet) -> None:
    live = fleet.start_fp8_engine("engine-0")
    trainer = fleet.start_trainer(ranks=1)
    live.wait_up()
    until("the engine has joined", live.ready, 60)
    (answer,) = trainer.ask(do="push", step=1)
    assert answer["error"] == "PlanError"
    assert "transfer.format is bf16, but engines want" in answer["message"]
    assert live.ready()
