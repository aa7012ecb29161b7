"""What a push tells of itself: phases by rank and peer, bytes, transports, metrics, a trace that a browser opens."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.fixtures.killable import REPLICAS, Fleet
from tests.fixtures.killable_model import SHAPES
from tests.fixtures.servers import free_port
from weightsync.config import TelemetrySection
from weightsync.metrics import ReplicaMetrics, TrainerMetrics
from weightsync.rendezvous.records import Vote, WriterReport
from weightsync.telemetry import (
    TRACES_KEPT,
    Span,
    Stopwatch,
    Transports,
    agree_on_transports,
    seconds_of,
    trace_events,
    write_trace,
)
from weightsync.transport.ucx import UcxLog

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
MODEL_BYTES = 2 * sum(rows * (columns[0] if columns else 1) for rows, *columns in SHAPES.values())
NORM_BYTES = 2 * SHAPES["model.norm.weight"][0]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet after two pushes."""
    folder = tmp_path_factory.mktemp("telemetry")
    (folder / "gates").mkdir()
    asked = TelemetrySection(metrics_port=free_port(), trace_folder=str(folder / "traces"))
    with Fleet(folder, asked, timeout_seconds=30.0) as fleet:
        for name in REPLICAS:
            _until_serving(fleet, name)
        for step in (1, 2):
            for answer in fleet.push(step):
                assert "report" in answer, answer
        yield fleet


def _until_serving(fleet: Fleet, name: str) -> None:
    ends = time.monotonic() + 60
    while not fleet.state(name).get("serving"):
        assert time.monotonic() < ends, f"{name} does not serve: {fleet.state(name)}"
        time.sleep(0.05)


def _scrape(url: str) -> dict[tuple[str, str], float]:
    """Value by (sample's name, values of its labels joined by commas)."""
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 200
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.failure_mode(11)
def test_bytes_are_those_that_arrived_at_the_receivers(fleet: Fleet) -> None:
    """Each replica takes the whole model once; of two tensor parallel ranks each has the norm."""
    assert fleet.pushes()[0].bytes == 2 * MODEL_BYTES + NORM_BYTES


@pytest.mark.failure_mode(32)
def test_the_transport_is_what_ucx_says_that_it_chose(fleet: Fleet) -> None:
    summary = fleet.pushes()[0]
    assert (list(summary.transports), summary.transport_proof) == (["tcp"], "ucx")


