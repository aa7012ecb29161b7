"""Backend `weightsync` of vLLM's own weight transfer, the trainer's side.

    trainer = WeightTransferTrainerFactory.trainer_init(
        WeightSyncTrainerInitInfo(rank=0, master_address=..., master_port=..., world_size=...), client=client, source=source)
    trainer.send_weights()              # after each optimizer step

Rank 0 takes the source's whole tensors, and writes them into every engine by the plan, slots and writer of a session's push; other
ranks iterate the source with it, which gathers shards. What a session has and this has not: docs/native.md.
"""

from __future__ import annotations

import concurrent.futures
import logging
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import torch
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, VLLMWeightSyncClient, WeightSource

from weightsync.channel import Channel
from weightsync.errors import (
    ConfigError,
    PlanError,
    PushAborted,
    RendezvousUnavailable,
    TransportError,
    WeightSyncError,
)
from weightsync.layout.families import DENSE
from weightsync.layout.shards import sources_of
from weightsync.rendezvous.modelexpress import EngineDescriptor
from weightsync.rendezvous.records import PushRecord
from weightsync.slots import SlotArena
from weightsync.transport import Agent
from weightsync.vllm.native import EPOCH, WeightSyncTrainerInitInfo, decode_descriptor
from weightsync.waiting import Deadline, wait_until
from weightsync.writer import Writer

logger = logging.getLogger(__name__)


