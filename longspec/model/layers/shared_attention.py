"""Softmax attention whose keys and values may be another layer's (Gemma 4).

Takes normed rows [r, width] and their pass; gives [r, width]. Heads of each layer have their own size (`PerLayer`).
Queries, keys and values are normed, values without a weight. A layer without keys and values reads what the pass has
staged at the layer that it shares them with; nobody else stages there.

Shapes: H query heads, K key heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspec.cache.native import unfit
from longspec.cache.shape import RowSpec
from longspec.model.config import Config, Rope
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.rope import rotate
from longspec.model.rows import Pass

__all__ = ["SharedAttention"]


@dataclass(frozen=True, slots=True)
class SharedAttention:
    """One layer's attention."""

    config: Config
    place: int  # among the layers of the cache: its own, or that of the layer that it shares
    rope: Rope | None
    heads: tuple[int, int, int]  # H, K, D
    inputs: Any  # Linear or CodedLinear: queries, and keys and values where it has any
    query_norm: Norm
    key_norm: Norm | None  # None: it has no keys
    value_norm: Norm | None
    keys_as_values: bool
    output: Any

    @classmethod
    def rows(cls, config: Config, dtype: torch.dtype) -> tuple[RowSpec, ...]:
        """What a position leaves in the cache, at the most."""
        sizes = (config.key_heads, config.head_dim, dtype)
        return RowSpec("k", *sizes), RowSpec("v", *sizes)

    @classmethod
    def read(cls, reader: Reader, layer: int, place: int) -> SharedAttention:
        c, at, each = reader.config, f"layers.{layer}.self_attn", reader.config.per_layer
        assert each is not None
        owns, same = each.sources[layer] == layer, each.keys_as_values[layer]
        keys, dim = each.heads[layer]
        names = ["q_proj", *(["k_proj", *(() if same else ("v_proj",))] if owns else ())]
        size = c.heads * dim + (len(names) - 1) * keys * dim
        return cls(
            c,
            place,
            c.ropes[layer],
            (c.heads, keys, dim),
            inputs=reader.linear([f"{at}.{name}" for name in names], size, c.width),
            query_norm=reader.norm(f"{at}.q_norm", dim),
            key_norm=reader.norm(f"{at}.k_norm", dim) if owns else None,
            value_norm=Norm(torch.ones(dim, device=reader.device), c.eps) if owns else None,
            keys_as_values=same,
            output=reader.linear([f"{at}.o_proj"], c.width, c.heads * dim),
        )

    @classmethod
    def workspace(cls, config: Config, rows: int) -> int:
        """Bytes of a pass's temporary tensors beside those that every plan counts: norms in fp32."""
        return rows * 4 * (config.heads + 2 * config.key_heads) * config.head_dim

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.inputs, self.query_norm, self.key_norm, self.output

    @property
    def owns(self) -> bool:
        """Whether it has keys and values of its own."""
        return self.key_norm is not None

    @property
    def is_exact(self) -> bool:
        """Whether the C kernels take all of it in bf16, so that a row's bits are its own."""
        return unfit(torch.bfloat16, torch.device("cpu"), self.heads[2]) is None

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        left: Tensor = self.output(self.mix(self.inputs(x), run))
        return left

    def mix(self, made: Tensor, run: Pass) -> Tensor:
        """What is between the two products: attention's output [r, H * D] of the inputs `made`."""
        heads, keys, dim = self.heads
        queries, rest = self.widened(made).view(len(made), -1, dim).tensor_split((heads,), 1)
        queries = self.turned(self.query_norm(queries), run)
        if self.key_norm is None or self.value_norm is None:
            return self._read(queries, None, run)
        return self._read(
            queries, (self.turned(self.key_norm(rest[:, :keys]), run), self.value_norm(rest[:, keys:])), run
        )

    def widened(self, made: Tensor) -> Tensor:
        """The product of the inputs with columns of values, where they are the keys."""
        if not (self.owns and self.keys_as_values):
            return made
        return torch.cat((made, made[:, self.heads[0] * self.heads[2] :]), -1)

    def read_cache(self, made: Tensor, run: Pass) -> Tensor:
        """Attention's output [r, H * D] of queries, keys and values `made` that are normed and rotated."""
        heads, keys, dim = self.heads
        queries, own, values = made.view(len(made), -1, dim).tensor_split((heads, heads + keys), 1)
        return self._read(queries, (own, values) if self.owns else None, run)

    def _read(self, queries: Tensor, own: tuple[Tensor, Tensor] | None, run: Pass) -> Tensor:
        """own: keys and values of the rows, to be staged."""
        output = queries.new_empty(len(queries), self.heads[0] * self.heads[2])
        for span in run.rows.spans:
            if own is not None:
                span.stage.put(self.place, span.staged, own[0][span.at], own[1][span.at])
            some = queries[span.at]
            parts = span.stage.parts(self.place, span.staged, some)
            output[span.at] = run.attend(some, parts, self.config.scale).flatten(1)
        return output

    def turned(self, heads: Tensor, run: Pass) -> Tensor:
        return heads if self.rope is None else rotate(heads, *run.turns[self.rope])
