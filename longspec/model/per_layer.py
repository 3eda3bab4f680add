"""Families whose layers differ in more than their window (Gemma 4): what their config.json says, as a `PerLayer`.

Takes the dict; knows no file and no tensor. Heads have two sizes. The last layers have no keys and values of their own,
and read those of the last layer of their kind that has. A global layer's values may be its keys, an MLP may be twice as
wide, and each layer may take an embedding of the token that is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longspec.errors import ModelError

__all__ = ["PER_LAYER", "PerLayer", "kinds_of", "per_layer_of"]

PER_LAYER = ("gemma4_text",)
"""Values of `model_type`."""

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class PerLayer:
    """Of each layer, what differs between layers."""

    heads: tuple[tuple[int, int], ...]  # key heads, and a head's dimension
    sources: tuple[int, ...]  # the layer whose keys and values it reads: itself, or an earlier one
    keys_as_values: tuple[bool, ...]  # its values are its keys, before these are normed and rotated
    channels: tuple[int, ...]  # of its MLP
    inputs: int  # channels of its own embedding of a token; 0: it has none
    table: int  # rows of the table of these

    @property
    def owners(self) -> tuple[int, ...]:
        """The layers that have keys and values of their own, in order."""
        return tuple(i for i, source in enumerate(self.sources) if source == i)


def kinds_of(raw: Mapping[str, Any], layers: int) -> list[str]:
    """Each layer's kind: every sixth is global where config.json doesn't say, and the last always is."""
    kinds = raw.get("layer_types") or [_LOCAL if (i + 1) % 6 else _GLOBAL for i in range(layers)]
    return [*kinds[:-1], _GLOBAL]


def per_layer_of(family: str, raw: Mapping[str, Any], layers: int) -> PerLayer | None:
    """What differs between the layers of a config.json; None for other families. ModelError where it contradicts
    itself, or says what isn't supported.
    """
    if family not in PER_LAYER:
        return None
    kinds = kinds_of(raw, layers)
    for i, kind in enumerate(kinds):
        if kind not in (_GLOBAL, _LOCAL):
            raise ModelError(f"Layer {i} is of the type {kind!r}; the layers of {family} are {_GLOBAL} or {_LOCAL}.")
    said = raw.get("per_layer_config")
    heads = tuple(_heads(raw, said, i, kind) for i, kind in enumerate(kinds))
    for i, (keys, _) in enumerate(heads):
        if raw["num_attention_heads"] % keys:
            raise ModelError(f"config.json says {raw['num_attention_heads']} heads over {keys} key heads in layer {i}.")
    shared = raw.get("num_kv_shared_layers") or 0
    if shared >= layers:
        raise ModelError(f"config.json says that {shared} of {layers} layers have no keys and values of their own.")
    sources = _sources(kinds, layers - shared)
    wide = 2 if raw.get("use_double_wide_mlp") else 1
    inputs: int = raw.get("hidden_size_per_layer_input") or 0
    return PerLayer(
        heads,
        sources,
        tuple(bool(raw.get("attention_k_eq_v")) and kind == _GLOBAL for kind in kinds),
        tuple(raw["intermediate_size"] * (1 if source == i else wide) for i, source in enumerate(sources)),
        inputs,
        raw["vocab_size_per_layer_input"] if inputs else 0,
    )


def _heads(raw: Mapping[str, Any], said: Mapping[str, Any] | None, i: int, kind: str) -> tuple[int, int]:
    """Key heads and dimension; published files say those of global layers, newer ones (`said`) those of single layers
    that differ.
    """
    keys = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    dim = raw["head_dim"]
    if kind == _GLOBAL and said is None:
        dim = raw.get("global_head_dim") or 512
        keys = (raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None) or keys
    own = (said or {}).get(str(i))
    own = own if isinstance(own, Mapping) else {}
    sizes = own.get("num_key_value_heads", keys), own.get("head_dim", dim)
    if any(type(size) is not int or not 0 < size <= 1 << 16 for size in sizes):
        raise ModelError(f"config.json says {sizes} for layer {i}'s key heads and their dimension.")
    return sizes


def _sources(kinds: Sequence[str], first: int) -> tuple[int, ...]:
    """The layers before `first` are their own; the others read the last of these that is of their kind."""
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    for i, kind in enumerate(kinds[first:], first):
        if kind not in last:
            raise ModelError(f"Layer {i} ({kind}) shares the keys and values of a layer like it, and there is none.")
    return tuple(i if i < first else last[kind] for i, kind in enumerate(kinds))
