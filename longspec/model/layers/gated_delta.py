"""The gated delta net (Qwen3-Next, Qwen3.5): linear attention whose state forgets, and writes what it lacks.

Takes normed rows [r, width] and their pass; gives [r, width]. For each of its value heads, with a state S [key dim,
value dim] at the parent p of position i, a decay a, a strength b in 0..1, and q, k, v behind a short convolution,

    u_i = b_i (v_i - a_i S_p^T k_i)        what is written: v, less what the state would say
    S_i = a_i S_p + k_i u_i^T              o_i = S_i^T q_i

A position stages k, u, the sum d of log a since its block's start, and the convolution's input: S_i is a sum over the
block's rows on its path (`longspec.cache.recurrent`), so that S_p is never made. `chunked` solves for the u of all rows
of a block at once, a tree's too: its ancestors are the triangle's mask. `recurrence` is the definition above, row by
row. It is the chunked form's test, and what `--strict` runs: its sums don't depend on what else is in the pass.

Shapes: n rows, H value heads, K key heads, D their dimensions. All in fp32 but the sums d, which reach -1000 in a
block: their differences would lose four digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.cache.layout import Branch
from longspec.cache.recurrent import History
from longspec.cache.stage import RowSpec, StateSpec
from longspec.model.config import Config
from longspec.model.hybrids import Delta
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.rows import Pass, Span

__all__ = ["GatedDelta", "Ingredients", "chunked", "recurrence"]


class Ingredients(NamedTuple):
    """What rows bring: the next to their keys, which are in the history."""

    queries: Tensor  # [n, H, D]
    keys: Tensor  # [n, H, D]
    values: Tensor  # [n, H, D]
    decays: Tensor  # [n, H]: log a
    strengths: Tensor  # [n, H]: b

    def of(self, rows: slice | Tensor) -> Ingredients:
        return Ingredients(*(each[rows] for each in self))


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
        size = 2 * d.value_heads + d.channels + d.values
        return cls(
            d,
            place,
            reader.numbers(d.key_of),
            inputs=reader.linear([f"{at}.{name}" for name in names], size, c.width),
            convolution=reader.exact(f"{at}.conv1d.weight", (d.channels, 1, d.width))[:, 0],
            decay=-reader.exact(f"{at}.A_log", (d.value_heads,)).exp(),
            decay_bias=reader.exact(f"{at}.dt_bias", (d.value_heads,)),
            norm=Norm(reader.exact(f"{at}.norm.weight", (d.value_dim,)), c.eps),
            output=reader.linear([f"{at}.out_proj"], c.width, d.values),
            strict=reader.strict,
        )

    @classmethod
    def workspace(cls, config: Config, rows: int) -> int:
        """Bytes of a pass's temporary tensors."""
        d = _delta(config)
        return rows * 4 * (5 * d.channels + 8 * d.value_heads * max(d.key_dim, d.value_dim))

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.inputs, self.convolution, self.decay, self.decay_bias, self.norm, self.output

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        d = self.delta
        alpha, beta, qkv, gate = self._split(self.inputs(x))
        decays = self.decay * F.softplus(alpha.float().contiguous() + self.decay_bias)
        strengths = beta.float().contiguous().sigmoid()
        read = torch.empty(len(x), d.value_heads, d.value_dim, device=x.device)
        for span in run.rows.spans:
            read[span.at] = self._read(span, qkv[span.at], decays[span.at], strengths[span.at])
        gated = self.norm(read) * F.silu(gate.float()).view_as(read)
        left: Tensor = self.output(gated.to(x.dtype).flatten(1))
        return left

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

    def _read(self, span: Span, x: Tensor, decays: Tensor, strengths: Tensor) -> Tensor:
        """Stage a sequence's rows, and give what they read [n, H, D]."""
        d, states = self.delta, span.stage.states
        history: History = states.history(self.place, span.staged, x=x[:, None])
        mixed = F.silu(convolved(history, self.convolution))
        parts = torch.split(mixed, [d.keys, d.keys, d.values], -1)
        queries, keys = (part.view(len(x), d.key_heads, d.key_dim) for part in parts[:2])
        values = parts[2].view(len(x), d.value_heads, d.value_dim)
        keys = _unit(keys)
        history.add("k", keys)
        queries = (_unit(queries) * d.key_dim**-0.5)[:, self.key_of]
        all_rows = Ingredients(queries, keys[:, self.key_of], values, decays, strengths)
        read = torch.empty_like(values)
        for branch in history.branches:
            form = recurrence if self.strict else chunked
            read[branch.new] = form(history, branch, all_rows.of(branch.new), self.key_of)
        states.put(history)
        return read


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


