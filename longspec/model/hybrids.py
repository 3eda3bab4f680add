"""Families whose layers aren't all attention: what their config.json says, as fields of `Config`.

Takes the dict; knows no file and no tensor. One more such family is its name in HYBRIDS, the names of its layers'
kinds in _MIXERS, and what else differs in `plain_config` and `fields_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspec.errors import ModelError
from longspec.model.config_values import MOST_STATE_DIM

__all__ = ["HYBRIDS", "ZERO_CENTRED", "Delta", "fields_of", "plain_config"]

HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm2", "lfm2_moe", "linear_llama")
"""Values of `model_type`."""

ZERO_CENTRED = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Families that store their norms' weights minus 1."""

_DELTA = {"linear_attention": "gated_delta", "full_attention": "attention"}
_CONVOLUTION = {"conv": "short_conv", "full_attention": "attention"}
_GROUPED = {"linear_attention": "grouped_linear", "full_attention": "attention"}
_MIXERS = {
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "linear_llama": _GROUPED,
}
"""By family: the kinds of its layers in config.json's `layer_types`, and their names in MIXERS."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The sizes of gated delta nets."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int  # of the convolution, the own position included
    by_key_head: bool = False  # the checkpoint keeps the inputs of a key head together (Qwen3-Next)
    tiled: bool = False  # value head i reads key head i modulo their number (GGUF), not its neighbours' (safetensors)

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def keys(self) -> int:
        """Channels of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_dim

    @property
    def inputs(self) -> int:
        """Outputs of the first product: decay and strength, queries, keys and values, and the gate."""
        return 2 * self.value_heads + self.channels + self.values

    @property
    def key_of(self) -> tuple[int, ...]:
        """Each value head's key head."""
        each = self.value_heads // self.key_heads
        return tuple(i % self.key_heads if self.tiled else i // each for i in range(self.value_heads))


def plain_config(family: str, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json with the names and defaults that are not Llama's translated."""
    if family in ("lfm2", "lfm2_moe"):
        names = {"rms_norm_eps": ("norm_eps", 1e-5), "rope_theta": ("rope_theta", 1_000_000.0)}
        values = {name: raw.get(old, default) for name, (old, default) in names.items()}
        tied = raw.get("tie_embedding", raw.get("tie_word_embeddings", True))
        channels = _adjusted(raw) if family == "lfm2" else raw["intermediate_size"]
        return {**raw, **values, "intermediate_size": channels, "tie_word_embeddings": tied}
    if _MIXERS.get(family) is _DELTA:
        # Qwen3.5's mixtures have no layer that is dense, and so no width of one.
        mlp = {"intermediate_size": raw.get("moe_intermediate_size", 512)} if family == "qwen3_5_moe_text" else {}
        return {"partial_rotary_factor": 0.25, "head_dim": 256, **mlp, **raw}
    return raw


def fields_of(family: str, raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The fields of `Config` that only hybrids have; none for other families."""
    if family not in _MIXERS:
        return {}
    fields: dict[str, Any] = {"mixers": _mixers(family, raw, layers)}
    if family in ("lfm2", "lfm2_moe"):
        return {**fields, "convolution": raw.get("conv_L_cache") or 3}
    if _MIXERS[family] is _GROUPED:
        return {**fields, "convolution": _inputs(raw)}
    names = {"key_head_dim": 128, "value_head_dim": 128, "conv_kernel_dim": 4}
    keys, heads = raw.get("linear_num_key_heads") or 16, raw.get("linear_num_value_heads") or 32
    key_dim, value_dim, width = (raw.get(f"linear_{name}") or default for name, default in names.items())
    if heads % keys:
        raise ModelError(f"config.json says {heads} value heads of linear attention over {keys} key heads.")
    delta = Delta(
        keys, heads, key_dim, value_dim, width, family == "qwen3_next", bool(raw.get("linear_value_heads_tiled"))
    )
    return {**fields, "delta": delta, "output_gate": True}


def _mixers(family: str, raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Each layer's mixer, by `layer_types`; where there are none, by the family's rule."""
    types, known = raw.get("layer_types"), _MIXERS[family]
    if types is None and known is _CONVOLUTION:
        full = raw.get("full_attn_idxs") or range(layers)
        types = ["full_attention" if i in full else "conv" for i in range(layers)]
    elif types is None and known is _GROUPED:
        types = ["linear_attention"] * layers
    elif types is None:
        every = raw.get("full_attention_interval") or 4
        types = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    for i, kind in enumerate(types):
        if kind not in known:
            raise ModelError(f"Layer {i} is of the type {kind!r}; the layers of {family} are {' or '.join(known)}.")
    if "full_attention" not in types and known is not _GROUPED:
        raise ModelError(f"No layer of this {family} is full_attention, and longspec needs one.")
    return tuple(known[kind] for kind in types)


def _adjusted(raw: Mapping[str, Any]) -> int:
    """LFM2: the MLP's width, of which config.json may hold another number that it follows from."""
    width = int(raw.get("block_ff_dim") or raw["intermediate_size"])
    if not raw.get("block_auto_adjust_ff_dim", True):
        return width
    width, unit = 2 * width // 3, int(raw.get("block_multiple_of") or 256)
    width = int(float(raw.get("block_ffn_dim_multiplier") or 1.0) * width)
    return -(-width // unit) * unit


def _inputs(raw: Mapping[str, Any]) -> int:
    """Linearised Llama: the positions that a convolution reads. The file's kernel is as wide ahead as back."""
    kernel, group = raw.get("linear_conv_kernel_dim") or 63, raw.get("linear_group_size") or 64
    if (dim := raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]) > MOST_STATE_DIM:
        raise ModelError(
            f"config.json says heads of {dim:,} in linear attention; at most {MOST_STATE_DIM} were expected."
        )
    if kernel % 2 == 0 or group != 64:
        raise ModelError(
            f"config.json says a convolution of {kernel} and groups of {group}; "
            "a convolution of an odd width and groups of 64 were expected."
        )
    return (int(kernel) + 1) // 2
