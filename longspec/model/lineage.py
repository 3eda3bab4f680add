"""Which model weights are of, whatever dtype they are loaded in: what is trained for a model serves it in each.

Takes a decoder; gives a hash of its config and of samples of its matrices, rounded to bf16. A norm's values may have
been shifted before they are rounded, so that they don't count. Codes (int8) don't tell any more what they were made of:
the hash is taken before.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from longspec.model.decoder import Decoder

__all__ = ["lineage"]

_RUNS = 4
_RUN = 512  # values; a page of a mapped file or two


def lineage(decoder: Decoder) -> str:
    """Two models of one shape differ in nearly every matrix's first values; a fine-tuned one differs in some."""
    digest = hashlib.sha256(repr(decoder.config).encode())
    for tensor in decoder.tensors():
        if tensor.dim() == 2:
            flat = tensor.reshape(-1)
            starts = [i * max(0, len(flat) - _RUN) // (_RUNS - 1) for i in range(_RUNS)]
            sample: Any = torch.cat([flat[start : start + _RUN] for start in starts]).to(torch.bfloat16).cpu()
            digest.update(memoryview(sample.view(torch.uint8).numpy()))
    return digest.hexdigest()
