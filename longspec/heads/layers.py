"""Trainable parts of draft heads: norm, layer, attention to one token.

These are the differentiable forms; in decoding `longspec.drafters.heads.clover` runs layers through a `Decoder`.

Shapes: B sequences of T positions, W the target's width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.model.config import Config, Rope
from longspec.model.rope import Rotation, rotate

__all__ = [
    "Layer",
    "Norm",
    "TokenAttention",
    "attended",
    "block_of",
    "heads_of",
    "near_identity",
    "projections",
    "turn_of",
]


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TokenAttention(nn.Module):
    """Attention of a hidden state to one token: weighted per head by the cosine of query and key, without a softmax.

    The biases of queries and keys are initialised alike, so that tokens have an effect from the start.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads = heads
        with torch.no_grad():
            self.query.bias.fill_(1.0)
            self.key.bias.fill_(1.0)
            self.value.bias.zero_()

    def start(self, value: Tensor) -> None:
        """Begin as the linear map `value` [W, W] of the token: queries and keys are nearly their biases, and alike."""
        self.query.weight.mul_(0.1)
        self.key.weight.mul_(0.1)
        self.value.weight.copy_(value)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[..., W], from normed hidden states and tokens [..., W]."""
        queries, keys, values = (
            made.unflatten(-1, (self.heads, -1)) for made in (self.query(hidden), self.key(tokens), self.value(tokens))
        )
        read: Tensor = (F.cosine_similarity(queries, keys, -1)[..., None] * values).flatten(-2)
        return read


class Layer(nn.Module):
    """A Llama layer, with parameters named as in a checkpoint. It is initialised as the identity."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, self.config = config, config
        self.input_layernorm = Norm(c.width, c.eps)
        self.post_attention_layernorm = Norm(c.width, c.eps)
        self.self_attn = projections(c)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(c.width, c.mlp_width, bias=False),
                "up_proj": nn.Linear(c.width, c.mlp_width, bias=False),
                "down_proj": nn.Linear(c.mlp_width, c.width, bias=False),
            }
        )
        nn.init.zeros_(self.mlp["down_proj"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """[B, T, W]. turn: the rotary cosines and sines. mask: [T, T] bool, what a row reads; None is causal attention
        within the window.
        """
        return self.fed(self.mixed(x, turn, mask))

    def mixed(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """The first half: X and attention."""
        mask = _mask(x.shape[1], self.config.windows[0], x.device) if mask is None else mask
        return x + attended(self.self_attn, self.input_layernorm(x), self.config, turn, mask, is_causal=mask is None)

    def fed(self, x: Tensor) -> Tensor:
        """The second half: X and the MLP. x: [..., W]."""
        normed = self.post_attention_layernorm(x)
        gated = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        left: Tensor = x + self.mlp["down_proj"](gated)
        return left


def projections(config: Config) -> nn.ModuleDict:
    """The products of an attention, named as in a checkpoint; its output is 0 at first."""
    inner, outer = config.heads * config.head_dim, config.key_heads * config.head_dim
    made = nn.ModuleDict(
        {
            "q_proj": nn.Linear(config.width, inner, bias=False),
            "k_proj": nn.Linear(config.width, outer, bias=False),
            "v_proj": nn.Linear(config.width, outer, bias=False),
            "o_proj": nn.Linear(inner, config.width, bias=False),
        }
    )
    nn.init.zeros_(made["o_proj"].weight)  # type: ignore[arg-type]
    return made


def attended(
    products: nn.ModuleDict,
    normed: Tensor,
    config: Config,
    turn: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    is_causal: bool,
) -> Tensor:
    """Attention [B, T, W] over the rows of normed [B, T, W]: those that the mask lets a row read, the rows up to its
    own, or all.
    """
    queries, keys, values = (
        products[name](normed).unflatten(-1, (-1, config.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
    )
    queries, keys = rotate(queries, *turn), rotate(keys, *turn)
    queries, keys, values = (made.transpose(1, 2) for made in (queries, keys, values))
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
    left: Tensor = products["o_proj"](read.transpose(1, 2).flatten(2))
    return left


def block_of(target: Config, layers: int, window: int, vocabulary: int) -> Config:
    """Config of a head's layers: a plain Llama decoder with the target's widths.

    window: positions that a position attends to, itself included; as in training, so that sequences may be longer.
    """
    rope = next((rope for rope in target.ropes if rope is not None), None)
    plain = Rope("default", rope.theta if rope else 10_000.0, target.head_dim, target.context)
    return replace(
        target,
        family="llama",
        vocabulary=vocabulary,
        activation="silu",
        windows=(window,) * layers,
        ropes=(plain,) * layers,
        scale=target.head_dim**-0.5,
        norms="before",
        query_norm=None,
        norm_offset=0.0,
        embedding_scale=1.0,
        attention_softcap=None,
        fused=False,
        tied=True,
        mixers=(),
        output_gate=False,
        delta=None,
        mixture=None,
        sinks=False,
        per_layer=None,
    )


def turn_of(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rotary cosines and sines of these positions, for layers of this config."""
    rope = config.ropes[0]
    assert rope is not None
    return Rotation(rope, positions.device)(positions, positions < 0, dtype)


def _mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[T, T] bool, causal mask with a sliding window; None if the window covers the whole sequence."""
    if window is None or length <= window:
        return None
    rows = torch.arange(length, device=device)
    back = rows[:, None] - rows
    return (back >= 0) & (back < window)


def near_identity(linear: nn.Linear) -> None:
    """Initialise as the identity on the first inputs, with small weights for the others."""
    with torch.no_grad():
        linear.weight.mul_(0.1)
        linear.weight[:, : linear.weight.shape[0]] = torch.eye(linear.weight.shape[0])


def heads_of(config: Config) -> int:
    """Number of heads: the target's if it divides the width, else 1."""
    return config.heads if config.width % config.heads == 0 else 1
