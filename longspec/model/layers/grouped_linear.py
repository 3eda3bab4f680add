"""Grouped linear attention ("When Linear Attention Meets Autoregressive Decoding", 2406.07368), quadratic in groups.

Takes normed rows [r, width] and their pass; gives [r, width]. Queries and keys are rotated and have length one. In
position i, whose group of 64 began at g, and of a head with n weights w,

    o_i = S_g^T q_i + sum_{g <= j <= i} relu(q_i k_j)^2 v_j + sum_{t < n} w_{n-1-t} v_{i-t}
    S_g = sum_{j < g} k_j v_j^T

A position stages k, u = v and a decay of 0, and v a second time as the convolution's input: S is then a state like the
gated delta net's, and groups are its blocks (`longspec.cache.recurrent`). j and i - t go along a row's path in a tree.

Shapes: n rows, H query heads, K key heads, D head dimension, G = H / K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.cache.shape import RowSpec, StateSpec
from longspec.cache.state_stage import History
from longspec.model.config import Config, Rope
from longspec.model.layers.grouped_native import KernelGrouped, missing
from longspec.model.layers.reader import Reader
from longspec.model.rope import rotate
from longspec.model.rows import Pass

__all__ = ["GroupedLinear"]


@dataclass(frozen=True, slots=True)
class GroupedLinear:
    """One layer's grouped linear attention. Queries, keys and values are one matrix."""

    config: Config
    place: int  # among the layers with a state
    rope: Rope | None
    inputs: Any  # Linear or CodedLinear
    convolution: Tensor  # [inputs, H]
    output: Any
    native: KernelGrouped | None
    strict: bool

    @classmethod
    def rows(cls, config: Config, dtype: torch.dtype) -> tuple[RowSpec, ...]:
        """What a position leaves in the cache."""
        heads, dim = config.key_heads, config.head_dim
        return (
            RowSpec("x", 1, heads * dim, dtype),
            RowSpec("k", heads, dim, torch.float32),
            RowSpec("u", heads, dim, torch.float32),
            RowSpec("decay", heads, 1, torch.float64),
        )

    @classmethod
    def states(cls, config: Config, dtype: torch.dtype, layers: int) -> StateSpec:
        """What `layers` such layers keep."""
        heads, dim = config.key_heads, config.head_dim
        rows = cls.rows(config, dtype)
        return StateSpec(layers, rows, config.convolution - 1, (heads, dim, dim), tuple(range(heads)))

    @classmethod
    def read(cls, reader: Reader, layer: int, place: int) -> GroupedLinear:
        c, at = reader.config, f"layers.{layer}.self_attn"
        q, kv = c.heads * c.head_dim, c.key_heads * c.head_dim
        # The file's kernel is centred, and the weights of its later half stand for what is not written yet.
        taps = reader.exact(f"{at}.dwconv.weight", (c.heads, 1, 2 * c.convolution - 1, 1))
        convolution = taps[:, 0, : c.convolution, 0].T.contiguous()
        by_kernel = reader.by_kernel and missing(c) is None
        return cls(
            c,
            place,
            c.ropes[layer],
            inputs=reader.linear([f"{at}.{name}_proj" for name in ("q", "k", "v")], q + 2 * kv, c.width),
            convolution=convolution,
            output=reader.linear([f"{at}.o_proj"], c.width, q),
            native=KernelGrouped(c, convolution) if by_kernel else None,
            strict=reader.strict,
        )

    @classmethod
    def workspace(cls, config: Config, rows: int) -> int:
        """Bytes of a pass's temporary tensors."""
        return rows * 4 * (4 * config.heads + 4 * config.key_heads) * config.head_dim

    @property
    def is_exact(self) -> bool:
        """Whether the C kernels take all of it in bf16, so that a row's bits are its own."""
        return self.native is not None

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.inputs, self.convolution, self.output

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        left: Tensor = self.output(self.mix(self.inputs(x), run))
        return left

    def mix(self, made: Tensor, run: Pass) -> Tensor:
        """What is between the two products [r, H * D], of the inputs `made`."""
        c = self.config
        turned, values = made.view(len(made), -1, c.head_dim).tensor_split((c.heads + c.key_heads,), 1)
        if self.rope is not None:
            turned = rotate(turned, *run.turns[self.rope])
        return self.read_cache(torch.cat((turned, values), 1).flatten(1), run)

    def read_cache(self, made: Tensor, run: Pass) -> Tensor:
        """What the rows `made` [r, (H + 2 K) * D] read [r, H * D], which are rotated; they are staged."""
        c = self.config
        output = made.new_empty(len(made), c.heads * c.head_dim)
        for span in run.rows.spans:
            states, rows, part = span.stage.states, made[span.at], output[span.at]
            values = rows[:, (c.heads + c.key_heads) * c.head_dim :]
            history: History = states.history(
                self.place,
                span.staged,
                x=values[:, None],
                u=values.float().view(len(rows), c.key_heads, c.head_dim),
                decay=torch.zeros(len(rows), c.key_heads, 1, dtype=torch.float64, device=rows.device),
            )
            if self.native is not None:
                self.native(history, rows, part)
            else:
                part.copy_(self._by_torch(history, rows))
            states.put(history)
        return output

    def _by_torch(self, history: History, rows: Tensor) -> Tensor:
        c, held = self.config, history.rows
        heads = F.normalize(rows.view(len(rows), -1, c.head_dim)[:, : c.heads + c.key_heads].float(), dim=-1)
        queries, keys = heads.tensor_split((c.heads,), 1)
        history.add("k", keys)
        read = torch.empty(queries.shape, device=rows.device)
        for branch in history.branches:
            places, _, fresh = (each.to(rows.device) for each in branch.places)
            mask, state = branch.mask.to(rows.device), history.state(branch)
            if self.strict:  # row by row: sums over a row's own path alone
                for row, path in zip(fresh.tolist(), mask, strict=True):
                    own = places[path]
                    read[row] = self._read(queries[row][None], held["k"][own], held["u"][own], None, state)[0]
            else:
                read[fresh] = self._read(queries[fresh], held["k"][places], held["u"][places], mask, state)
        for values, weights in zip(history.inputs(), self.convolution, strict=True):
            each = values.float().view(len(rows), c.key_heads, c.head_dim)
            read = read + each.repeat_interleave(c.heads // c.key_heads, 1) * weights[:, None]
        return read.flatten(1).to(rows.dtype)

    def _read(self, queries: Tensor, k: Tensor, u: Tensor, mask: Tensor | None, state: Tensor) -> Tensor:
        """Of queries [n, H, D] over k, u [m, K, D] by mask [n, m], and the state [K, D, D]: [n, H, D]."""
        grouped = queries.view(len(queries), self.config.key_heads, -1, self.config.head_dim)
        scores = torch.einsum("nkgd,mkd->kgnm", grouped, k).relu().square()
        scores = scores if mask is None else scores * mask
        read = torch.einsum("kgnm,mke->nkge", scores, u) + torch.einsum("nkgd,kde->nkge", grouped, state)
        return read.flatten(1, 2)
