"""vLLM's native weight transfer with backend `weightsync`: its own client, routes, factories and server, this package's bytes.

A real `vllm serve` in development mode; the trainer is this process. The tests share the engine and run in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.fleet import Engine
from tests.fixtures.models import make_tiny_qwen3_moe
from tests.fixtures.plain_engine import start_plain_engine
from weightsync.errors import PlanError, PushAborted, RendezvousUnavailable, TransportError, WeightSyncError
from weightsync.writer import Writer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
PROMPT = list(range(1, 41))
"""Longer than a block of 32, so that the prefix cache would answer for it."""
TP = 2
ARGUMENTS = ["--tensor-parallel-size", str(TP)]
BACKEND = '{"backend": "weightsync"}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("native") / "model")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    arguments = [*ARGUMENTS, "--weight-transfer-config", BACKEND, "--block-size", "32", "--enable-prefix-caching"]
    engine = start_plain_engine(model.parent, "native", model, *arguments, VLLM_SERVER_DEV_MODE="1")
    try:
        yield engine.wait_up()
    except BaseException:
        print(engine.tail())
        raise
    finally:
        engine.kill()


@pytest.fixture(scope="module")
def source(model: Path):
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Checkpoint(WeightSource):
        """What a framework iterates over: whole tensors in the checkpoint's names."""

        def __init__(self) -> None:
            self.tensors = load_file(model / "model.safetensors")

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from self.tensors.items()

        def step(self, seed: int) -> None:
            """Other weights, as different ones as a new policy's."""
            generator = torch.Generator().manual_seed(seed)
            for name, tensor in self.tensors.items():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                self.tensors[name] = tensor + noise * tensor.float().std().to(tensor.dtype)

        def save(self, folder: Path) -> Path:
            folder.mkdir()
            for file in model.glob("*.json"):
                (folder / file.name).write_bytes(file.read_bytes())
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder

    return Checkpoint()


@pytest.fixture(scope="module")
def trainer(engine: Engine, source):
    """As a framework makes one, but for the class of the init info."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory

    from weightsync.vllm.native import WeightSyncTrainerInitInfo
    from weightsync.vllm.plugin import register

    register()
    info = WeightSyncTrainerInitInfo(
        rank=0, master_address="127.0.0.1", master_port=0, world_size=1 + TP, timeout_s=30.0
    )
    client = HTTPVLLMWeightSyncClient(engine.url, timeout=60)
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    yield trainer
    trainer.shutdown()


@pytest.mark.failure_mode(10)
@pytest.mark.failure_mode(16)
def test_after_an_update_answers_are_those_of_a_fresh_engine(engine: Engine, trainer, source, tmp_path: Path) -> None:
    """1. the engine answers from the checkpoint, and keeps the prefix; 2. two rounds; 3. it answers as an engine
    that was started on those weights does. Without the reset in `NativeGate._take_over` step 3 answers from the old prefix."""
    first = engine.answer(PROMPT)
    for seed in (1, 2):
        source.step(seed)
        trainer.send_weights()
    answer = engine.answer(PROMPT)
    fresh = start_plain_engine(tmp_path, "fresh", source.save(tmp_path / "saved"), *ARGUMENTS)
    try:
        assert answer == fresh.wait_up().answer(PROMPT)
    finally:
        fresh.kill()
    assert answer != first


def test_each_answer_names_the_version_that_made_it(engine: Engine, trainer) -> None:
    """The trainer's count, which `finish_weight_update` carries: as vLLM's own label, and as a header."""
    held = engine.http.get("/weight_info").json()["weight_version"]
    assert engine.complete(PROMPT, 2).headers["x-weight-version"] == held
    trainer.send_weights()
    assert engine.complete(PROMPT, 2).headers["x-weight-version"] == str(int(held) + 1)


@pytest.mark.failure_mode(13)
@pytest.mark.parametrize(
    ("failure", "told"),
    [(TransportError, "gave up: TransportError: failed after"), (KeyboardInterrupt, "is gone: its connection closed")],
)
def test_an_engine_whose_round_failed_serves_nothing_until_a_later_one_succeeds(
    engine: Engine, trainer, source, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], told: str
) -> None:
    """1. the trainer fails, or ends, with its bytes in and its last word unsaid; 2. the engine refuses, also after somebody resumed
    it; 3. the next round connects anew and repairs it. Without `NativeGate.after` the engine is dead in step 2
    (`_refuse_torn_steps`), and without both it answers from weights that nobody checked."""

    def write_and_fail(writer: Writer, *args: object) -> int:
        monkeypatch.setattr(writer._agent, "notify", lambda *_: None)
        raise failure(f"failed after {write(writer, *args)} bytes")

    write = Writer.write
    source.step(3)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", write_and_fail)
        with pytest.raises(failure, match="failed after"):
            trainer.send_weights()
    refused = engine.complete(PROMPT)
    assert refused.status_code == 503
    assert told in refused.json()["error"]["message"]
    engine.http.post("/resume")
    assert engine.complete(PROMPT).status_code == 503
    trainer.send_weights()
    assert engine.complete(PROMPT).status_code == 200


@pytest.mark.failure_mode(10)
def test_bytes_that_change_on_their_way_are_refused_by_what_memory_holds(
    engine: Engine, trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the trainer's arena is flipped between its digest and its write. Without `_Link.check` it is served."""

    def measure_and_flip(writer: Writer, *args: object) -> None:
        measure(writer, *args)
        writer._slots.buffer[1000] ^= 1

    measure = Writer.measure
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "measure", measure_and_flip)
        with pytest.raises(PushAborted, match=r"1 of \d+ targets differ from what was sent"):
            trainer.send_weights()
    assert engine.complete(PROMPT).status_code == 503
    trainer.send_weights()
    assert engine.complete(PROMPT).status_code == 200


