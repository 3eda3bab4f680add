"""Draft heads that are trained for a target: modules by their names, and their files.

A head knows the target's widths, but no session and no draft; `longspec.drafters.clover` drafts with a head, and
`longspec.training` trains one.
"""

from longspec.heads.clover import Clover
from longspec.heads.clover2 import Clover2
from longspec.heads.layers import Head

__all__ = ["KINDS"]

KINDS: dict[str, type[Head]] = {"clover": Clover, "clover2": Clover2}
"""Head modules by the names that the command takes."""
