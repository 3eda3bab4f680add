"""A looped model (Ouro) in torch's operators, as naive as can be: the oracle of a family that transformers lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Looped", "Mlp", "turn_of", "turned"]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dim = heads, key_heads, dim
        self.q_proj = nn.Linear(width, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, key_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(width, key_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Over x [b, n, width] alone: every position reads itself and those before it."""
        b, n, _ = x.shape
        q = turned(self.q_proj(x).view(b, n, self.heads, self.dim), *turn).transpose(1, 2)
        k = turned(self.k_proj(x).view(b, n, self.key_heads, self.dim), *turn).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.key_heads, self.dim).transpose(1, 2)
        k, v = (each.repeat_interleave(self.heads // self.key_heads, 1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) * self.dim**-0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        read: Tensor = self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return read


class Mlp(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, channels, bias=False)
        self.up_proj = nn.Linear(width, channels, bias=False)
        self.down_proj = nn.Linear(channels, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return made


class _Layer(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = _Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.input_layernorm_2 = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm_2 = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), turn))
        made: Tensor = x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))
        return made


class _Body(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.early_exit_gate = nn.Linear(c.hidden_size, 1)  # in every checkpoint, and of no use at a threshold of 1


class Looped(nn.Module):
    """Values of a config.json in, a model with random weights out. It computes all positions anew in each call."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        dim = raw["hidden_size"] // raw["num_attention_heads"]
        self.raw = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "early_exit_threshold": 1.0, "head_dim": dim, **raw}
        c = self.c = SimpleNamespace(**self.raw)
        torch.manual_seed(4)
        self.model = _Body(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))

    def readouts(self, tokens: Tensor) -> list[Tensor]:
        """Logits [b, n, V] of tokens [b, n] after each loop."""
        c, hidden, made = self.c, self.model.embed_tokens(tokens), []
        turn = turn_of(tokens.shape[1], c.head_dim, c.rope_theta)
        for _ in range(c.total_ut_steps):
            for layer in self.model.layers:
                hidden = layer(hidden, turn)
            hidden = self.model.norm(hidden)
            made.append(self.lm_head(hidden))
        return made

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.readouts(tokens)[-1])

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights under Ouro's names."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.raw))
        save_file({name: each.contiguous() for name, each in self.state_dict().items()}, folder / "model.safetensors")


def turn_of(n: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, 1, dim] of the positions 0 to n - 1."""
    angles = torch.arange(n)[:, None] * theta ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [b, n, heads, dim], each rotated to its position."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
