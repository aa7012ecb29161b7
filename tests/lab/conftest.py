"""Tests of the lab: its own logic, and the bare API server that it gives to others."""

from tests.fixtures.apiserver import api_server, namespace

__all__ = ["api_server", "namespace"]