def test_a_round_that_is_not_newer_is_refused_and_changes_nothing(engine: Engine, trainer) -> None:
    before = engine.answer(PROMPT)
    trainer._version = trainer._engines.version = 0
    with pytest.raises(PushAborted, match=r"brings \(epoch, version\) \(1, 1\), this engine holds"):
        trainer.send_weights()
    assert engine.answer(PROMPT) == before
    trainer.send_weights()  # meets the engine again, hears its version, and goes on from there
    assert engine.answer(PROMPT) == before


def test_a_module_is_sent_as_frameworks_hand_it_over(engine: Engine, trainer, source, tmp_path: Path) -> None:
    """vLLM's own `ModuleSource`, with the experts fused as transformers 5 holds them: the answers are those of the same weights
    sent in the checkpoint's names."""
    from transformers import AutoModelForCausalLM
    from vllm.distributed.weight_transfer import ModuleSource

    trainer.send_weights()
    expected = engine.answer(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(source.save(tmp_path / "saved"), dtype=torch.bfloat16)
    source.step(4)
    trainer.send_weights()
    assert engine.answer(PROMPT) != expected
    other = type(trainer).trainer_init(trainer._info, client=trainer.client, source=ModuleSource(model))
    other.send_weights()
    other.shutdown()
    assert engine.answer(PROMPT) == expected


def test_names_that_the_model_does_not_take_are_told_to_the_trainer(engine: Engine, trainer, source) -> None:
    class Renamed(type(source)):
        def metadata(self):
            return [dataclasses.replace(meta, name=f"policy.{meta.name}") for meta in super().metadata()]

    with pytest.raises(PlanError, match=r"2 of 2 engine ranks refuse this trainer: .*policy"):
        type(trainer).trainer_init(trainer._info, client=trainer.client, source=Renamed())
    assert engine.complete(PROMPT).status_code == 200


def test_too_many_expected_engines_are_told_and_the_engine_serves_on(engine: Engine, trainer, source) -> None:
    from weightsync.vllm.native import WeightSyncTrainerInitInfo

    info = WeightSyncTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=0, world_size=4, timeout_s=2.0)
    with pytest.raises(RendezvousUnavailable, match=r"2 of 3 engine ranks came to 127\.0\.0\.1 within 2 s"):
        type(trainer).trainer_init(info, client=trainer.client, source=source)
    assert engine.complete(PROMPT).status_code == 200


@pytest.mark.failure_mode(13)
def test_a_worker_ends_rather_than_compute_with_torn_weights() -> None:
    """Whoever resumes the engine, and however: without the guard the step runs."""
    from vllm.v1.worker.gpu_worker import Worker

    from weightsync.vllm.transfer import _refuse_torn_steps

    _refuse_torn_steps()
    _refuse_torn_steps()
    worker = Worker.__new__(Worker)
    worker.weight_transfer_engine = SimpleNamespace(torn="version 7 was not received whole")
    with pytest.raises(WeightSyncError, match="ends rather than serve torn weights: version 7"):
        worker.execute_model(None)
