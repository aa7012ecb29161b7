"""`weightsync bench`: real NIXL between two processes, what moved the bytes told by UCX, the bytes checked where they arrive."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.dataplane.test_contract import document
from tests.fixtures.servers import free_port
from weightsync.benchmark.engine import SOURCE, layout_of, serve
from weightsync.benchmark.streams import take_turns
from weightsync.benchmark.wire import measure_wire
from weightsync.channel import Channel
from weightsync.cli import main
from weightsync.errors import ConfigError, TransportError
from weightsync.layout.records import Holding, SourceLayout, SourceTensor
from weightsync.plan import make_plan
from weightsync.transport import Transfer, TransferState
from weightsync.waiting import Deadline

LIMIT_S = 120.0
SMALL = ["--device", "cpu", "--payload", "4M", "--sizes", "64K,2M", "--turns", "2"]
OVER_TCP = {**os.environ, "UCX_TLS": "tcp,self", "OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "weightsync.cli", "bench", *words]


def test_two_processes_of_this_machine_over_the_fabric_that_is_asked_for() -> None:
    """1. Every row has a rate, and pushes are held against the best stream. 2. UCX itself says what moved the bytes."""
    done = subprocess.run(command(*SMALL, "--json"), env=OVER_TCP, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["transports"], found["transport_proof"]) == (["tcp"], "ucx")
    rates = found["streams"]
    assert len(rates) == 5 and min(rates.values()) > 0 and found["best_stream"] == max(rates, key=rates.get)
    assert [(push["write_bytes"], push["writes"]) for push in found["pushes"]] == [(65536, 64), (2097152, 2)]
    for push in found["pushes"]:
        assert push["of_best_stream"] == pytest.approx(push["gbps"] / max(rates.values()))
    assert list(found["conversion"]) == ["plain copy", "bf16 as it is", "bf16 to FP8 128x128"]
    assert min(found["conversion"].values()) > 0


@pytest.fixture
def listener() -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A process that listens, its address and its token, out of the command that it prints."""
    process = subprocess.Popen(
        command("--listen", "127.0.0.1:0", "--device", "cpu", "--payload", "4M"),
        env=OVER_TCP,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        told = next(found for line in process.stderr if (found := re.search(r"THIS-NODE:(\d+) --token (\w+)", line)))
        yield process, f"127.0.0.1:{told[1]}", told[2]
    finally:
        process.kill()
        process.wait()


def test_two_nodes_one_listens_and_one_connects(
    listener: tuple[subprocess.Popen[str], str, str], tmp_path: Path
) -> None:
    """1. A stranger's token is turned away, and who has the right one still comes in. 2. The contract's fabric judges.

    3. The side that listened ends by itself.
    """
    process, address, token = listener
    contract = tmp_path / "contract.json"
    contract.write_text(document(fabric={"profile": "ib", "transports": ["rc_mlx5"]}))
    host, _, port = address.partition(":")
    with (
        closing(Channel.connect(host, int(port), "a guess", Deadline(LIMIT_S))) as stranger,
        pytest.raises(TransportError, match="gone: its connection closed"),
    ):
        stranger.receive(Deadline(LIMIT_S))
    done = subprocess.run(
        command(*SMALL, "--sizes", "1M", "--connect", address, "--token", token, "--config", str(contract)),
        env=OVER_TCP,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 1
    assert "transports: tcp (in UCX's own words), NONE of what the fabric wants: rc_mlx5" in done.stdout
    assert "push, 4 writes of 1 MiB" in done.stdout
    assert process.wait(LIMIT_S) == 0


@pytest.fixture
def channel() -> Iterator[Channel]:
    """The other end is an engine in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        came: list[Channel | None] = []
        accepting = threading.Thread(target=lambda: came.append(Channel.accept(server, "t", Deadline(5.0))))
        accepting.start()
        ours = Channel.connect("127.0.0.1", server.getsockname()[1], "t", Deadline(5.0))
        accepting.join()
    theirs = came[0]
    assert theirs is not None
    faults: list[Exception] = []

    def be_engine() -> None:
        try:
            serve(theirs, "cpu", 1 << 20)
        except TransportError as error:
            faults.append(error)

    engine = threading.Thread(target=be_engine)
    engine.start()
    with closing(theirs):
        with closing(ours):
            yield ours
        engine.join(LIMIT_S)
        assert not engine.is_alive()


def wire(channel: Channel, payload_bytes: int = 1 << 20) -> Any:
    return measure_wire(
        channel, payload_bytes=payload_bytes, sizes=[4096, 65536], device="cpu", turns=1, deadline=Deadline(30.0)
    )


@pytest.mark.failure_mode(11)
def test_a_rate_at_which_nothing_was_moved_is_no_result(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers that are done at once and move nothing: the engine finds memory that nobody wrote."""

    def post(transfer: Transfer) -> None:
        transfer._state = TransferState.DONE

    monkeypatch.setattr(Transfer, "post", post)
    with pytest.raises(TransportError, match=r"writes of 4096 bytes left other bytes .* 1048576 with digest"):
        wire(channel)


def test_the_other_side_gives_no_more_memory_than_it_was_told(channel: Channel) -> None:
    with pytest.raises(ConfigError, match="gives 1048576 bytes at most, see --payload"):
        wire(channel, payload_bytes=2 << 20)


@pytest.mark.parametrize("write_bytes", [2, 64, 1024])
def test_the_plan_keeps_writes_of_the_size_that_is_measured(write_bytes: int) -> None:
    """Neighbours that could be merged would be measured as one large write."""
    held = SourceLayout(0, (SourceTensor(SOURCE, (512,), "bfloat16"),), (Holding(SOURCE, 0, 512, 0),))
    writes = make_plan([held], layout_of(1024, write_bytes)).writes(0)
    assert (writes["length"] * 2).tolist() == [write_bytes] * (1024 // write_bytes)


def test_turns_end_with_their_time_and_one_counts_at_least() -> None:
    ran: list[str] = []
    runs = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = take_turns(runs, turns=1000, deadline=Deadline(-1.0), before=lambda name: ran.append(f"before {name}"))
    assert ran == ["before a", "a", "before b", "b"] * 2
    assert seconds.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--payload", "1M", "--sizes", "3K"], "3072: each must be even and divide --payload, 1048576 bytes"),
        (["--sizes", "64Q"], "say bytes, or 64K, 16M, 1G"),
        (["--device", "tpu"], "device tpu: this process sees"),
        (["--connect", "127.0.0.1:1"], "--connect needs --token"),
        (["--connect", "nowhere", "--token", "t"], "say HOST:PORT"),
    ],
)
def test_a_wrong_question_is_told_with_what_to_say(words: list[str], match: str) -> None:
    done = CliRunner().invoke(main, ["bench", *words])
    assert done.exit_code == 2
    assert match in " ".join(done.output.split())


def test_help_teaches_and_loads_no_torch() -> None:
    done = CliRunner().invoke(main, ["bench", "--help"])
    assert "node-2$ weightsync bench --connect node-1:9999 --token" in done.output
    code = "import sys; from weightsync.cli import main; main(['bench', '--help'], standalone_mode=False); "
    code += "sys.exit(bool({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def test_nobody_listens() -> None:
    port = free_port()
    done = CliRunner().invoke(main, ["bench", *SMALL, "--connect", f"127.0.0.1:{port}", "--token", "t"])
    assert done.exit_code == 1
    assert f"nobody listens at 127.0.0.1:{port}" in done.output
