"""Logits of rows by hand: of trees, long passes and texts token by token, for tests that compare their bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from longspec.cache.offload import Offload
from longspec.kernels.isa import candidates
from longspec.model.decoder import Chunk, Decoder, Rows

__all__ = ["by_one", "path", "run", "runs_here", "tree", "write_text"]


def runs_here() -> list[str]:
    """Names of the instruction sets that this processor runs, the best one first."""
    chosen = candidates()
    return [name for name, _ in chosen] if not isinstance(chosen, str) else []


def run(made: Decoder, spans: Sequence[tuple[Any, Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Logits of stages' rows, of several texts in one pass: (stage, tokens, parents)."""
    with torch.inference_mode():
        chunks = [Chunk(stage, stage.add(parents), tokens, stage.length, False) for stage, tokens, parents in spans]
        rows = Rows.of(chunks, made.device)
        logits = made.logits(made.forward(rows))
    return [logits[span.at] for span in rows.spans]


def write_text(made: Decoder, cache: Any, tokens: Sequence[int], size: int = 64) -> Tensor:
    """Logits of all tokens, committed in passes of so many."""
    found = []
    for at in range(0, len(tokens), size):
        stage, piece = cache.open(), tokens[at : at + size]
        found += run(made, [(stage, piece, range(-1, len(piece) - 1))])
        cache.commit(stage, range(len(piece)))
    return torch.cat(found)


def tree(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of a random tree; siblings may have one token."""
    rng = random.Random(seed)
    parents = [rng.choice([-1, *range(max(0, i - 4), i)]) if i else -1 for i in range(count)]
    return [rng.randrange(3, 96) for _ in range(count)], parents


def path(parents: Sequence[int], node: int) -> list[int]:
    return [*(path(parents, parents[node]) if parents[node] >= 0 else []), node]


def by_one(made: Decoder, base: Any, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
    """Each node's logits behind its path alone, token by token: plain decoding of the text that `base` holds."""
    caches, found = {-1: base}, []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        above = caches[parent]  # a thread may be at work for an offloaded one
        caches[node] = above.fork(above.length) if isinstance(above, Offload) else deepcopy(above)
        found.append(write_text(made, caches[node], [token]))
    return torch.cat(found)
