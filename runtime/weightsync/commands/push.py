"""`weightsync push CHECKPOINT`: a checkpoint into running engines, with no trainer.

One process takes a trainer's place: it opens an epoch of the session, makes one push with the machinery of `Publisher`, and leaves.
Engines keep what it brought; one that restarts later is behind, and says so until somebody pushes again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from weightsync.checkpoint import newest_checkpoint, sources_of_checkpoint
from weightsync.config import Contract, PodFacts
from weightsync.errors import DeadlineExceeded, FencedOut, LedgerUnavailable
from weightsync.publisher import Publisher, PushReport
from weightsync.rendezvous.heartbeat import LEASE_TTL_S
from weightsync.rendezvous.ledger import Ledger
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import Decision, ReplicaState

LOOK_S = 0.1
Tell = Callable[[str], None]


def push(
    checkpoint: Path,
    *,
    contract: Contract,
    step: int = 0,
    take_over: bool = False,
    if_lost: int | None = None,
    tell: Tell,
) -> PushReport | None:
    """Push the safetensors files in folder `checkpoint` into every engine of the contract's session; `tell` hears of progress.

    if_lost: push only while this is the committed version and no engine that lives holds it; None is returned otherwise.

    Raises ConfigError for a folder that cannot be pushed, FencedOut while a trainer of the session lives unless `take_over` (which
    ends its pushes for good), and whatever `Publisher.push` raises.
    """
    started = time.monotonic()

    def tell_at(line: str) -> None:
        tell(f"{time.monotonic() - started:6.1f} s  {line}")

    local = sources_of_checkpoint(checkpoint)
    tell_at(f"{checkpoint}: {len(local.tensors)} tensors, {local.arena_numel / 1e9:.3f} billion elements")
    with Ledger.from_contract(contract) as ledger:
        if not take_over:
            _require_no_trainer(ledger, tell_at)
        if if_lost is not None and (why_not := _found_again(ledger, if_lost)):
            tell_at(f"{why_not}: nothing is pushed")
            return None
        with Publisher(local, contract=_copying(contract), facts=PodFacts.load()) as publisher:
            report = _push_and_tell(publisher, step, ledger, tell_at)
        ledger.drop_writer_lease(publisher.epoch, 0)  # or the next push would wait for it to run out
        return report


def run(
    checkpoint: Path,
    *,
    config: Path | None = None,
    step: int | None = None,
    newest: bool = False,
    if_lost: int | None = None,
    take_over: bool = False,
    as_json: bool = False,
) -> None:
    """The command: progress on standard error, the report on standard output.

    `config` is the session's contract; without it the one that WEIGHTSYNC_CONFIG names. With `newest` the checkpoint is one of
    folder `checkpoint`, and the number in its name the step. Raises what `push` raises.
    """
    contract = Contract.load() if config is None else Contract.load({"WEIGHTSYNC_CONFIG": str(config)})
    checkpoint, its_step = newest_checkpoint(checkpoint) if newest else (checkpoint, 0)
    step = its_step if step is None else step
    report = push(checkpoint, contract=contract, step=step, take_over=take_over, if_lost=if_lost, tell=_to_stderr)
    if report is None:
        return
    print(json.dumps(dataclasses.asdict(report)) if as_json else table(report))


def table(report: PushReport) -> str:
    """A report for people, a row a fact."""
    rows = {
        "version": f"{report.version} (epoch {report.epoch}, step {report.step})",
        "engines": ", ".join(report.replicas),
        "bytes": f"{report.bytes:,}, counted at the engines",
        "seconds": f"{report.seconds:.2f}, of which engines were paused {report.pause_seconds:.2f} at most",
        "GB/s": f"{report.gbps:.2f} on the wire",
        "digest": f"{report.digest}, measured in every engine's live memory",
    }
    return "\n".join(f"{name:8} {value}" for name, value in rows.items())


HELP = """Push the safetensors files in folder CHECKPOINT into every running engine of a session, with no trainer.

