"""bf16 in the trainer, FP8 in the engines: what a push leaves in an engine is what it would have loaded from an FP8 checkpoint.

Real Redis, ModelExpress, NIXL, trainer ranks and vLLM's own model and loader; the engines cannot compute
(tests/fixtures/fp8_engine.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures.fleet import Engine, Fleet, running_fleet, until
from tests.fixtures.models import make_tiny_qwen3_moe_of_blocks, quantize_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
RANKS = 3
"""Rows of 256, 86 a rank: FP8 blocks straddle them; of the four experts the last rank holds none."""

SHORT_S = 12.0
"""Of a push that is going to end by its deadline."""


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    bf16 = make_tiny_qwen3_moe_of_blocks(tmp_path / "bf16")
    fp8 = quantize_checkpoint(bf16, tmp_path / "fp8", ue8m0=request.param.endswith("ue8m0"))
    how = {"timeout_seconds": SHORT_S} if request.param == "short" else {"format": request.param}
    with running_fleet(tmp_path, fp8, trained=bf16, **how) as fleet:
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


@pytest.mark.failure_mode(4)
@pytest.mark.failure_mode(13)
@pytest.mark.parametrize("fleet", ["short"], indirect=True)
def test_a_push_that_ends_while_ranks_agree_on_scales_leaves_the_next_one_whole(fleet: Fleet, tmp_path: Path) -> None:
    """Blocks straddle three ranks, which agree on their scales. 1. one rank has a NaN in them: all hear of it, nothing is served,
    and none waits for another beyond the push's deadline; 2. one rank is stopped before it agrees: the others' push ends by the
    deadline; 3. when it goes on, the next push is whole, by every digest and byte.
    """
    live = fleet.start_fp8_engine("engine-0")
    trainer = fleet.start_trainer(ranks=RANKS)
    live.wait_up()
    until("the engine has joined", live.ready, 60)
    loaded = parameters(live, tmp_path / "before.pt")

    trainer.ranks[1].tell(do="spoil", name="q_proj")
    assert trainer.ranks[1].hear()["spoiled"] >= 1
    answers = trainer.ask(do="push", step=1)
    assert answers[1]["error"] == "ConversionError", answers
    assert all("not finite" in answer["message"] and "q_proj" in answer["message"] for answer in answers), answers
    trainer.ranks[1].tell(do="spoil", name="q_proj")
    trainer.ranks[1].hear()

    os.kill(trainer.ranks[2].process.pid, signal.SIGSTOP)
    for rank in trainer.ranks:
        rank.tell(do="push", step=2)
    for rank in trainer.ranks[:2]:
        assert rank.hear()["error"] in ("PushAborted", "DeadlineExceeded")
    assert live.ready()
    unchanged = parameters(live, tmp_path / "unchanged.pt")
    assert all(torch.equal(unchanged[name], loaded[name]) for name in loaded)
    os.kill(trainer.ranks[2].process.pid, signal.SIGCONT)
    assert "error" in trainer.ranks[2].hear()

    report = trainer.push(3)
    trainer.ask(do="save", path=str(tmp_path / "saved"))
    fresh = fleet.start_fp8_engine("fresh", model=quantize_checkpoint(tmp_path / "saved", tmp_path / "f8"), joins=False)
    fresh.wait_up()
    found, wanted = parameters(live, tmp_path / "live.pt"), parameters(fresh, tmp_path / "fresh.pt")
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
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