class WeightSyncTrainer(TrainerWeightTransferEngine[WeightSyncTrainerInitInfo]):
    """Every trainer rank makes one; rank 0 connects to the engines and writes."""

    init_info_cls = WeightSyncTrainerInitInfo

    def __init__(
        self, init_info: WeightSyncTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource
    ) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._info = init_info
        self._weights: dict[str, torch.Tensor] = {}
        self._engines: _Engines | None = None
        self._version = 0

    @classmethod
    def trainer_init(
        cls, init_info: WeightSyncTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Meet the engines. Raises RendezvousUnavailable with how many came, and whatever the client raises."""
        if source is None:
            raise ConfigError("backend weightsync sends a WeightSource: give trainer_init one")
        trainer = cls(init_info, client=client, source=source)
        if trainer.is_sender:
            trainer._engines = trainer._meet()
        return trainer

    def send_weights(self) -> None:
        """One round: take the source's tensors, write them into every engine, see each prove what it holds.

        All ranks call it. Raises what failed, from the sender or, by the client, from an engine; an engine that was not left as it
        was refuses to serve. The next call connects anew.
        """
        self._take()
        if not self.is_sender:
            return
        engines = self._engines or self._meet()
        self._engines = None
        try:
            self._version = max(self._version, engines.version) + 1
            engines.send(self._weights, self._version, self.client)
        except BaseException:
            engines.close()
            raise
        self._engines = engines

    def shutdown(self) -> None:
        """Let the engines go; they keep what they hold."""
        if self._engines is not None:
            self._engines.close()
            self._engines = None

    def _take(self) -> None:
        """Go through the source, which gathers shards on all ranks; the sender keeps a copy, in memory that stays where it is."""
        assert self.source is not None  # trainer_init has refused None
        taken = set()
        for name, tensor in self.source:
            if not self.is_sender:
                continue
            kept = self._weights.get(name)
            if kept is None:
                kept = self._weights[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            kept.copy_(tensor.detach())
            taken.add(name)
        missing = sorted(self._weights.keys() - taken)
        if missing:
            raise PlanError(f"the source left out {len(missing)} tensors that it had before: {', '.join(missing[:5])}")

    def _meet(self) -> _Engines:
        assert self.source is not None
        sources = [[parameter.name, list(parameter.shape)] for parameter in self.source.metadata()]
        return _Engines(self._info, sources, self.client)


class _Engines:
    """The engine ranks of one rendezvous, and what writes into them."""

    def __init__(self, info: WeightSyncTrainerInitInfo, sources: list[list[Any]], client: VLLMWeightSyncClient) -> None:
        self._info = info
        self._session = f"native-{secrets.token_hex(8)}"
        self._channels: list[Channel] = []
        self._known: dict[str, EngineDescriptor] = {}
        self._refusals: list[str] = []
        self._agent: Agent | None = None
        self._writer: Writer | None = None
        self._started = False
        """Whether vLLM believes that an update is under way."""
        self.version = 0
        """The greatest that an engine holds."""
        try:
            self._gather(sources, client)
        except BaseException:
            self.close()
            raise

    def send(self, weights: Mapping[str, torch.Tensor], version: int, client: VLLMWeightSyncClient) -> None:
        """Write `weights` into every engine as `version`, within the round's one deadline."""
        deadline = Deadline(self._info.timeout_s)
        writer = self._writer or self._make_writer(weights)
        members = {name: descriptor.incarnation for name, descriptor in self._known.items()}
        record = PushRecord(
            push_id=f"{EPOCH}.{version}.1",
            session=self._session,
            epoch=EPOCH,
            version=version,
            attempt=1,
            step=version,
            catch_up=False,
            deadline_at=time.time() + deadline.left_s,
            writers=1,
            plan_digests=writer.learn(members, deadline, catch_up=False),
            members=members,
        )
        writer.fill()
        writer.measure(record)
        if self._started:  # by a trainer that ended in the middle
            client.finish_weight_update()
        client.start_weight_update()
        self._started = True
        try:
            self._round(record, client, deadline)
        except BaseException:
            with suppress(Exception):  # else the next trainer hears that it is still under way, and ends it
                client.finish_weight_update()
            raise
        client.finish_weight_update(str(version))
        self._started = False

    def _round(self, record: PushRecord, client: VLLMWeightSyncClient, deadline: Deadline) -> None:
        """One `update_weights`; it counts when every engine rank has proved what it holds."""
        assert self._writer is not None  # `send` made it
        with concurrent.futures.ThreadPoolExecutor(1, "weightsync-update") as pool:
            update = pool.submit(client.update_weights, {"record": record.to_json(), "timeout_s": deadline.left_s})
            posted = False
            try:
                self._hear_all("open", update, record, deadline)
                posted = True
                written = self._writer.write(record, record.members.keys(), deadline, frozenset)
                if written.failed:
                    raise TransportError("; ".join(written.failed.values()))
                with self._writer.delivering():
                    self._hear_all("received", update, record, deadline)
                for channel in self._channels:
                    channel.send({"commit": record.version}, deadline)
            except BaseException as error:
                self._break_off(error, in_flight=posted and not isinstance(error, WeightSyncError))
                raise
            update.result()
        self.version = record.version

    def fetch(self, replica: str, incarnation: str, rank: int, *, deadline: float | None = None) -> EngineDescriptor:
        """The `Directory` of the writer: an engine rank as it described itself."""
        return self._known[replica]

    def close(self) -> None:
        """Release what was prepared; all handles are terminal."""
        for channel in self._channels:
            channel.close()
        if self._writer is not None:
            self._writer.close()
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _gather(self, sources: list[list[Any]], client: VLLMWeightSyncClient) -> None:
        """Listen, have the client ask every engine rank to come, and hear where its memory is."""
        info, token = self._info, secrets.token_hex(16)
        deadline, wanted = Deadline(info.timeout_s), info.world_size - 1
        family = socket.AF_INET6 if ":" in info.master_address else socket.AF_INET
        with (
            socket.create_server((info.master_address, info.master_port), family=family, backlog=512) as server,
            concurrent.futures.ThreadPoolExecutor(1, "weightsync-init") as pool,
        ):
            asked = pool.submit(
                client.init_weight_transfer_engine,
                {
                    "address": info.master_address,
                    "port": server.getsockname()[1],
                    "token": token,
                    "session": self._session,
                    "sources": sources,
                    "timeout_s": info.timeout_s,
                },
            )
            while len(self._channels) < wanted and not deadline.passed and not (asked.done() and asked.exception()):
                channel = Channel.accept(server, token, deadline)
                if channel is not None:
                    self._channels.append(channel)
                    self._hear(channel, deadline)
            asked.result(max(deadline.left_s, 0.001))
        if self._refusals:
            told = "; ".join(sorted(set(self._refusals))[:3])
            raise PlanError(f"{len(self._refusals)} of {wanted} engine ranks refuse this trainer: {told}")
        if len(self._channels) < wanted:
            raise RendezvousUnavailable(
                f"{len(self._channels)} of {wanted} engine ranks came to {info.master_address} within {info.timeout_s:.0f} s: is "
                f"world_size {info.world_size} the sender and every engine rank?"
            )

    def _hear(self, channel: Channel, deadline: Deadline) -> None:
        message = channel.receive(deadline)
        if "refused" in message:
            self._refusals.append(message["refused"])
            return
        descriptor = decode_descriptor(message)
        self._known[descriptor.replica] = descriptor
        self.version = max(self.version, message["version"])
        self._started = self._started or message["started"]

    def _make_writer(self, weights: Mapping[str, torch.Tensor]) -> Writer:
        local = sources_of(weights.items(), DENSE)
        self._agent = Agent(f"{self._session}/trainer")
        slots = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto")
        self._writer = Writer(rank=0, agent=self._agent, slots=slots, rendezvous=self)
        return self._writer

    def _hear_all(
        self, word: str, update: concurrent.futures.Future[None], record: PushRecord, deadline: Deadline
    ) -> None:
        """Until every engine rank has said `word`; raises PushAborted with another one's reason, or what ended the update early."""
        waiting = list(self._channels)

        def fetch() -> bool | None:
            ended = update.done()
            for channel in [channel for channel in waiting if channel.said_something()]:
                said = channel.receive(deadline)
                if word not in said:
                    raise PushAborted(f"round {record.push_id}: an engine rank says {said}")
                waiting.remove(channel)
            if waiting and ended:
                update.result()
                raise PushAborted(
                    f"round {record.push_id}: update_weights ended, but {len(waiting)} ranks had not said {word}"
                )
            return None if waiting else True

        wait_until(
            fetch,
            deadline=deadline,
            what=f"round {record.push_id}: engine ranks are to say {word}",
            missing=lambda: f"{len(waiting)} of {len(self._channels)} are missing",
        )

    def _break_off(self, error: BaseException, *, in_flight: bool) -> None:
        """Engines need not wait for their deadline: they are told when nothing of ours moves any more, else they see us go."""
        for channel in self._channels:
            if in_flight:
                channel.close()
                continue
            try:
                channel.send({"abort": f"{type(error).__name__}: {error}"}, Deadline(1.0))
            except WeightSyncError as gone:
                logger.warning("an engine cannot be told that its round is over: %s", gone)
