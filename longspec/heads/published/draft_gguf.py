"""EAGLE-3 heads that were trained here, as a draft for llama.cpp: one GGUF file of its architecture `eagle3`.

Takes a head and its target, which lies in a GGUF file too: its tokenizer is the draft's. Queries and keys of a head's
channels are stored in pairs, as llama.cpp turns them; the draft vocabulary as the target's ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.errors import LongspecError, UsageError
from longspec.heads.format import Trained
from longspec.heads.published.eagle3 import Eagle3, eagle3_of
from longspec.machine.files import replaced
from longspec.model.gguf.header import read_header
from longspec.model.load import Model

__all__ = ["write_gguf"]

_NAMES = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "blk.0.attn_norm",
    "hidden_norm": "blk.0.attn_norm_2",
    "self_attn.q_proj": "blk.0.attn_q",
    "self_attn.k_proj": "blk.0.attn_k",
    "self_attn.v_proj": "blk.0.attn_v",
    "self_attn.o_proj": "blk.0.attn_output",
    "post_attention_layernorm": "blk.0.ffn_norm",
    "mlp.gate_proj": "blk.0.ffn_gate",
    "mlp.up_proj": "blk.0.ffn_up",
    "mlp.down_proj": "blk.0.ffn_down",
}
_READS = 3  # layers, as llama.cpp wants them


def write_gguf(path: Path, head: Trained, model: Model) -> None:
    """Write a file, in the dtype of the loaded head.

    Raises:
        UsageError: llama.cpp has no draft of this kind, or the target lies in no GGUF file.
        LongspecError: the file can't be written.
    """
    if head.kind != "eagle3":
        raise UsageError(f"llama.cpp has no draft of a head of the kind {head.kind} for this model: of ours it knows "
                         "eagle3 (MTP heads lie in the target's own file there).")  # fmt: skip
    if model.checkpoint is None or model.checkpoint.gguf is None:
        raise UsageError(f"{model.name} lies in no GGUF file, whose tokenizer the draft needs; name the GGUF file that "
                         "llama.cpp is to run, with -m.")  # fmt: skip
    made = eagle3_of(model, head)
    if len(made.layers) != _READS:
        raise UsageError(f"llama.cpp's EAGLE-3 reads {_READS} layers, and this head {len(made.layers)}.")
    fields = read_header(model.checkpoint.gguf).fields
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: _write(place, made, model, fields))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror or error}; name another file.") from error


def _write(path: Path, head: Eagle3, model: Model, fields: Mapping[str, Any]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    c, target, kind = head.config, model.decoder.config, "eagle3"
    writer = GGUFWriter(path, kind)
    writer.add_name(f"EAGLE-3 head for {model.name}")
    counts = {
        "block_count": 1,
        "context_length": target.context,
        "embedding_length": c.width,
        "feed_forward_length": c.mlp_width,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.key_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "target_hidden_size": target.width,
    }
    for name, value in counts.items():
        writer.add_uint32(f"{kind}.{name}", value)
    rope = c.ropes[0]
    assert rope is not None
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", c.eps)
    writer.add_float32(f"{kind}.rope.freq_base", rope.theta)
    writer.add_array(f"{kind}.target_layers", list(head.layers))
    writer.add_bool(f"{kind}.norm_before_residual", head.norm_first)
    _add_tokenizer(writer, fields)
    for name, weight in head.weights.items():
        module, _, last = name.rpartition(".")
        heads = {"self_attn.q_proj": c.heads, "self_attn.k_proj": c.key_heads}.get(module)
        stored = weight if heads is None else _in_pairs(weight, heads)
        held = stored.detach().cpu().float() if stored.dim() == 1 else stored.detach().cpu()
        if held.dtype == torch.bfloat16:
            bits = held.contiguous().view(torch.int16).numpy().view("uint8")
            writer.add_tensor(f"{_NAMES[module]}.{last}", bits, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(f"{_NAMES[module]}.{last}", held.float().contiguous().numpy())
    if head.tokens is not None:
        writer.add_tensor("d2t", head.tokens.cpu().long().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, fields: Mapping[str, Any]) -> None:
    """Copy the target's. Lists keep the types that llama.cpp reads: strings, int32 and float32."""
    for name, value in fields.items():
        if not name.startswith("tokenizer."):
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)


def _in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head's channels i and i + D / 2 behind each other."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
