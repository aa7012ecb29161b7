"""Fabric profiles: what a pod needs so that bytes move the way the user chose, and how `auto` chooses. Pure."""

from weightsync_operator.plan.fabric.choose import FabricChoice, choose_fabric
from weightsync_operator.plan.fabric.profiles import PROFILES, Devices, FabricProfile, Memlock, Revocation

__all__ = ["PROFILES", "Devices", "FabricChoice", "FabricProfile", "Memlock", "Revocation", "choose_fabric"]
