"""Heads that were trained here, as checkpoints of vLLM's `speculators` (layout of 0.9).

    eagle3     as its type eagle3, with the output matrix of the draft vocabulary; embeddings are the target's
    fastmtp    as its type mtp, over a layer of Qwen3's form; embeddings and output matrix are the target's

Takes a head and its target; writes config.json and model.safetensors, as `speculators` itself loads them; vLLM has not
been tried on them here. Features enter an EAGLE-3 head as they are there, so that its
powers of two are taken into the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.heads.eagle3 import Eagle3Head
from longspec.heads.format import CONFIG, WEIGHTS, Trained
from longspec.heads.published.mtp import SPECULATORS
from longspec.model.load import Model
from longspec.model.weights.safetensors import save_described

__all__ = ["TYPES", "write_speculators"]

_VERSION = "0.9.0"


def write_speculators(folder: Path, head: Trained, model: Model, verifier: str) -> None:
    """Write a folder. verifier: what the target is called there, a Hugging Face id or a folder.

    Raises:
        UsageError: the layout has no type for this kind of head.
        LongspecError: a file can't be written.
    """
    if head.kind not in TYPES:
        raise UsageError(f"`speculators` has no type for a head of the kind {head.kind}; those of the kinds "
                         f"{' and '.join(TYPES)} can be exported to it.")  # fmt: skip
    config, tensors = TYPES[head.kind](head, model)
    kind = config["speculators_model_type"]
    said = {
        **config,
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": head.depth}],
            "verifier": {"name_or_path": verifier, "architectures": _architectures(model)},
        },
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
    }
    save_described(folder / WEIGHTS, tensors, folder / CONFIG, said)


def _eagle3(head: Trained, model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    module, target = head.module, model.decoder
    assert isinstance(module, Eagle3Head)
    tensors = {name: value for name, value in module.state_dict().items() if name != "scale"}
    tensors |= {"fc.weight": module.folded, "lm_head.weight": head.rows(model)}
    if target.config.embedding_scale != 1.0:  # the layout knows no factor
        tensors["embed_tokens.weight"] = target.embed(torch.arange(target.config.vocabulary, device=target.device))
    if head.tokens is not None:
        tokens = head.tokens.cpu()
        tensors["d2t"] = tokens - torch.arange(len(tokens))
        tensors["t2d"] = torch.zeros(target.config.vocabulary, dtype=torch.bool).index_fill(0, tokens, True)
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": len(head.rows(model)),
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": list(head.reads(model)),
        "transformer_layer_config": {"model_type": "llama", "num_hidden_layers": 1, **_layer(head, model, 1)},
    }
    return config, tensors


def _mtp(head: Trained, model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {}
    for name, value in head.module.state_dict().items():
        if name != "final":  # that of the target
            place = next(place for place in SPECULATORS if name.startswith(place))
            tensors[SPECULATORS[place] + name.removeprefix(place)] = value
    layers = model.decoder.config.layers
    layer = {"model_type": "qwen3", "num_hidden_layers": layers, "use_sliding_window": True, "max_window_layers": 0}
    config = {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": {**layer, **_layer(head, model, layers)},
    }
    return config, tensors


TYPES: Mapping[str, Callable[[Trained, Model], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    "eagle3": _eagle3,
    "fastmtp": _mtp,
}
"""By kind of head, what its config says and its tensors."""


def _layer(head: Trained, model: Model, layers: int) -> dict[str, Any]:
    """The fields of a transformers config. A head reads as many positions as it was trained on."""
    config, target = head.config(model), model.decoder.config
    rope = config.ropes[0]
    assert rope is not None
    return {
        "vocab_size": target.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "max_position_embeddings": target.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": head.window,
        "layer_types": ["sliding_attention"] * layers,
    }


def _architectures(model: Model) -> list[str]:
    """As transformers calls the target's class: what its config.json says, or that of its family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    said = None if model.checkpoint is None else model.checkpoint.config().get("architectures")
    family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.decoder.config.family)
    named = [said[0]] if said else [] if family is None else [family]
    if not named:
        raise UsageError(f"transformers names no class for {model.decoder.config.family}, which the layout asks for.")
    return [str(name) for name in named]
