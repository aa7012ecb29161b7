"""The line between two processes that have no ledger, on loopback."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from weightsync.channel import Channel
from weightsync.errors import RendezvousUnavailable, TransportError
from weightsync.waiting import Deadline

TOKEN = "a-token"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def accepted(server: socket.socket, came: list[Channel | None]) -> threading.Thread:
    thread = threading.Thread(target=lambda: came.append(Channel.accept(server, TOKEN, Deadline(5.0))))
    thread.start()
    return thread


def test_messages_arrive_whole_and_in_order_and_an_end_is_told(server: socket.socket) -> None:
    came: list[Channel | None] = []
    thread = accepted(server, came)
    engine = Channel.connect("127.0.0.1", server.getsockname()[1], TOKEN, Deadline(5.0))
    thread.join()
    trainer = came[0]
    assert trainer is not None
    large = {"layout": "x" * 3_000_000}
    sender = threading.Thread(target=lambda: [engine.send(m, Deadline(5.0)) for m in (large, {"n": 2})])
    sender.start()
    assert [trainer.receive(Deadline(5.0)), trainer.receive(Deadline(5.0))] == [large, {"n": 2}]
    sender.join()
    assert not trainer.said_something()
    engine.close()
    assert trainer.said_something()
    with pytest.raises(TransportError, match="gone: its connection closed"):
        trainer.receive(Deadline(5.0))
    trainer.close()


@pytest.mark.failure_mode(36)
@pytest.mark.parametrize("said", [b'{"token": "a-guess"}', b"{}", b"[]", b"GET / HTTP/1.1"])
def test_a_stranger_is_turned_away(server: socket.socket, said: bytes) -> None:
    """Whoever shows no token is no engine: without the comparison in `accept` its addresses would be written to."""
    came: list[Channel | None] = []
    thread = accepted(server, came)
    with socket.create_connection(server.getsockname()) as stranger:
        stranger.sendall(struct.pack("<I", len(said)) + said)
        thread.join()
        assert came == [None]
        assert stranger.recv(1) == b""


def test_a_length_beyond_reason_is_refused_before_it_is_read(server: socket.socket) -> None:
    came: list[Channel | None] = []
    thread = accepted(server, came)
    with socket.create_connection(server.getsockname()) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        thread.join()
        assert came == [None]


def test_a_trainer_that_does_not_listen_is_named(server: socket.socket) -> None:
    address, port = server.getsockname()
    server.close()
    with pytest.raises(RendezvousUnavailable, match=rf"nobody listens at 127\.0\.0\.1:{port} "):
        Channel.connect(address, port, TOKEN, Deadline(1.0))
