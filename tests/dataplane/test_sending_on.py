"""A message of megabytes is on its way when `notify` returns, and NIXL sends it on only while its sender calls it."""

from __future__ import annotations

import os

os.environ.setdefault("UCX_TLS", "tcp,self")  # read by UCX when the first agent is made

import torch

from tests.fixtures.fleet import until
from weightsync.transport import Agent

LENGTH = 10_000_000
"""More than both sockets' buffers take: 600,000 targets' digests."""


def test_a_long_last_word_arrives_while_its_writer_waits_for_what_becomes_of_it() -> None:
    """The receiver polls, the sender makes no other call: it arrives."""
    with Agent("sender-of-much") as sender, Agent("hearer-of-much") as hearer:
        memory = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
        sender.register(memory[:1])
        hearer.register(memory[1:])
        peer = sender.connect(hearer.metadata())
        sender.notify(peer, b"x" * LENGTH)
        with sender.sending_on():
            ((name, payload),) = until("the message is there", hearer.notifications, 60)
        assert (name, len(payload)) == ("sender-of-much", LENGTH)
        sender.disconnect(peer)
