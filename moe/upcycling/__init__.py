"""From dense checkpoints to mixtures of experts; `moe.upcycle` is the way in."""

from __future__ import annotations

from moe.upcycling.config import UpcycleConfig
from moe.upcycling.convert import Options, upcycle

__all__ = ["Options", "UpcycleConfig", "upcycle"]
