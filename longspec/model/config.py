"""A checkpoint's config.json as the parameters of our one decoder.

Takes the dict, gives a frozen `Config`; knows no file and no tensor. Families differ from Llama by the flags here; a
property that shows in the checkpoint's tensors (biases) needs no flag. Unsupported weight quantization is refused
here, by name, before any weight is loaded (`longspec.model.weights.scheme`); values are held to their types and
ranges by `config_values` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longspec.errors import ModelError
from longspec.model.config_values import MOST_CONTEXT, checked, checked_rope, turned
from longspec.model.hybrids import HYBRIDS, ZERO_CENTRED, Delta, fields_of, plain_config
from longspec.model.looped import LOOPED, loops_of
from longspec.model.mixtures import MIXTURES, Mixture, mixture_of
from longspec.model.per_layer import PER_LAYER, PerLayer, kinds_of, per_layer_of
from longspec.model.weights.scheme import QUANTIZED, scheme_of

__all__ = ["FAMILIES", "Config", "LayerSpec", "Rope"]

Norms = Literal["before", "after", "both"]

_ATTENTION_ONLY = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi3", "olmo2")
FAMILIES = tuple(dict.fromkeys((*_ATTENTION_ONLY, *LOOPED, *PER_LAYER, *MIXTURES, *HYBRIDS)))
"""Values of `model_type` that this decoder speaks. Those of _WITH_IMAGES are read too, for their text part."""

_WITH_IMAGES = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_WITH_IMAGES |= {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
_SAME = {"gemma4_unified_text": ("gemma4_text", {"hidden_size_per_layer_input": 0, "sliding_window": 1024})}
"""Other names of a family, and what their config.json means where it doesn't say."""

_TIED = ("smollm3", "gemma2", "gemma3_text", "gemma4_text", "lfm2", "lfm2_moe")
"""Families of which transformers' config class ties the head to the embeddings where config.json doesn't say."""

_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", *(name for name in HYBRIDS if name != "linear_llama"))
"""Families that norm each head's queries and keys."""

_WIDTH_NORMS = ("olmo2", "olmoe")
"""Families that norm the queries of all heads at once, and the keys."""

_ROPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True, slots=True)
class Rope:
    """One kind of rotary position embedding. `values` holds the kind's parameters, under config.json's names."""

    kind: str
    theta: float
    dims: int  # leading dimensions of a head that are rotated
    context: int  # the model's maximum sequence length
    values: tuple[tuple[str, Any], ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        value = dict(self.values).get(name)
        return default if value is None else value


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer is made of: names in MIXERS and MLPS (`longspec.model.layers`), and where its norms stand."""

    mixer: str
    mlp: str
    norms: Norms

    @property
    def is_attention(self) -> bool:
        return self.mixer in ("attention", "shared_attention")


@dataclass(frozen=True, slots=True)
class Config:
    """A decoder's architecture."""

    family: str
    vocabulary: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    mlp_width: int
    context: int
    eps: float
    activation: str
    windows: tuple[int | None, ...]  # per layer: attention window in positions, the own one included
    ropes: tuple[Rope | None, ...]  # per layer: None for layers without position embedding
    scale: float  # multiplies the attention scores
    norms: Norms = "before"
    query_norm: Literal["head", "width"] | None = None
    norm_offset: float = 0.0  # Gemma stores its norm weights minus 1
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    fused: bool = False  # qkv_proj and gate_up_proj are one matrix each in the checkpoint
    end_tokens: tuple[int, ...] = ()
    # The head is the embedding table, unless the file holds a head. Not in the repr, which is hashed into
    # fingerprints: existing heads and prompt caches stay valid.
    tied: bool = field(default=False, repr=False)
    # Of hybrids, per layer: a name in MIXERS; empty: all are attention. Not in the repr either, as what follows.
    mixers: tuple[str, ...] = field(default=(), repr=False)
    output_gate: bool = field(default=False, repr=False)  # attention's output is gated by its own input
    delta: Delta | None = field(default=None, repr=False)
    convolution: int = field(default=0, repr=False)  # positions that a short convolution reads
    mixture: Mixture | None = field(default=None, repr=False)  # of experts
    # Times that a looped model's layers run. Each run is a layer of its own here, with its own rows in the cache.
    loops: int = field(default=1, repr=False)
    per_layer: PerLayer | None = field(default=None, repr=False)  # what differs between layers
    sinks: bool = field(default=False, repr=False)  # each query head has a score that takes weight and has no value

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def group(self) -> int:
        """The layers of one loop: those that have weights."""
        return self.layers // self.loops

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """Of each layer."""
        mixers = self.mixers or ("attention",) * self.layers
        sparse = self.mixture.layers if self.mixture else (False,) * self.layers
        mixed = "experts" if self.per_layer is None else "dense_and_experts"
        mlps = [mixed if each else "dense" for each in sparse]
        return tuple(LayerSpec(mixer, mlp, self.norms) for mixer, mlp in zip(mixers, mlps, strict=True))

    def head_channels(self, layer: int) -> int:
        """Of a layer's queries, keys, values and attention output together, as if it were attention."""
        if self.per_layer is None:
            return 2 * (self.heads + self.key_heads) * self.head_dim
        keys, dim = self.per_layer.heads[layer]
        own = (2 - self.per_layer.keys_as_values[layer]) * (self.per_layer.sources[layer] == layer)
        return (2 * self.heads + own * keys) * dim

    def channels(self, layer: int, *, active: bool) -> int:
        """Of a layer's MLP: of all experts, or of those that a row goes through."""
        m, each = self.mixture, self.per_layer
        if m is None or not m.layers[layer]:
            return self.mlp_width if each is None else each.channels[layer]
        beside = m.shared if each is None else each.channels[layer]
        return m.width * (m.chosen if active else m.experts) + beside

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Config:
        """The Config of a config.json. ModelError names what isn't supported or inconsistent."""
        family = raw.get("model_type")
        if isinstance(family, str) and family in _SAME:
            name, meant = _SAME[family]
            return cls.read({**meant, **raw, "model_type": name})
        if isinstance(family, str) and family in _WITH_IMAGES and isinstance(raw.get("text_config"), Mapping):
            outer = {name: raw[name] for name in ("tie_word_embeddings", *QUANTIZED) if name in raw}
            ends = {name: raw[name] for name in ("eos_token_id",) if raw.get(name) is not None}
            return cls.read({**outer, **raw["text_config"], **ends, "model_type": _WITH_IMAGES[family]})
        if family not in FAMILIES:
            raise ModelError(
                f"The architecture {family!r} is not supported; longspec runs {', '.join(FAMILIES)} (text only)."
            )
        scheme_of(raw)
        try:
            return _read(str(family), checked(str(family), plain_config(str(family), raw)))
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ModelError(f"The model's config.json can't be used: {type(error).__name__} on {error}.") from error


def _read(family: str, raw: Mapping[str, Any]) -> Config:
    gemma = family.startswith("gemma")
    width, heads, layers = raw["hidden_size"], raw["num_attention_heads"], raw["num_hidden_layers"]
    head_dim = raw.get("head_dim") or (256 if gemma else width // heads)
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"The activation {activation!r} is not supported; longspec knows {', '.join(_ACTIVATIONS)}.")
    if raw.get("use_bidirectional_attention") not in (None, False, "vision"):  # Gemma 4's pictures see each other whole
        raise ModelError("This checkpoint attends in both directions: it embeds texts and can't write them.")
    loops, hybrid = loops_of(family, raw), fields_of(family, raw, layers)
    sliding = _sliding(family, raw, layers) * loops
    each = per_layer_of(family, raw, layers)
    if each is not None:
        head_dim = max(dim for _, dim in each.heads)
        hybrid = {"mixers": ("shared_attention",) * layers, "per_layer": each}
    ropes, context, end = _ropes(family, raw, sliding, head_dim), _context(raw), raw.get("eos_token_id")
    return Config(
        family=family,
        vocabulary=raw["vocab_size"],
        width=width,
        heads=heads,
        key_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_width=max(each.channels) if each is not None else raw["intermediate_size"],
        context=context if gemma else _lengthened(context, ropes),  # Gemma's files say the lengthened one
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation="clamped" if family == "gpt_oss" else _ACTIVATIONS[activation],
        windows=tuple(raw["sliding_window"] if slides else None for slides in sliding),
        ropes=ropes,
        scale=_scale(family, raw, head_dim),
        norms="both" if gemma or family in LOOPED else "after" if family == "olmo2" else "before",
        query_norm="head" if family in _HEAD_NORMS else "width" if family in _WIDTH_NORMS else None,
        norm_offset=1.0 if (gemma and each is None) or family in ZERO_CENTRED else 0.0,
        embedding_scale=width**0.5 if gemma else 1.0,
        attention_softcap=raw.get("attn_logit_softcapping") if gemma else None,
        logit_softcap=raw.get("final_logit_softcapping") if gemma else None,
        fused=family == "phi3",
        tied=bool(raw.get("tie_word_embeddings", family in _TIED)),
        **hybrid,
        mixture=mixture_of(family, raw, layers),
        loops=loops,
        sinks=family == "gpt_oss",
        end_tokens=tuple(end) if isinstance(end, list) else () if end is None else (end,),
    )


def _scale(family: str, raw: Mapping[str, Any], head_dim: int) -> float:
    """What multiplies the attention scores."""
    if family in PER_LAYER:
        return 1.0  # queries and keys are normed with weights that have it
    said = raw.get("query_pre_attn_scalar") if family.startswith("gemma") else None
    scale: float = float(said or head_dim) ** -0.5
    return scale


def _context(raw: Mapping[str, Any]) -> int:
    return int(raw.get("max_position_embeddings") or 2048)


def _lengthened(context: int, ropes: Sequence[Rope | None]) -> int:
    """The context with YaRN's or linear scaling: the factor times the original one, or what the file says if that is
    more.

    Many a file keeps `max_position_embeddings` when scaling is switched on, as Qwen's model cards advise: transformers
    only warns beyond it, and vLLM multiplies as here.
    """
    scaled = [rope for rope in ropes if rope is not None and rope.kind in ("linear", "yarn")]
    longer = [rope.get("factor", 1.0) * rope.get("original_max_position_embeddings") for rope in scaled]
    return min(max([context, *map(int, longer)]), MOST_CONTEXT)


def _sliding(family: str, raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Per layer: whether it attends to a sliding window only."""
    if raw.get("sliding_window") is None:
        return [False] * layers
    if family in PER_LAYER:
        return [kind == "sliding_attention" for kind in kinds_of(raw, layers)]
    if isinstance(types := raw.get("layer_types"), list):
        return [kind == "sliding_attention" for kind in types]
    match family:
        case "gemma2" | "gpt_oss":
            return [i % 2 == 0 for i in range(layers)]
        case "gemma3_text":
            pattern = int(raw.get("sliding_window_pattern") or 6)
            return [(i + 1) % pattern != 0 for i in range(layers)]
        case "qwen2" | "qwen3":
            return [i >= int(raw.get("max_window_layers", layers)) for i in range(layers)]
        case "smollm3":
            return [not rotates for rotates in _rotating(raw, layers)]
        case _:
            return [True] * layers  # mistral, phi3, olmo2


def _rotating(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """SmolLM3: per layer, whether it has position embeddings."""
    flags = raw.get("no_rope_layers")
    if flags is None:
        every = int(raw.get("no_rope_layer_interval") or 4)
        return [(i + 1) % every != 0 for i in range(layers)]
    return [bool(flag) for flag in flags[:layers]]


def _ropes(family: str, raw: Mapping[str, Any], sliding: list[bool], head_dim: int) -> tuple[Rope | None, ...]:
    values = raw.get("rope_parameters") or {}
    if any(isinstance(inner, Mapping) for inner in values.values()):  # one set of parameters per kind of layer
        full = _rope(raw, values.get("full_attention") or {}, head_dim)
        local = _rope(raw, values.get("sliding_attention") or {}, raw["head_dim"] if family in PER_LAYER else head_dim)
    else:
        full = local = _rope(raw, values or raw.get("rope_scaling") or {}, head_dim)
        if family == "gemma3_text":
            local = Rope("default", float(raw.get("rope_local_base_freq") or 10_000.0), head_dim, full.context)
    ropes: list[Rope | None] = [local if slides else full for slides in sliding]
    if family == "smollm3":
        ropes = [rope if rotates else None for rope, rotates in zip(ropes, _rotating(raw, len(ropes)), strict=True)]
    return tuple(ropes)


def _rope(raw: Mapping[str, Any], said: Any, head_dim: int) -> Rope:
    kind = checked_rope("its kind", said).get("rope_type") or said.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)  # the name in Phi-3's first configs
    if kind not in _ROPES:
        raise ModelError(f"The rope kind {kind!r} is not supported; longspec knows {', '.join(_ROPES)}.")
    values, context = checked_rope(kind, said), _context(raw)
    original = values.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or context
    partial = values.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    theta = values.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    dims = turned(kind, values, partial, head_dim)
    values = {**values, "partial_rotary_factor": partial} if kind == "proportional" else values
    kept = {**values, "original_max_position_embeddings": original} if kind != "default" else {}
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    return Rope(kind, float(theta), dims, context, tuple(sorted(frozen.items())))
