"""Which model weights are of, whatever dtype they are loaded in: what is trained for a model serves it in each.

Takes a decoder; gives a hash of its config, of samples of its embedding, and of its norms and biases, rounded to bf16:
what every dtype keeps as it is. Norms that were shifted before they are rounded (Gemma's) don't count.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from longspec.model.decoder import Decoder

__all__ = ["lineage"]

_RUNS = 16
_RUN = 512  # values; a page of a mapped file or two


def lineage(decoder: Decoder) -> str:
    """Two models of one shape differ in nearly every value; a fine-tuned one differs in some."""
    digest = hashlib.sha256(repr(decoder.config).encode())
    embedding, *others = decoder.tensors()
    flat = embedding.reshape(-1)
    starts = [i * max(0, len(flat) - _RUN) // (_RUNS - 1) for i in range(_RUNS)]
    samples = [torch.cat([flat[start : start + _RUN] for start in starts])]
    if not decoder.config.norm_offset:
        samples += [tensor for tensor in others if tensor.dim() == 1]
    for sample in samples:
        digest.update(_bytes(sample))
    return digest.hexdigest()


def _bytes(values: Tensor) -> Any:
    made: Any = values.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(made)
