"""Draft heads that are trained for a target: modules by their names, and their files.

A head knows the target's widths, but no session and no draft. `longspec.training` trains any head; how one drafts is
said by the class that its own is made from (`longspec.drafters.WAYS`): `Recurrent` and `Fed` token by token,
`AllDepths` at once, `OnePass` at once behind a layer over the text, `Exits` within the target's own pass,
`Transfer` through its last layers.
"""

from longspec.heads.cerberus import Cerberus
from longspec.heads.clover import Clover
from longspec.heads.clover2 import Clover2
from longspec.heads.eagle3 import Eagle3Head
from longspec.heads.exits import Exits
from longspec.heads.fed import FastMtp
from longspec.heads.head import Head
from longspec.heads.medusa import Heads as Medusa
from longspec.heads.parallelspec import ParallelSpec
from longspec.heads.specformer import SpecFormer
from longspec.heads.transfer import Transfer

__all__ = ["KINDS"]

KINDS: dict[str, type[Head]] = {
    "clover": Clover,
    "clover2": Clover2,
    "exits": Exits,
    "medusa": Medusa,
    "cerberus": Cerberus,
    "parallelspec": ParallelSpec,
    "specformer": SpecFormer,
    "transfer": Transfer,
    "eagle3": Eagle3Head,
    "fastmtp": FastMtp,
}
"""Head modules by the names that the command takes."""
