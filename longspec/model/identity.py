"""What makes one model's rows another's: hashes that tell models, and their tokenizers, apart.

Takes a loaded model. The weights are sampled, not read whole: two models of one shape differ in nearly every tensor's
first values, and one that was fine-tuned in some layers differs in theirs.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from longspec.model.load import Model

__all__ = ["identity", "lineage"]

_RUNS = 4
_RUN = 512  # values; a page of a mapped file or two


def identity(model: Model) -> dict[str, str]:
    """By the words for what they tell apart."""
    return {
        "model": _weights(model),
        "tokenizer": hashlib.sha256(model.vocabulary.tokenizer.to_str().encode()).hexdigest(),
        "dtype": model.dtype,
        "strictness": "strict" if model.decoder.strict else "not strict",
    }


def lineage(model: Model) -> str:
    """The same for every dtype that the weights are loaded in: what is trained for a model serves it in each.

    Of tensors with two dimensions, rounded to bf16; a norm's values may have been shifted before they are rounded.
    """
    digest = hashlib.sha256(repr(model.decoder.config).encode())
    for tensor in model.decoder.tensors():
        if tensor.dim() == 2:
            flat = tensor.reshape(-1)
            starts = [i * max(0, len(flat) - _RUN) // (_RUNS - 1) for i in range(_RUNS)]
            sample: Any = torch.cat([flat[start : start + _RUN] for start in starts]).to(torch.bfloat16).cpu()
            digest.update(memoryview(sample.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _weights(model: Model) -> str:
    """Of the config, and of every tensor's shape and four evenly spread runs of its values."""
    digest = hashlib.sha256(repr(model.decoder.config).encode())
    for tensor in model.decoder.tensors():
        flat = tensor.reshape(-1)
        starts = [i * max(0, len(flat) - _RUN) // (_RUNS - 1) for i in range(_RUNS)]
        sample: Any = torch.cat([flat[start : start + _RUN] for start in starts]).cpu().view(torch.uint8).numpy()
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(memoryview(sample))
    return digest.hexdigest()
