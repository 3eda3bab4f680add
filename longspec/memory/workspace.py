"""The bytes that the largest pass of a plan takes beside its weights and its cache.

Takes a plan's request and an empty cache of its kind; gives an upper bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspec.cache.stage import BLOCK, PIECE_BLOCKS, Cache
from longspec.model.layers import MIXERS
from longspec.model.layers.moe import Moe
from longspec.model.load import DTYPES
from longspec.model.native import missing
from longspec.sampling.sampler import looks_in_place

if TYPE_CHECKING:
    from longspec.memory.choices import Request

__all__ = ["workspace"]

_PER_THREAD = 2 << 20
"""Buffers of the attention kernel."""

_PRODUCT = 800
"""Bytes of a product's rows for each column of the widest matrix (`layer_workspace` of kernels/layer.c)."""

_LOGIT, _SORTED = 12, 32
"""Bytes of a logit: the head's sum, and copies for penalties and a grammar; and of one that torch sorts, with its
noise. Where the kernel looks through logits, torch sorts those of one row at a time.
"""


def workspace(r: Request, cache: Cache, rows: int) -> int:
    """An upper bound of activations, masks, scores and logits of the largest pass. docs/benchmarks/budget.json has the
    whole plan beside a run.
    """
    c, item = r.config, DTYPES[r.dtype].itemsize
    layer = 2 * c.key_heads * c.head_dim * item  # keys and values of one row
    strict = 3 * r.tokens * layer if r.strict else 0
    looked = r.texts * (r.draft_tokens + 1) * c.vocabulary
    in_place = r.device.type == "cpu" and looks_in_place()
    logits = looked * _LOGIT + c.vocabulary * _SORTED if in_place else looked * (item + _SORTED)
    mixing: int = max(MIXERS[spec.mixer].workspace(c, rows) for spec in c.specs)
    mixing += 0 if c.mixture is None else Moe.workspace(c.mixture, c.width, rows)
    layers = _in_c(r, rows) if _is_in_c(r, cache) else _by_torch(r, cache, rows, layer)
    return layers + mixing + strict + logits + r.threads * _PER_THREAD


def _is_in_c(r: Request, cache: Cache) -> bool:
    """Whether the C kernels compute all layers, and read the cache as it lies."""
    plain = all(spec.mixer == "attention" and spec.mlp == "dense" for spec in r.config.specs)
    return plain and cache.in_one_piece and missing(r.config, DTYPES[r.dtype], r.device) is None


def _in_c(r: Request, rows: int) -> int:
    """Hidden states before and after a call of all layers, and a copy; what attention reads and makes."""
    c = r.config
    read = c.heads * c.head_dim
    row = 3 * c.width + 2 * read + 2 * c.key_heads * c.head_dim
    return rows * row * DTYPES[r.dtype].itemsize + _PRODUCT * max(c.width, c.mlp_width, read)


def _by_torch(r: Request, cache: Cache, rows: int, layer: int) -> int:
    c, item = r.config, DTYPES[r.dtype].itemsize
    heads = (c.heads + 2 * c.key_heads) * c.head_dim
    activations = rows * (4 * c.mlp_width + 8 * c.width + 3 * heads) * item
    partial = rows * c.heads * c.head_dim * 4 * 6  # fp32 outputs while segments are merged
    piece = r.tokens if cache.in_one_piece else min(r.tokens, PIECE_BLOCKS * BLOCK)
    read = 2 * piece * layer  # dequantized, and copied into the kernel's layout
    windows = [window for window in c.windows if window is not None]
    masked = r.tokens if not cache.in_one_piece else min(r.tokens, max(windows, default=0) + rows)
    masks = 3 * rows * (c.heads // c.key_heads) * masked * item
    # Without a kernel that returns the log-sum-exp: scores, their exponentials and two copies, in fp32.
    scores = 16 * c.heads * rows * piece if c.attention_softcap or r.device.type != "cpu" else 0
    return activations + partial + read + masks + scores
