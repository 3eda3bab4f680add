"""Which families the C kernels run, with their norms and activations, in widths that are multiples of 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.native import SIZES, logits

from longspec.model.native import missing

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "gemma2": {"head_dim": 32},
    "gemma3": {"head_dim": 32},
    "phi3": {},
    "gpt_oss": {"head_dim": 32, "intermediate_size": 96},
    "olmo2": {},
    "ouro": {"num_hidden_layers": 2, "total_ut_steps": 2},  # random loops make more of what was rounded
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_run_it(family: str, tmp_path: Path) -> None:
    """96 columns are no multiple of 64, nor are 160; in codes and in bf16."""
    odd = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
    folder = write(oracle(family, **{**SIZES, **odd, **FAMILIES[family]}), tmp_path)
    want = logits(load(folder, torch.float32), [40])
    for coded, off in ((None, 0.05), ("Q8_0", 0.15)):
        made = load(folder, torch.bfloat16, coded=coded)
        why = missing(made.config, torch.bfloat16, torch.device("cpu"))
        if why is not None and "compiler" in why:
            pytest.skip(why)
        assert why is None
        assert (logits(made, [3, 37]) - want).pow(2).mean().sqrt() < off * want.std()
