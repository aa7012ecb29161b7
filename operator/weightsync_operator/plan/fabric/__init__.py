"""Fabric profiles: what a pod needs so that bytes move the way the user chose. One table a profile. Pure."""

from weightsync_operator.plan.fabric.profiles import PROFILES, FabricProfile, Memlock, Revocation

__all__ = ["PROFILES", "FabricProfile", "Memlock", "Revocation"]