def chunked(history: History, branch: Branch, rows: Ingredients, key_of: Tensor) -> Tensor:
    """What a branch's rows read [n, H, D], by one triangular solve; keeps their u and decay in the history."""
    state, mask = history.state(branch), branch.mask.to(rows.queries.device)
    known, held = branch.known, history.rows
    count = branch.known_count
    queries, keys, values = (each.transpose(0, 1) for each in rows[:3])  # [H, n, D]
    k = torch.cat((held["k"][known][:, key_of], rows.keys)).transpose(0, 1)
    before = held["decay"][known][..., 0]  # [known, H]
    sums = mask[:, count:].double() @ rows.decays.double()
    if count:
        root = branch.roots.to(mask.device)
        sums = sums + torch.where(root[:, None] < 0, 0.0, before[root.clamp(min=0)])
    gaps = sums.T[:, :, None] - torch.cat((before, sums)).T[:, None]  # [H, n, known + n]
    weights = gaps.masked_fill(~mask, float("-inf")).float().exp()
    by_keys = (keys @ k.transpose(1, 2)) * weights
    faded, strength = sums.T[..., None].float().exp(), rows.strengths.T[..., None]
    u = held["u"][known].transpose(0, 1)
    wanted = strength * (values - faded * (keys @ state) - by_keys[..., :count] @ u)
    if len(rows.queries) > 1:
        triangle = strength * by_keys[..., count:]
        wanted = torch.linalg.solve_triangular(triangle, wanted, upper=False, unitriangular=True)
    history.keep(branch, u=wanted.transpose(0, 1), decay=sums[..., None])
    read = faded * (queries @ state) + ((queries @ k.transpose(1, 2)) * weights) @ torch.cat((u, wanted), 1)
    return read.transpose(0, 1)


def recurrence(history: History, branch: Branch, rows: Ingredients, key_of: Tensor) -> Tensor:
    """The same by the definition: each row's state from its parent's, one row after the other."""
    held, known = history.rows, branch.known
    keys, written, sums = held["k"][known][:, key_of], held["u"][known], held["decay"][known][..., 0]
    states, decays = {-1: history.state(branch)}, {-1: torch.zeros_like(rows.decays[0].double())}
    read, u, decay = (torch.empty_like(each) for each in (rows.values, rows.values, rows.decays.double()))
    for row, parent in enumerate(branch.parents):
        i = row - branch.known_count
        decays[row] = sums[row] if i < 0 else decays[parent] + rows.decays[i]
        faded = states[parent] * (decays[row] - decays[parent]).float().exp()[:, None, None]
        key = keys[row] if i < 0 else rows.keys[i]
        if i >= 0:
            u[i] = rows.strengths[i, :, None] * (rows.values[i] - (key[:, None] @ faded)[:, 0])
            decay[i] = decays[row]
        states[row] = faded + key[:, :, None] * (written[row] if i < 0 else u[i])[:, None]
        if i >= 0:
            read[i] = (rows.queries[i][:, None] @ states[row])[:, 0]
    history.keep(branch, u=u, decay=decay[..., None])
    return read
