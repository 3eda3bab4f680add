"""Decoders that the C kernels take, in bf16 and in codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load
from support.passes import write
from torch import Tensor

from longspec.cache import CACHES
from longspec.model.decoder import Decoder

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("qwen2", {}),
    "norms of each head": ("qwen3", {"head_dim": 32}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "heads wider than the model": ("llama", {"head_dim": 96, "num_key_value_heads": 4}),
    "a layer without positions": ("smollm3", {}),
    "norms before and after": ("gemma3", {"head_dim": 32}),
    "norms after, and of all heads": ("olmo2", {}),
    "four loops": ("ouro", {}),
    "widths of 32": (
        "llama",
        {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
}
TOKENS = torch.randint(3, 96, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(made: Decoder, chunks: Sequence[int]) -> Tensor:
    """Of the first tokens, in passes of these sizes: [n, V] in fp64."""
    cache, out, start = CACHES["dense"](made.shape), [], 0
    for size in chunks:
        with torch.inference_mode():
            out.append(write(made, cache, TOKENS[start : start + size]))
        start += size
    return torch.cat(out).double()


def coded(folder: Path, *, strict: bool = False) -> Decoder:
    """With weights in codes; skips the test where no kernel reads them."""
    made = load(folder, torch.bfloat16, strict=strict, coded="Q8_0")
    if made.slow is not None:
        pytest.skip(made.slow)
    return made
