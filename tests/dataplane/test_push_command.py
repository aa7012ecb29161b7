"""`weightsync push` and `weightsync verify` on running engines.

Real Redis, ModelExpress, NIXL and `vllm serve`; the commands run in this process. The tests share one session and run in order.
`engine-0` pauses by waiting, `engine-1` keeps what runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dataplane.test_push_fp8 import parameters
from tests.fixtures.fleet import Engine, Fleet, running_fleet, until
from tests.fixtures.models import make_tiny_qwen3_moe, make_tiny_qwen3_moe_of_blocks, quantize_checkpoint
from tests.fixtures.plain_engine import start_plain_engine
from tests.fixtures.servers import free_port
from weightsync.cli import main
from weightsync.commands import push
from weightsync.config import Contract
from weightsync.errors import ConfigError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
POSITIONS = 4096
PROMPTS = [list(range(1, 41)), [9, 8, 7]]


def status_of(*arguments: str) -> int:
    """Exit status of `weightsync ...`, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


class Session:
    """The shared servers, engines and files."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.folder, self.fleet = folder, fleet
        self.engines: list[Engine] = []
        self.config = folder / "contract-push.json"
        self.config.write_text(fleet.contract.model_dump_json(by_alias=True))

    @property
    def contract(self) -> Contract:
        return self.fleet.contract

    def start(self, name: str, pause_mode: str, *arguments: str) -> Engine:
        port = free_port()
        update = {
            "endpoint": self.contract.endpoint.model_copy(update={"port": port}),
            "transfer": self.contract.transfer.model_copy(update={"pause_mode": pause_mode}),
        }
        config = self.folder / f"contract-{name}.json"
        config.write_text(self.contract.model_copy(update=update).model_dump_json(by_alias=True))
        engine = start_plain_engine(
            self.folder,
            name,
            self.fleet.model,
            *("--max-model-len", str(POSITIONS), "--block-size", "32", "--enable-prefix-caching", "--enable-scale-out"),
            *arguments,
            port=port,
            WEIGHTSYNC_CONFIG=str(config),
            POD_NAME=name,
            VLLM_SERVER_DEV_MODE="1",
        )
        engine.http.timeout = httpx.Timeout(300)  # of an answer on a busy machine
        self.engines.append(engine)
        self.fleet.processes.append(engine)
        return engine

    def push(self, checkpoint: Path, *arguments: str) -> int:
        return status_of("push", str(checkpoint), "--config", str(self.config), *arguments)

    def verify(self, *arguments: str) -> int:
        return status_of("verify", "--config", str(self.config), *arguments)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("push")
    model = make_tiny_qwen3_moe(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    with running_fleet(folder, model) as fleet, pytest.MonkeyPatch.context() as environment:
        environment.setenv("UCX_TLS", "tcp,self")
        session = Session(folder, fleet)
        session.start("engine-0", "wait", "--worker-extension-cls", "tests.fixtures.damaged_worker.DamagedWorker")
        session.start("engine-1", "keep")
        for engine in session.engines:
            until(f"{engine.name} is ready", engine.wait_up().ready, 60)
        yield session


def other_weights(model: Path, folder: Path, seed: int, n_files: int = 1) -> Path:
    """The same model with other weights, in so many files."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor
        + torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * tensor.float().std().to(tensor.dtype)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    names = sorted(tensors)
    for number in range(n_files):
        part = {name: tensors[name] for name in names[number::n_files]}
        save_file(part, folder / f"model-{number + 1:05}-of-{n_files:05}.safetensors", metadata={"format": "pt"})
    return folder


def version_of(engine: Engine, prompt: list[int]) -> str:
    """The version in the header of an answer, which vLLM's own label of its outputs must equal."""
    response = engine.complete(prompt, 4)
    assert response.status_code == 200, response.text
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": 4, "temperature": 0, "ignore_eos": True}}
    generated = engine.http.post("/inference/v1/generate", json=body)
    assert generated.status_code == 200, generated.text
    version = response.headers["x-weight-version"]
    assert generated.json()["choices"][0]["weight_versions"] == [{"version": version, "start": 0, "end": 4}]
    assert generated.headers["x-weight-version"] == version
    return version


def test_plain_engines_join_by_environment_alone_and_answer_as_version_0(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [version_of(engine, PROMPTS[1]) for engine in session.engines] == ["0", "0"]
    assert session.verify() == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "engine-0:"],
        ["ok", "engine-1:"],
    ]


