"""A linearised Llama (2406.07368) in torch's operators, as naive as can be: one quadratic form over all positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.looped import Mlp, turn_of, turned
from torch import Tensor, nn

__all__ = ["Linearised"]

GROUP = 64


class _Attention(nn.Module):
    """Local scores are squares of what is positive, within groups; global ones are the products themselves, of all
    earlier groups; and a convolution runs over values, whose kernel is half in the future.
    """

    def __init__(self, c: SimpleNamespace, *, softmax: bool) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dim, self.softmax = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            softmax,
        )
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.key_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.key_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=False)
        if not softmax:
            kernel = c.linear_conv_kernel_dim
            self.dwconv = nn.Conv2d(
                self.heads, self.heads, (kernel, 1), padding=(kernel // 2, 0), groups=self.heads, bias=False
            )

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Over x [b, n, width] alone: every position reads itself and those before it."""
        b, n, _ = x.shape
        q = turned(self.q_proj(x).view(b, n, self.heads, self.dim), *turn).transpose(1, 2)
        k = turned(self.k_proj(x).view(b, n, self.key_heads, self.dim), *turn).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.key_heads, self.dim).transpose(1, 2)
        k, v = (each.repeat_interleave(self.heads // self.key_heads, 1) for each in (k, v))
        at = torch.arange(n)
        before = at <= at[:, None]
        if self.softmax:
            scores = (q @ k.transpose(-1, -2) * self.dim**-0.5).masked_fill(~before, float("-inf"))
            read = scores.softmax(-1) @ v
        else:
            products = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
            own = at // GROUP == (at // GROUP)[:, None]
            scores = torch.where(own, products.relu().square(), products).masked_fill(~before, 0.0)
            weight = self.dwconv.weight.clone()
            weight[:, :, weight.shape[2] // 2 + 1 :] = 0.0
            read = scores @ v + F.conv2d(v, weight, padding=self.dwconv.padding, groups=self.heads)
        left: Tensor = self.o_proj(read.transpose(1, 2).flatten(2))
        return left


class _Layer(nn.Module):
    def __init__(self, c: SimpleNamespace, *, softmax: bool) -> None:
        super().__init__()
        self.self_attn = _Attention(c, softmax=softmax)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        made: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return made


class _Body(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c, softmax=kind == "full_attention") for kind in c.layer_types)
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)


class Linearised(nn.Module):
    """Values of a config.json in, a model with random weights out. It computes all positions anew in each call."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        dim, kinds = raw["hidden_size"] // raw["num_attention_heads"], ["linear_attention"] * raw["num_hidden_layers"]
        self.raw = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": dim, "layer_types": kinds, **raw}
        c = self.c = SimpleNamespace(**self.raw)
        torch.manual_seed(6)
        self.model = _Body(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """Logits [b, n, V] of tokens [b, n]."""
        hidden = self.model.embed_tokens(tokens)
        turn = turn_of(tokens.shape[1], self.c.head_dim, self.c.rope_theta)
        for layer in self.model.layers:
            hidden = layer(hidden, turn)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(hidden)))

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights, under the names of the paper's code."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.raw))
        save_file({name: each.contiguous() for name, each in self.state_dict().items()}, folder / "model.safetensors")
