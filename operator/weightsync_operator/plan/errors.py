"""Why a spec cannot be carried out. Imports nothing."""

from __future__ import annotations


class OperatorError(Exception):
    """Base of every error that the operator raises on purpose."""


class SpecError(OperatorError):
    """The spec asks for something that cannot be; becomes a condition and is not tried again until the spec changes."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