@pytest.mark.failure_mode(10)
@pytest.mark.failure_mode(16)
def test_after_a_push_engines_answer_as_a_fresh_one_on_that_checkpoint(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. engines answer, and keep the prefix; 2. a checkpoint of three files is pushed; 3. they answer as a fresh engine, also from
    the prefix, as version 1, and verify finds the digest of the report. Without `clear_cache` in `Replica._pause` the old prefix
    answers in step 3 (tried)."""
    before = [engine.answer(PROMPTS[0]) for engine in session.engines]
    checkpoint = other_weights(session.fleet.model, session.folder / "other", 1, n_files=3)
    assert session.push(checkpoint, "--json") == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert (report["version"], report["replicas"]) == (1, ["engine-0", "engine-1"])
    assert f"{checkpoint}: 45 tensors" in told.err
    fresh = start_plain_engine(session.folder, "fresh", checkpoint).wait_up()
    try:
        expected = [fresh.answer(prompt) for prompt in PROMPTS]
    finally:
        fresh.kill()
    assert expected[0] != before[0]
    for engine in session.engines:
        assert [engine.answer(prompt) for prompt in PROMPTS] == expected
        assert version_of(engine, PROMPTS[0]) == "1"
    assert session.verify("--json") == 0
    assert {finding["digest"] for finding in json.loads(capsys.readouterr().out)} == {report["digest"]}


def test_a_live_trainer_is_not_pushed_aside_unasked(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = session.fleet.start_trainer(ranks=1)
    try:
        assert session.push(session.fleet.model) == 1
        assert "lives: not within 16.0 s: a push of this command would end its pushes" in capsys.readouterr().err
        assert session.push(session.fleet.model, "--take-over") == 0
        (answer,) = trainer.ask(do="push", step=1)
        assert answer["error"] == "FencedOut"
    finally:
        trainer.kill()


@pytest.mark.failure_mode(13)
def test_verify_names_an_engine_whose_memory_differs_and_it_stops_serving(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the comparison in `Receiver.verify` the damage is served, and the command says ok."""
    damaged, whole = session.engines
    answer = damaged.http.post("/collective_rpc", json={"method": "weightsync_damage"})
    assert answer.status_code == 200, answer.text
    assert session.verify() == 1
    differs, ok = capsys.readouterr().out.splitlines()
    assert differs.startswith("DIFFERS  engine-0: DIRTY: 1 targets (")
    assert ok.startswith("ok       engine-1: holds version 2, digest ")
    assert (damaged.complete(PROMPTS[1]).status_code, whole.complete(PROMPTS[1]).status_code) == (503, 200)
    assert session.verify("--replica", "engine-1") == 0
    assert session.verify("--replica", "engine-9") == 2
    assert "has no engine engine-9" in capsys.readouterr().err
    assert session.push(session.fleet.model, "--take-over") == 0
    assert damaged.complete(PROMPTS[1]).status_code == 200
    assert session.verify() == 0


def test_an_fp8_checkpoint_is_refused_with_what_to_push_instead(session: Session, tmp_path: Path) -> None:
    fp8 = quantize_checkpoint(make_tiny_qwen3_moe_of_blocks(tmp_path / "bf16"), tmp_path / "fp8")
    with pytest.raises(ConfigError, match=r"is torch\.float8_e4m3fn: push the checkpoint in bf16 or fp32"):
        push.push(fp8, contract=session.contract, tell=print)


def test_a_bf16_checkpoint_is_converted_for_an_fp8_engine(session: Session, tmp_path: Path) -> None:
    """What the engine's memory holds afterwards is what it would have loaded from the same checkpoint in FP8."""
    bf16 = make_tiny_qwen3_moe_of_blocks(tmp_path / "bf16")
    pushed = other_weights(bf16, tmp_path / "pushed", 3)
    session.fleet.model = quantize_checkpoint(bf16, tmp_path / "fp8")
    session.fleet.contract = session.contract.model_copy(
        update={"session": "fp8", "model": session.contract.model.model_copy(update={"path": str(session.fleet.model)})}
    )
    engine = session.fleet.start_fp8_engine("fp8-0")
    until("the engine has joined", engine.wait_up().ready, 60)
    report = push.push(pushed, contract=session.contract, tell=print)
    assert (report.version, report.replicas) == (1, ("fp8-0",))
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_bytes((pushed / "config.json").read_bytes())
    save_file(load_file(next(pushed.glob("*.safetensors"))), merged / "model.safetensors", metadata={"format": "pt"})
    fresh = session.fleet.start_fp8_engine(
        "fresh-fp8", model=quantize_checkpoint(merged, tmp_path / "merged-fp8"), joins=False
    )
    found, wanted = parameters(engine, tmp_path / "live.pt"), parameters(fresh.wait_up(), tmp_path / "fresh.pt")
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