def test_the_trace_shows_every_process_its_phases_and_the_wire_to_each_peer(fleet: Fleet) -> None:
    """1. the document has the shape that trace viewers read; 2. each process has its phases, in this order and within the push."""
    files = sorted(Path(fleet.contract.telemetry.trace_folder or "").glob("push-*.json"))
    assert len(files) == 2
    document = json.loads(files[-1].read_text())
    names, phases, wires = {}, {}, {}
    for event in document["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["name"] == "process_name":
            names[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            assert event["ts"] > 0 and event["dur"] >= 0
            (wires if event["args"] else phases).setdefault(event["pid"], []).append(event)
    told = {names[pid]: [event["name"] for event in events] for pid, events in phases.items()}
    assert told["trainer 0"] == ["plan", "plan", "convert", "open", "wire", "wire", "verify", "commit"]
    assert told["trainer 1"] == ["plan", "convert", "wire"]
    for name, mesh in REPLICAS.items():
        assert told[name] == ["pause", "open", "apply", "resume"]
        for rank in range(mesh.ranks):
            assert told[f"{name} rank {rank}"] == ["wire", "verify"]
    peers = {names[pid]: {event["args"]["peer"].rsplit("/", 1)[0] for event in events} for pid, events in wires.items()}
    assert peers == {f"trainer {rank}": {"engine-0/0", "engine-0/1", "engine-1/0"} for rank in (0, 1)}
    assert sum(event["args"]["bytes"] for events in wires.values() for event in events) == 2 * MODEL_BYTES + NORM_BYTES
    moments = [(event["ts"], event["ts"] + event["dur"]) for events in phases.values() for event in events]
    lasted_s = (max(end for _, end in moments) - min(began for began, _ in moments)) / 1e6
    assert lasted_s < fleet.pushes()[0].seconds + 0.5
    assert document["otherData"]["push"] == "1.2.2"


def test_a_trainer_rank_and_a_replica_tell_prometheus(fleet: Fleet) -> None:
    """After two pushes; both ranks of the trainer are in one pod here, at ports of their own."""
    summary = fleet.pushes()[0]
    rank_0 = _scrape(f"http://127.0.0.1:{fleet.contract.telemetry.metrics_port}/metrics")
    assert rank_0["weightsync_pushes_total", "committed"] == 2
    assert rank_0["weightsync_pushed_bytes_total", ""] == 2 * summary.bytes
    assert rank_0["weightsync_version", ""] == 2
    assert rank_0["weightsync_transport_info", "ucx,tcp"] == 1
    assert rank_0["weightsync_push_phase_seconds", "convert"] == pytest.approx(summary.phases["convert"])
    assert sum(name == "weightsync_peer_wire_seconds" for name, _ in rank_0) == 3
    rank_1 = _scrape(f"http://127.0.0.1:{(fleet.contract.telemetry.metrics_port or 0) + 1}/metrics")
    assert rank_1["weightsync_push_phase_seconds", "wire"] > 0
    replica = _scrape(f"{fleet.urls['engine-1']}/weightsync/v1/metrics")
    assert replica["weightsync_replica_version", ""] == replica["weightsync_replica_committed_version", ""] == 2
    assert replica["weightsync_replica_received_bytes", ""] == 2 * MODEL_BYTES
    assert replica["weightsync_replica_pushes_total", "committed"] == 2
    assert replica["weightsync_replica_state", "CLEAN"] == replica["weightsync_replica_serving", ""] == 1
    assert replica["weightsync_replica_phase_seconds", "apply"] > 0


def test_operations_lists_every_metric() -> None:
    """The tables' names are those of both registries, no more and no fewer, but for the operator's."""
    registries: list[CollectorRegistry] = [TrainerMetrics().registry, ReplicaMetrics().registry]
    kinds = {"counter": "_total"}
    made = {family.name + kinds.get(family.type, "") for registry in registries for family in registry.collect()}
    assert (
        set(re.findall(r"^\| `(weightsync_(?!operator_|resource_)\w+)", OPERATIONS.read_text(), re.MULTILINE)) == made
    )


def test_phases_add_up_and_peers_are_parts_of_them() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="within"), watch.phase("wire"):
        raise ValueError("within")
    spans = [*watch.spans, Span("wire", 5.0, 1.0), Span("wire", 5.0, 0.75, "peer", 8)]
    assert seconds_of(spans)["wire"] == pytest.approx(1.0, abs=0.5)
    assert Stopwatch().told(lambda moment: moment + 1) == ()


def test_records_carry_spans_through_json() -> None:
    spans = (Span("wire", 1.5, 0.5, "engine/0/i", 64),)
    report = WriterReport(rank=1, ok=True, spans=spans, transports=("tcp",), transport_proof="ucx")
    assert WriterReport.from_json(report.to_json()) == report
    vote = Vote(replica="engine", rank=0, ok=True, spans=spans)
    assert Vote.from_json(vote.to_json()) == vote


def test_the_last_traces_are_kept(tmp_path: Path) -> None:
    """By epoch, version and attempt as numbers; nobody else's file is touched."""
    (tmp_path / "notes.json").write_text("{}")
    for version in range(1, TRACES_KEPT + 4):
        write_trace(tmp_path, f"1.{version}.{version}", trace_events(f"1.{version}.{version}", {}, {}))
    kept = {file.name for file in tmp_path.iterdir()}
    assert kept == {"notes.json", *(f"push-1.{version}.{version}.json" for version in range(4, TRACES_KEPT + 4))}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ([("tcp", "ucx"), ("cma", "ucx")], (("cma", "tcp"), "ucx")),
        ([("tcp", "ucx"), ("tcp", "exclusion")], (("tcp",), "exclusion")),
        ([("tcp", "ucx"), ("", "")], ((), "")),
        ([], ((), "")),
    ],
)
def test_a_push_is_as_well_proved_as_the_least_of_its_ranks(
    told: list[tuple[str, str]], wanted: tuple[tuple[str, ...], str]
) -> None:
    agreed = agree_on_transports(Transports(names=(name,) if name else (), proof=proof) for name, proof in told)
    assert (agreed.names, agreed.proof) == wanted


