"""One-sided writes into registered memory: an adapter over NIXL and the arenas that it registers."""

from weightsync.transport.agent import Agent, Region, Transfer, TransferState

__all__ = ["Agent", "Region", "Transfer", "TransferState"]
