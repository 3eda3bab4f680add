"""Fingerprints of models: hashes of their cache rows' origin, their tokenizers and their weights.

`fingerprint` is exact: a snapshot's rows are valid for that model alone. `lineage` doesn't depend on the dtype: a
head that was trained for a model serves it in each. Weights are sampled, not read whole: two models of one shape
differ in nearly every tensor's first values, and a fine-tuned one differs in its fine-tuned layers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from longspec.model.decoder import Decoder

__all__ = ["fingerprint", "lineage"]

_RUN = 512  # values of a sample: one or two pages of a mapped file


def fingerprint(decoder: Decoder, tokenizer: Tokenizer, dtype: str) -> dict[str, str]:
    """Fingerprint fields for a snapshot, by their names in an error; compared in order, the dtype first, as in
    another one all values differ.
    """
    return {
        "dtype": dtype,
        "model": _weights(decoder),
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "strictness": "strict" if decoder.strict else "not strict",
    }


def lineage(decoder: Decoder) -> str:
    """A hash of the config, 16 samples of the embedding, and all norms and biases, rounded to bf16: parts that every
    dtype keeps. Norms that are shifted before rounding (Gemma's) are left out.
    """
    digest = hashlib.sha256(_said(decoder))
    size, width = decoder.config.vocabulary * decoder.config.width, decoder.config.width
    samples = []
    for start in _starts(size, 16):
        tokens = torch.arange(start // width, -(-min(size, start + _RUN) // width), device=decoder.device)
        samples.append(decoder.table(tokens).reshape(-1)[start % width :][: min(size, _RUN)])
    if not decoder.config.norm_offset:
        samples += decoder.vectors
    for sample in samples:
        digest.update(_bytes(sample.to(torch.bfloat16)))
    return digest.hexdigest()


def _weights(decoder: Decoder) -> str:
    """A hash of the config, and of every tensor's shape and four samples of its values."""
    digest = hashlib.sha256(_said(decoder))
    for tensor in decoder.tensors():
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(_bytes(_sample(tensor, 4)))
    return digest.hexdigest()


def _said(decoder: Decoder) -> bytes:
    """The config; how experts are chosen, or layers share, too, which no tensor shows."""
    config = decoder.config
    beside = [repr(part) for part in (config.mixture, config.per_layer) if part is not None]
    return "".join([repr(config), *beside]).encode()


def _sample(tensor: Tensor, runs: int) -> Tensor:
    """Evenly spread runs of a tensor's values, the first and the last among them."""
    flat = tensor.reshape(-1)
    return torch.cat([flat[start : start + _RUN] for start in _starts(len(flat), runs)])


def _starts(size: int, runs: int) -> list[int]:
    return [i * max(0, size - _RUN) // (runs - 1) for i in range(runs)]


def _bytes(values: Tensor) -> Any:
    array: Any = values.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(array)