Takes a trainer's place for one push: FP8 engines get their blocks, tensor-parallel ones their slices. Refused while a trainer
of the session lives.

\b
Example:
  weightsync push ./SmolLM2-135M-Instruct --config contract.json

Exit codes: 0 every engine serves it; 1 it was not pushed, and the error says why; 2 the question is wrong.
"""


@click.command("push", help=HELP)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="The session's contract; default $WEIGHTSYNC_CONFIG.")
@click.option("--step", type=int, help="A label for the report and the status; default 0, or by --newest the name's.")
@click.option("--newest", is_flag=True, help="CHECKPOINT holds checkpoints: push the one whose name ends highest.")
@click.option("--if-lost", type=int, metavar="VERSION", help="Only while no engine holds VERSION, the committed one.")
@click.option("--take-over", is_flag=True, help="Push although a trainer lives, which is then refused for good.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def command(**options: Any) -> None:
    run(**options)


def _push_and_tell(publisher: Publisher, step: int, ledger: Ledger, tell: Tell) -> PushReport:
    """Push on a thread, and meanwhile tell what the ledger shows of it."""
    with concurrent.futures.ThreadPoolExecutor(1, "push") as pool:
        pushing = pool.submit(publisher.push, step=step)
        told = ""
        while not pushing.done():
            try:
                stage = _stage(ledger, publisher.epoch)
            except LedgerUnavailable as error:  # the push is patient, and says itself when it has waited enough
                stage = str(error)
            if stage != told:
                tell(stage)
                told = stage
            concurrent.futures.wait([pushing], timeout=LOOK_S)
        return pushing.result()


def _found_again(ledger: Ledger, version: int) -> str:
    """Why a version need not be replaced by a checkpoint; empty when it must. A ledger that has lost it is told of it."""
    head = ledger.head()
    if head.version > version:
        return f"version {head.version} was committed since"
    held = [m for m in ledger.live_members().values() if m.version >= version and m.state != ReplicaState.DIRTY]
    if held:
        return f"{held[0].replica} holds version {held[0].version}"
    if head.version < version:
        ledger.raise_head(head.epoch, version)
    return ""


def _copying(contract: Contract) -> Contract:
    """A checkpoint is a mapped file, read-only: no NIC can register it."""
    return contract.model_copy(update={"transfer": contract.transfer.model_copy(update={"zero_copy": False})})


def _require_no_trainer(ledger: Ledger, tell: Tell) -> None:
    """Raise FencedOut when the last epoch's first rank renews its lease; one that has just ended is waited for."""
    epoch = ledger.head().epoch
    if epoch == 0 or 0 in ledger.lost_writers(epoch, 1):
        return
    tell(f"the trainer of epoch {epoch} was there a moment ago: waiting {LEASE_TTL_S:.0f} s for its lease to run out")
    try:
        wait_until(
            lambda: 0 in ledger.lost_writers(epoch, 1) or None,
            deadline=Deadline(LEASE_TTL_S + 1.0),
            what=f"the trainer of epoch {epoch} lives",
        )
    except DeadlineExceeded as error:
        raise FencedOut(
            f"{error}: a push of this command would end its pushes; end the trainer, or say --take-over"
        ) from error


def _stage(ledger: Ledger, epoch: int) -> str:
    """How far the newest push of an epoch is, in words."""
    current = ledger.current_push(epoch)
    if current is None:
        return f"epoch {epoch}: waiting for engines, planning"
    push_id = current[1]
    verdict, reports = ledger.decision(push_id), ledger.writer_reports(push_id)
    if verdict is not None and verdict.decision is not Decision.OPEN:
        return f"push {push_id}: {verdict.decision} {verdict.reason}".rstrip()
    if reports:
        return (
            f"push {push_id}: {sum(report.bytes for report in reports.values()):,} bytes written, engines measure them"
        )
    if ledger.released(push_id):
        return f"push {push_id}: engines are paused, writing"
    if ledger.ready(push_id):
        return f"push {push_id}: converted, engines are asked to pause"
    return f"push {push_id}: planned, converting"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
