"""Publishing and fetching through a real ModelExpress: whole, of one session, and back after every outage."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from modelexpress import p2p_pb2 as _generated
from modelexpress.p2p_pb2_grpc import P2pServiceStub

from tests.fixtures.servers import ModelExpressServer, RedisServer, free_port
from weightsync.errors import RendezvousUnavailable
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor, Rendezvous, source_heartbeat
from weightsync.waiting import Deadline, wait_until

p2p_pb2 = _generated  # type: ignore[assignment]
MODEL = "/models/test"
SECRET = "0123456789abcdef0123456789abcdef"
Connect = Callable[..., Rendezvous]
StartModelExpress = Callable[..., ModelExpressServer]


@pytest.fixture
def connect(modelexpress_server: ModelExpressServer) -> Iterator[Connect]:
    """A factory of clients of one session on `modelexpress_server`."""
    opened: list[Rendezvous] = []

    def connect_one(session: str = "s1", retry_s: float = 10.0, secret: str = SECRET) -> Rendezvous:
        address = modelexpress_server.address
        opened.append(Rendezvous(address=address, session=session, model=MODEL, secret=secret, retry_s=retry_s))
        return opened[-1]

    yield connect_one
    for rendezvous in opened:
        rendezvous.close()


def source(
    replica: str = "engine-0", *, tensors: int = 3, layout_bytes: int = 100, **changes: object
) -> EngineDescriptor:
    """What a rank publishes; layout and metadata are noise, which does not compress."""
    noise = random.Random(f"{replica}{tensors}")
    fields: dict[str, object] = {
        "replica": replica,
        "incarnation": "pod-uid-1",
        "rank": 0,
        "agent_name": f"{replica}.pod-uid-1.0",
        "metadata": noise.randbytes(2000),
        "tensors": {
            name: RemoteTensor(
                name=name, address=(1 << 63) + index, length_bytes=(1 << 53) + 1, device_id=7, dtype="bfloat16"
            )
            for index, name in enumerate(
                f"model.layers.{n}.mlp.experts.routed_experts.w13_weight" for n in range(tensors)
            )
        },
        "layout": noise.randbytes(layout_bytes),
    }
    return EngineDescriptor(**(fields | changes))  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    wait_until(lambda: condition() or None, deadline=Deadline(timeout_s), what=what)


def test_source_is_fetched_as_it_was_published(connect: Connect) -> None:
    """Addresses above 2^53 too, which JSON numbers would round."""
    published = source(rank=3)
    connect().publish(published)
    assert connect().fetch("engine-0", "pod-uid-1", 3) == published


def test_engine_of_twenty_thousand_tensors_is_fetched_whole(connect: Connect) -> None:
    published = source(tensors=20_000, layout_bytes=1_000_000)
    connect().publish(published)
    assert connect().fetch("engine-0", "pod-uid-1", 0) == published


@pytest.mark.failure_mode(36)
def test_what_the_server_holds_tells_no_stranger_how_memory_is_reached(
    redis_server: RedisServer, modelexpress_server: ModelExpressServer, connect: Connect
) -> None:
    """1. A stranger who is let in asks for a source. 2. Neither the answer nor Redis has its metadata, addresses or names.

    Seen to fail with the worker's nixl_metadata or a tensor's address published as they are.
    """
    published = source(metadata=b"remote-key-" + b"of-the-engine" * 20)
    connect().publish(published)
    (address,) = {str(tensor.address) for tensor in list(published.tensors.values())[:1]}
    with redis_server.client() as client:
        (key,) = client.keys(f"mx:source:*:{published.worker_id}")  # type: ignore[misc]
        held = json.dumps(client.hgetall(str(key))) if client.type(str(key)) == "hash" else str(client.get(str(key)))
    index = str(key).split(":")[2]
    request = p2p_pb2.GetMetadataRequest(mx_source_id=index, worker_id=published.worker_id)  # type: ignore[attr-defined]
    with grpc.insecure_channel(modelexpress_server.address) as channel:
        answer = P2pServiceStub(channel).GetMetadata(request, timeout=10)
    assert answer.found
    assert not answer.worker.nixl_metadata and not answer.worker.agent_name
    numbers = ", ".join(map(str, published.metadata[:20])), ",".join(map(str, published.metadata[:20]))
    for text in (held, str(answer.worker)):
        for secret in ("remote-key", "w13_weight", published.agent_name, address, *numbers):
            assert secret not in text


@pytest.mark.failure_mode(36)
def test_source_of_a_stranger_is_refused_by_name(connect: Connect) -> None:
    """Who is let in by the server but has not the session's token can publish under a rank's name: nothing is written there."""
    connect(secret="a stranger's").publish(source())
    began = time.monotonic()
    with pytest.raises(RendezvousUnavailable, match=r"engine-0/pod-uid-1/0 was not sealed by that rank .* session s1"):
        connect().fetch("engine-0", "pod-uid-1", 0)
    assert time.monotonic() - began < 5.0, "it cannot get better by waiting"


@pytest.mark.failure_mode(36)
def test_source_that_is_not_sealed_is_refused_by_name(
    modelexpress_server: ModelExpressServer, connect: Connect
) -> None:
    """As a stranger, or an engine whose runtime does not seal, publishes it."""
    connect().publish(source(rank=1))
    worker = p2p_pb2.WorkerMetadata(worker_rank=0, agent_name="a", nixl_metadata=b"m")  # type: ignore[attr-defined]
    identity = p2p_pb2.SourceIdentity(model_name=MODEL, extra_parameters={"weightsync.session": "s1"})  # type: ignore[attr-defined]
    request = p2p_pb2.PublishMetadataRequest(identity=identity, worker=worker, worker_id="engine-0/pod-uid-1/0")  # type: ignore[attr-defined]
    with grpc.insecure_channel(modelexpress_server.address) as channel:
        assert P2pServiceStub(channel).PublishMetadata(request, timeout=10).success
    with pytest.raises(RendezvousUnavailable, match=r"engine-0/pod-uid-1/0 has 0 boxes of form weightsync.sealed.1"):
        connect().fetch("engine-0", "pod-uid-1", 0)
    assert connect().fetch("engine-0", "pod-uid-1", 1) == source(rank=1)


def test_heartbeats_and_listings_do_not_carry_the_layout(redis_server: RedisServer, connect: Connect) -> None:
    rendezvous, published = connect(), source(layout_bytes=300_000)
    rendezvous.publish(published)
    rendezvous.renew(published)
    with redis_server.client() as client:
        index = [key for key in client.keys("mx:source:*") if str(key).count(":") == 2]
        (entry,) = [value for name, value in client.hgetall(index[0]).items() if name == published.worker_id]  # type: ignore[union-attr]
    assert len(entry) < 500
    assert json.loads(entry)["status"] == p2p_pb2.SOURCE_STATUS_READY  # type: ignore[attr-defined]


@pytest.mark.failure_mode(66)
def test_sessions_of_one_server_do_not_see_each_other(connect: Connect) -> None:
    """The same replica, incarnation and rank in two sessions: each is fetched as its own session published it."""
    here, there = source(metadata=b"here"), source(metadata=b"there")
    connect("s1").publish(here)
    with pytest.raises(RendezvousUnavailable, match="it does not know the source"):
        connect("s2", retry_s=0.3).fetch("engine-0", "pod-uid-1", 0)
    connect("s2").publish(there)
    assert connect("s1").fetch("engine-0", "pod-uid-1", 0) == here
    assert connect("s2").fetch("engine-0", "pod-uid-1", 0) == there


@pytest.mark.failure_mode(18, 60)
def test_restarted_engine_is_never_fetched_at_its_old_address(connect: Connect) -> None:
    rendezvous, old = connect(retry_s=0.3), source()
    rendezvous.publish(old)
    with pytest.raises(RendezvousUnavailable, match="engine-0/pod-uid-2/0"):
        rendezvous.fetch("engine-0", "pod-uid-2", 0)
    new = source(incarnation="pod-uid-2", metadata=b"new")
    rendezvous.publish(new)
    assert rendezvous.fetch("engine-0", "pod-uid-2", 0) == new


@pytest.mark.failure_mode(25)
def test_fetch_waits_for_an_engine_that_publishes_a_little_later(connect: Connect) -> None:
    """1. The ledger lists a member. 2. Its worker publishes while the trainer asks already. 3. The trainer gets it."""
    trainer, published = connect(), source()
    with pytest.raises(RendezvousUnavailable):
        trainer.fetch("engine-0", "pod-uid-1", 0, deadline=time.monotonic())
    with source_heartbeat(connect(), [published], interval_s=1.0):
        assert trainer.fetch("engine-0", "pod-uid-1", 0) == published


@pytest.mark.failure_mode(30)
def test_sources_outlive_a_restart_of_the_server(modelexpress_server: ModelExpressServer, connect: Connect) -> None:
    """1. Published. 2. kill -9 of the server: told with address and cure. 3. Up again: the same clients go on."""
    trainer, engine, published = connect(), connect(), source()
    engine.publish(published)
    assert trainer.fetch("engine-0", "pod-uid-1", 0) == published
    modelexpress_server.kill()
    began = time.monotonic()
    with pytest.raises(RendezvousUnavailable, match=rf"{modelexpress_server.address}: fetch .*UNAVAILABLE.* is it up"):
        trainer.fetch("engine-0", "pod-uid-1", 0, deadline=began + 1.0)
    assert time.monotonic() - began < 3.0
    modelexpress_server.start()
    assert trainer.fetch("engine-0", "pod-uid-1", 0) == published
    engine.renew(published)


@pytest.mark.failure_mode(26, 27, 30)
def test_heartbeat_publishes_again_what_server_and_redis_forgot(
    redis_server: RedisServer, modelexpress_server: ModelExpressServer, connect: Connect
) -> None:
    trainer, ranks = connect(), [source(rank=0), source(rank=1)]
    engine = connect()
    for rank in ranks:
        engine.publish(rank)
    with source_heartbeat(engine, ranks, interval_s=0.5) as heartbeat:
        redis_server.restart(with_data=False)
        modelexpress_server.restart()
        for rank in ranks:
            assert trainer.fetch("engine-0", "pod-uid-1", rank.rank, deadline=time.monotonic() + 20.0) == rank
        eventually(lambda: heartbeat.last_error is None, "the heartbeat to go on")


@pytest.mark.failure_mode(30)
def test_server_finds_a_redis_that_came_back_empty_by_itself(redis_server: RedisServer, connect: Connect) -> None:
    engine, published = connect(), source()
    engine.publish(published)
    redis_server.restart(with_data=False)
    engine.renew(published, deadline=time.monotonic() + 20.0)
    assert connect().fetch("engine-0", "pod-uid-1", 0) == published


@pytest.mark.failure_mode(27)
def test_source_that_the_reaper_deleted_is_published_again(
    redis_server: RedisServer, start_modelexpress: StartModelExpress
) -> None:
    """1. Without heartbeats the reaper deletes a source. 2. The next renewal brings it back. 3. Then it stays."""
    reaper = {"MX_REAPER_SCAN_INTERVAL_SECS": "1", "MX_HEARTBEAT_TIMEOUT_SECS": "1", "MX_GC_TIMEOUT_SECS": "1"}
    server, published = start_modelexpress(redis_server, **reaper), source()

    def known() -> bool:
        with redis_server.client() as client:
            return bool(client.keys(f"mx:source:*:{published.worker_id}"))

    with Rendezvous(address=server.address, session="s1", model=MODEL, secret=SECRET) as rendezvous:
        rendezvous.publish(published)
        eventually(lambda: not known(), "the reaper to delete the source")
        rendezvous.renew(published)
        assert rendezvous.fetch("engine-0", "pod-uid-1", 0) == published
        with source_heartbeat(rendezvous, [published], interval_s=0.3):
            ends = time.monotonic() + 4.0
            while time.monotonic() < ends:
                assert known()
                time.sleep(0.1)


@pytest.mark.failure_mode(66)
def test_dead_redis_behind_the_server_is_an_error_and_not_an_empty_answer(
    redis_server: RedisServer, modelexpress_server: ModelExpressServer, connect: Connect
) -> None:
    """1. The server lists nothing, with OK, once its Redis is dead. 2. A fetch says so. 3. So do publish and renew.

    4. Redis is back, and the server restarted: by itself 0.7.0 looks after 1 to 2 s, then each 60 to 120 s.
    """
    rendezvous, published = connect(), source()
    rendezvous.publish(published)
    redis_server.kill()
    with grpc.insecure_channel(modelexpress_server.address) as channel:
        listed = P2pServiceStub(channel).ListSources(p2p_pb2.ListSourcesRequest(), timeout=10)  # type: ignore[attr-defined]
    assert len(listed.instances) == 0
    # At the deadline the client's timer and the server's race: tonic answers CANCELLED when its own is first.
    with pytest.raises(RendezvousUnavailable, match=r"its Redis does not answer|DEADLINE_EXCEEDED|CANCELLED Timeout expired"):
        rendezvous.fetch("engine-0", "pod-uid-1", 0, deadline=time.monotonic() + 2.0)
    with pytest.raises(RendezvousUnavailable, match=r"(publish|renew) engine-0/pod-uid-1/0 failed"):
        rendezvous.renew(published, deadline=time.monotonic() + 2.0)
    redis_server.start()
    modelexpress_server.restart()
    assert rendezvous.fetch("engine-0", "pod-uid-1", 0) == published


def test_frozen_server_is_told_at_the_deadline(modelexpress_server: ModelExpressServer, connect: Connect) -> None:
    rendezvous, published = connect(), source()
    rendezvous.publish(published)
    modelexpress_server.freeze()
    began = time.monotonic()
    with pytest.raises(RendezvousUnavailable, match="DEADLINE_EXCEEDED"):
        rendezvous.fetch("engine-0", "pod-uid-1", 0, deadline=began + 1.0)
    assert time.monotonic() - began < 3.0
    modelexpress_server.thaw()
    assert rendezvous.fetch("engine-0", "pod-uid-1", 0) == published


def test_something_else_on_the_address_is_told_with_its_words(redis_server: RedisServer) -> None:
    with (
        Rendezvous(address=redis_server.address, session="s1", model=MODEL, secret=SECRET, retry_s=0.5) as rendezvous,
        pytest.raises(RendezvousUnavailable, match=redis_server.address),
    ):
        rendezvous.publish(source())


def test_nobody_listens_is_told_with_address_and_cure() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        Rendezvous(address=address, session="s1", model=MODEL, secret=SECRET, retry_s=0.5) as rendezvous,
        pytest.raises(RendezvousUnavailable, match=rf"{address}: publish .* Connection refused.* is it up"),
    ):
        rendezvous.publish(source())
