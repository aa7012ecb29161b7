"""Conversion of a trainer's elements to an engine's format, by a registry of (source dtype, target format).

Imports torch only; nothing here knows of peers or transports.
"""

from __future__ import annotations

from weightsync.conversion.registry import convert_into, require_finite

__all__ = ["convert_into", "require_finite"]
