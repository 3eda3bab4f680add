"""Rows without a token beside a text's own, through a decoder's last layers: the form that has gradients.

Takes a decoder, the hidden states of whole texts, and rows that join them on the way; gives the rows' last states. Row
k of position t stands at position t + k: it reads the text up to t, and t's rows up to itself. The text's own rows go
through the same layers, and read nothing of these. In decoding such rows are staged, and never committed.

Shapes: B texts, n positions, k rows of each of m of these, H query heads, K key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.layer import Layer
from longspec.model.layers.norm import Norm

__all__ = ["beside"]


def beside(decoder: Decoder, states: Tensor, joining: Mapping[int, Sequence[Tensor]], places: Tensor) -> Tensor:
    """Last states [B, m, k, W], before the final norm. joining: the rows, each [B, m, W], by the number of layers that
    they leave out, rising. states: the text's own [B, n, W], after as many layers as the first rows leave out. places:
    [m], the positions that have rows.

    Raises:
        UsageError: the decoder has layers that aren't softmax attention with a dense MLP.
    """
    config = decoder.config
    if config.mixers or config.mixture or config.output_gate or config.sinks or config.loops > 1:
        raise UsageError(f"Rows beside a text's own can't be run through the layers of {config.family}, which have a "
                         "state, experts, a gate, sinks or loops; train another kind of head.")  # fmt: skip
    rows: Tensor = states.new_empty(len(states), len(places), 0, states.shape[-1])
    for i in range(min(joining), config.layers):
        if new := joining.get(i):
            rows = torch.cat((rows, torch.stack([*new], 2)), 2)
        states, rows = _layer(decoder, i, states, rows, places)
    return rows


def _layer(decoder: Decoder, i: int, states: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """States [B, n, W] and rows [B, m, k, W] after a layer."""
    layer, window = decoder.layers[i], decoder.config.windows[i]
    length, count = states.shape[1], rows.shape[2]
    at = torch.arange(length, device=states.device)
    ahead = torch.arange(1, count + 1, device=states.device)
    with torch.no_grad():
        queries, keys, values = _heads(decoder, i, states, at)
        if i + 1 < decoder.config.layers:  # of the last layer nothing but keys and values is read
            shares = _scores(decoder.config, queries, keys, _reach(at, at, at, window)).softmax(-1).to(values.dtype)
            states = _rest(layer, states, (shares @ values).transpose(1, 2).flatten(-2))
    queries, own_keys, own_values = _heads(decoder, i, rows, places[:, None] + ahead)
    text = _reach(places[:, None] + ahead, at, places[:, None], window).flatten(0, 1)  # [m * k, n]
    scores = (
        _scores(decoder.config, queries.flatten(2, 3), keys, text).view(*queries.shape[:-1], length),
        _scores(decoder.config, queries, own_keys, _reach(ahead, ahead, ahead, window)),
    )
    shares = torch.cat(scores, -1).softmax(-1).to(values.dtype)  # [B, H, m, k, n + k]
    of_text, own = shares.tensor_split((length,), -1)
    read = (of_text.flatten(2, 3) @ values).view(queries.shape) + own @ own_values
    return states, _rest(layer, rows, read.permute(0, 2, 3, 1, 4).flatten(-2))


def _reach(rows: Tensor, columns: Tensor, last: Tensor, window: int | None) -> Tensor:
    """[..., c] bool: which positions the rows at positions [...] may read, up to `last` and within the window."""
    allowed = (columns <= last[..., None]) & (columns <= rows[..., None])
    return allowed if window is None else allowed & (rows[..., None] - columns < window)


def _heads(decoder: Decoder, i: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [B, ..., W], each [B, H, ..., D]: key heads are repeated."""
    c, layer = decoder.config, decoder.layers[i]
    flat = x.flatten(0, -2)
    made = layer.mixer.inputs(_normed(layer.before_mixer, flat))
    at = positions.expand(x.shape[:-1]).flatten()
    made, _ = layer.mixer.project(made, decoder.turn(layer.mixer.rope, at, made.dtype))
    heads = made.view(*x.shape[:-1], -1, c.head_dim).movedim(-2, 1)
    queries, keys, values = heads.tensor_split((c.heads, c.heads + c.key_heads), 1)
    repeats = c.heads // c.key_heads
    return queries, keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    """In training x is fp32: torch has no fused norm of it by a weight in half precision."""
    if norm is None:
        return x
    return norm(x if norm.weight.dtype == torch.float32 else x.to(norm.weight.dtype))


def _scores(config: Config, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    """[..., q, c] in fp32, of queries [..., q, D] and keys [..., c, D]; -inf where a query may not read [q, c]."""
    scores = (queries @ keys.transpose(-1, -2)).float() * config.scale
    if (cap := config.attention_softcap) is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores.masked_fill(~allowed, float("-inf"))


def _rest(layer: Layer, x: Tensor, read: Tensor) -> Tensor:
    """The layer's output, of its input and of what attention read, both [..., W] or [..., H * D]."""
    flat, made = x.flatten(0, -2), layer.mixer.output(read.flatten(0, -2))
    flat = flat + (layer.after_mixer(made) if layer.after_mixer else made)
    made = layer.mlp(_normed(layer.before_mlp, flat))
    return (flat + (layer.after_mlp(made) if layer.after_mlp else made)).view(x.shape)
