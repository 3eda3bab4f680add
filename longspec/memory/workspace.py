"""The bytes that the largest pass of a plan takes beside its weights and its cache.

Takes a plan's request and an empty cache of its kind; gives an upper bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspec.cache.stage import BLOCK, PIECE_BLOCKS, Cache
from longspec.model.layers import MIXERS
from longspec.model.layers.moe import Moe
from longspec.model.load import DTYPES
from longspec.sampling.sampler import looks_in_place

if TYPE_CHECKING:
    from longspec.memory.choices import Request

__all__ = ["workspace"]

_PER_THREAD = 2 << 20
"""Buffers of the attention kernel."""

_LOGIT, _SORTED = 12, 32
"""Bytes of a logit: the head's sum, and copies for penalties and a grammar; and of one that torch sorts, with its
noise. Where the kernel looks through logits, torch sorts those of one row at a time.
"""


def workspace(r: Request, cache: Cache, rows: int) -> int:
    """An upper bound of activations, masks, scores and logits of the largest pass; 0.4 to 0.9 of it was measured in
    use.
    """
    c, item = r.config, DTYPES[r.dtype].itemsize
    heads = (c.heads + 2 * c.key_heads) * c.head_dim
    activations = rows * (4 * c.mlp_width + 8 * c.width + 3 * heads) * item
    partial = rows * c.heads * c.head_dim * 4 * 6  # fp32 outputs while segments are merged
    layer = 2 * c.key_heads * c.head_dim * item  # keys and values of one row
    piece = r.tokens if cache.in_one_piece else min(r.tokens, PIECE_BLOCKS * BLOCK)
    read = 2 * piece * layer  # dequantized, and copied into the kernel's layout
    windows = [window for window in c.windows if window is not None]
    masked = r.tokens if not cache.in_one_piece else min(r.tokens, max(windows, default=0) + rows)
    masks = 3 * rows * (c.heads // c.key_heads) * masked * item
    # Without a kernel that returns the log-sum-exp: scores, their exponentials and two copies, in fp32.
    scores = 16 * c.heads * rows * piece if c.attention_softcap or r.device.type != "cpu" else 0
    strict = 3 * r.tokens * layer if r.strict else 0
    looked = r.texts * (r.draft_tokens + 1) * c.vocabulary
    in_place = r.device.type == "cpu" and looks_in_place()
    logits = looked * _LOGIT + c.vocabulary * _SORTED if in_place else looked * (item + _SORTED)
    mixing: int = max(MIXERS[spec.mixer].workspace(c, rows) for spec in c.specs)
    mixing += 0 if c.mixture is None else Moe.workspace(c.mixture, c.width, rows)
    return activations + mixing + partial + read + masks + scores + strict + logits + r.threads * _PER_THREAD
