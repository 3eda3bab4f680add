"""Heads that are trained for a target: modules by their names, and their files.

A head knows the target's widths and nothing of texts, sessions or drafts; `longspec.drafters.clover` bets with one, and
`longspec.training` trains one.
"""

from longspec.heads.clover import Clover
from longspec.heads.clover2 import Clover2
from longspec.heads.layers import Head

__all__ = ["KINDS"]

KINDS: dict[str, type[Head]] = {"clover": Clover, "clover2": Clover2}
"""By the names that the command takes."""