UCX_TABLES = """
[1.0] [vm:1:0]   ucp_worker.c:1997 UCX  INFO    a/0 self cfg#0 rma_am(tcp/lo)  amo_am(tcp/lo)  am(tcp/lo tcp/eth0)  ka(tcp/lo)
[1.0] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.0] [vm:1:0]   | a/0 self cfg#0                                           |
[1.0] [vm:1:0]   | remote memory write by ucp_put* from host memory to host |
[1.0] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.0] [vm:1:0]   | 0..inf | zero-copy   | self/memory                       |
[1.0] [vm:1:0]   +--------+-------------+-----------------------------------+
[2.0] [vm:1:0]   +-----------+-------------+------------------------------------------------------+
[2.0] [vm:1:0]   | a/0 inter-node cfg#1                                                           |
[2.0] [vm:1:0]   | remote memory write by ucp_put*(multi) from cuda/GPU0 memory to cuda           |
[2.0] [vm:1:0]   +-----------+-------------+------------------------------------------------------+
[2.0] [vm:1:0]   |   0..2048 | short       | rc_mlx5/mlx5_0:1                                     |
[2.0] [vm:1:0]   | 2049..inf | zero-copy   | 50% on rc_mlx5/mlx5_0:1 and 50% on dc_mlx5/mlx5_1:1 |
[2.0] [vm:1:0]   +-----------+-------------+------------------------------------------------------+
[2.1] [vm:1:0]   +-----------+--------------------+---------------+
[2.1] [vm:1:0]   | a/0 inter-node cfg#1                           |
[2.1] [vm:1:0]   | active message by ucp_am_send* from host memory |
[2.1] [vm:1:0]   +-----------+--------------------+---------------+
[2.1] [vm:1:0]   | 8185..inf | multi-frag copy-in | tcp/lo        |
[2.1] [vm:1:0]   +-----------+--------------------+---------------+
[3.0] [vm:1:0]   ib_device.c:1 UCX  WARN  port is down
"""


@pytest.mark.failure_mode(32)
def test_ucx_tables_are_read_for_writes_to_others_and_complaints_are_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What an agent would do to itself, and messages, move no weights; the log may be read while UCX writes it."""
    file = tmp_path / "ucx.log"
    log = UcxLog(file)
    middle = UCX_TABLES.index("50% on")
    file.write_text(UCX_TABLES[:middle])
    assert log.transports() == ("rc_mlx5",)
    file.write_text(UCX_TABLES)
    assert log.transports() == ("dc_mlx5", "rc_mlx5")
    assert "UCX warn: port is down" in caplog.text


def test_who_asks_ucx_for_its_words_elsewhere_gets_them_there() -> None:
    environ = {"UCX_LOG_LEVEL": "debug"}
    log = UcxLog.make(environ)
    with log.asked_for(environ):
        assert environ == {"UCX_LOG_LEVEL": "debug"}
    assert log.transports() == ()


def test_two_agents_that_are_made_at_once_do_not_take_each_others_question_away() -> None:
    """Loans make theirs on threads: the second's variables were gone when the first was done, and it failed with a KeyError."""
    environ: dict[str, str] = {}
    log, inside = UcxLog.make(environ), threading.Event()

    def ask() -> None:
        with log.asked_for(environ):
            inside.set()

    with log.asked_for(environ):
        second = threading.Thread(target=ask)
        second.start()
        assert not inside.wait(0.2)
        assert environ["UCX_PROTO_INFO"] == "y"
    second.join()
    assert (inside.is_set(), environ) == (True, {})


def test_ucx_is_asked_only_while_an_agent_is_made() -> None:
    environ: dict[str, str] = {}
    log = UcxLog.make(environ)
    with log.asked_for(environ):
        assert environ["UCX_PROTO_INFO"] == "y"
    assert environ == {}
