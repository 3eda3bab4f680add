"""The gated delta net (Qwen3-Next, Qwen3.5): linear attention whose state forgets, and writes what it lacks.

Takes normed rows [r, width] and their pass; gives [r, width]. For each of its value heads, with a state S [key dim,
value dim] at the parent p of position i, a decay a, a strength b in 0..1, and q, k, v behind a short convolution,

    u_i = b_i (v_i - a_i S_p^T k_i)        what is written: v, less what the state would say
    S_i = a_i S_p + k_i u_i^T              o_i = S_i^T q_i

A position stages k, u, the sum d of log a since its block's start, and the convolution's input: S_i is a sum over the
block's rows on its path (`longspec.cache.recurrent`), so that S_p is never made (`delta_rule`; by C `delta_native`).
Where the products are the C kernels' all between them is too: `native`.

Shapes: n rows, H value heads, K key heads, D their dimensions. All in fp32 but the sums d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.cache.shape import RowSpec, StateSpec
from longspec.cache.state_stage import History
from longspec.model.config import Config
from longspec.model.hybrids import Delta
from longspec.model.layers.delta_native import KernelDelta, missing, read_by_kernel
from longspec.model.layers.delta_rule import Form, Ingredients, chunked, recurrence
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.layers.steady import steady
from longspec.model.rows import Pass

__all__ = ["GatedDelta", "convolved", "form_of"]


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """One layer's gated delta net. Its four inputs are one matrix: decay, strength, q k v, and the output's gate."""

    delta: Delta
    place: int  # among the layers with a state
    key_of: Tensor  # [H]: each value head's key head
    inputs: Any  # Linear or CodedLinear
    convolution: Tensor  # [channels, width of the convolution]
    decay: Tensor  # [H]: A, which is negative
    decay_bias: Tensor  # [H]
    norm: Norm
    output: Any
    form: Form
    native: KernelDelta | None
    strict: bool

    @classmethod
    def rows(cls, config: Config, dtype: torch.dtype) -> tuple[RowSpec, ...]:
        """What a position leaves in the cache."""
        d, fp32 = _delta(config), torch.float32
        return (
            RowSpec("x", 1, d.channels, dtype),
            RowSpec("k", d.key_heads, d.key_dim, fp32),
            RowSpec("u", d.value_heads, d.value_dim, fp32),
            RowSpec("decay", d.value_heads, 1, torch.float64),
        )

    @classmethod
    def states(cls, config: Config, dtype: torch.dtype, layers: int) -> StateSpec:
        """What `layers` such layers keep."""
        d = _delta(config)
        state = (d.value_heads, d.key_dim, d.value_dim)
        return StateSpec(layers, cls.rows(config, dtype), d.width - 1, state, d.key_of)

    @classmethod
    def read(cls, reader: Reader, layer: int, place: int) -> GatedDelta:
        c, d, at = reader.config, _delta(reader.config), f"layers.{layer}.linear_attn"
        names = (
            ("in_proj_ba", "in_proj_qkvz") if d.by_key_head else ("in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z")
        )
        inputs = reader.linear([f"{at}.{name}" for name in names], d.inputs, c.width)
        convolution = reader.exact(f"{at}.conv1d.weight", (d.channels, 1, d.width))[:, 0]
        decay = -reader.exact(f"{at}.A_log", (d.value_heads,)).exp()
        decay_bias = reader.exact(f"{at}.dt_bias", (d.value_heads,))
        norm = Norm(reader.exact(f"{at}.norm.weight", (d.value_dim,)), c.eps)
        by_kernel = reader.by_kernel and missing(d, reader.device) is None
        return cls(
            d,
            place,
            reader.numbers(d.key_of),
            inputs=inputs,
            convolution=convolution,
            decay=decay,
            decay_bias=decay_bias,
            norm=norm,
            output=reader.linear([f"{at}.out_proj"], c.width, d.values),
            form=form_of(d, reader.device, strict=reader.strict),
            native=KernelDelta(d, convolution, decay, decay_bias, norm) if by_kernel else None,
            strict=reader.strict,
        )

    @classmethod
    def workspace(cls, config: Config, rows: int) -> int:
        """Bytes of a pass's temporary tensors."""
        d = _delta(config)
        return rows * 4 * (5 * d.channels + 8 * d.value_heads * max(d.key_dim, d.value_dim))

    @property
    def is_exact(self) -> bool:
        """Whether the C kernels take all of it in bf16, so that a row's bits are its own."""
        return self.native is not None

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.inputs, self.convolution, self.decay, self.decay_bias, self.norm, self.output

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        left: Tensor = self.output(self.mix(self.inputs(x), run))
        return left

    def mix(self, made: Tensor, run: Pass) -> Tensor:
        """What is between the two products: the gated and normed reading [r, values], of the inputs `made`."""
        d = self.delta
        alpha, beta, qkv, gate = self._split(made)
        read = torch.empty(len(made), d.value_heads, d.value_dim, device=made.device)
        for span in run.rows.spans:
            states, part = span.stage.states, read[span.at]
            history: History = states.history(self.place, span.staged, x=qkv[span.at][:, None])
            brought = self.native.ingredients if self.native else self._ingredients
            rows = brought(history, alpha[span.at], beta[span.at])
            for branch in history.branches:
                self.form(history, branch, rows, part, self.key_of)
            states.put(history)
        if self.native:
            return self.native.opened(read, gate)
        gated = self.norm(read) * steady(F.silu, gate.contiguous(), strict=self.strict).view_as(read)
        return gated.to(made.dtype).flatten(1)

    def _split(self, made: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the product of the inputs: decay and strength [r, H] as they are made, q k v [r, channels], the gate."""
        d = self.delta
        if not d.by_key_head:
            alpha, beta, qkv, gate = torch.split(made, [d.value_heads, d.value_heads, d.channels, d.values], -1)
            return alpha, beta, qkv, gate
        # Qwen3-Next: one key head's rows stand together, those of its value heads too.
        each = d.value_heads // d.key_heads
        first, rest = made.tensor_split((2 * d.value_heads,), -1)
        beta, alpha = (half.flatten(1) for half in first.view(-1, d.key_heads, 2, each).unbind(2))
        sizes = [d.key_dim, d.key_dim, each * d.value_dim, each * d.value_dim]
        grouped = torch.split(rest.reshape(len(made), d.key_heads, -1), sizes, -1)
        queries, keys, values, gate = (part.flatten(1) for part in grouped)
        return alpha, beta, torch.cat((queries, keys, values), -1), gate

    def _ingredients(self, history: History, alpha: Tensor, beta: Tensor) -> Ingredients:
        """What a pass's rows bring, of their inputs, which the history has, and alpha, beta [r, H]; keys go to the
        history too.
        """
        d, count = self.delta, len(alpha)
        mixed = steady(F.silu, convolved(history, self.convolution), strict=self.strict)
        parts = torch.split(mixed, [d.keys, d.keys, d.values], -1)
        queries, keys = (_unit(part.view(count, d.key_heads, d.key_dim)) for part in parts[:2])
        history.add("k", keys)
        return Ingredients(
            queries * d.key_dim**-0.5,
            keys,
            parts[2].view(count, d.value_heads, d.value_dim).contiguous(),
            decays=self.decay * steady(F.softplus, alpha.float() + self.decay_bias, strict=self.strict),
            strengths=steady(torch.sigmoid, beta.contiguous(), strict=self.strict),
        )


def form_of(delta: Delta, device: torch.device, *, strict: bool) -> Form:
    """How such layers are computed on a device: by C where it can be had, else by torch."""
    if missing(delta, device) is None:
        return read_by_kernel
    return recurrence if strict else chunked


def _delta(config: Config) -> Delta:
    assert config.delta is not None
    return config.delta


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; the summand is that of the models' own code."""
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + 1e-6)


def convolved(history: History, weight: Tensor) -> Tensor:
    """The causal convolution [n, channels] in fp32 along each row's path, by weight [channels, inputs]."""
    first, *rest = history.inputs()
    total = first.float() * weight[:, 0]
    for i, inputs in enumerate(rest, 1):
        total = total + inputs.float() * weight[:, i]
    return total
