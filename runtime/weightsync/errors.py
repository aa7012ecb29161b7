"""The errors a user of the runtime meets, split by what the catcher does about them. Imports nothing."""

from __future__ import annotations


class WeightSyncError(Exception):
    """Base of every error that the runtime raises on purpose."""


class ConfigError(WeightSyncError):
    """The contract or the environment is wrong; nothing was started. Cure: fix the named field."""


class PlanError(WeightSyncError):
    """Sources and targets cannot be matched: the push is refused before any byte moves."""


class CoverageError(PlanError):
    """Some element of a target would be written by nobody, or twice."""


class UnsupportedLayout(PlanError):
    """A loader or a sharding does something that cannot be expressed as writes."""


class ConversionError(WeightSyncError):
    """A tensor cannot be converted to what the engine wants."""


class FencedOut(WeightSyncError):
    """A newer (epoch, version), another session or another plan is in force: the caller must stop, not retry."""


class PushAborted(WeightSyncError):
    """The push did not commit; no engine serves its bytes. Retrying pushes again under a new version."""


class LedgerUnavailable(WeightSyncError):
    """Redis did not answer within its deadline. Retry later; engines keep serving what they have."""


class RendezvousUnavailable(WeightSyncError):
    """ModelExpress did not answer within its deadline, or has nothing that a member published. Retry later."""


class TransportError(WeightSyncError):
    """A NIXL transfer or registration failed."""


class DeadlineExceeded(WeightSyncError):
    """A wait ended at its deadline; the message gives the last value seen and what is missing."""
