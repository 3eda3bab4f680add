"""Softmax attention over the keys and values of a sequence's cache.

Takes normed rows [r, width] and their pass; gives [r, width], and leaves a position's keys and values in the cache. The
products run over all rows at once, attention per sequence, or over all sequences by the batched C kernel.

Shapes: H query heads, K key heads, D head dimension. Queries, keys and values are one matrix; with an output gate
(Qwen3.5) each query head's gate stands behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspec.attention.native_batch import reads
from longspec.cache.native import unfit
from longspec.cache.shape import RowSpec
from longspec.model.config import Config, Rope
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.layers.steady import steady
from longspec.model.rope import rotate
from longspec.model.rows import Pass

__all__ = ["Attention"]


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention."""

    config: Config
    place: int  # among the layers of the cache
    rope: Rope | None
    inputs: Any  # Linear or CodedLinear
    query_norm: Norm | None
    key_norm: Norm | None
    output: Any
    strict: bool
    sinks: Tensor | None = None  # [H] in fp32 (gpt-oss): a score each that takes weight and has no value

    @classmethod
    def rows(cls, config: Config, dtype: torch.dtype) -> tuple[RowSpec, ...]:
        """What a position leaves in the cache."""
        sizes = (config.key_heads, config.head_dim, dtype)
        return RowSpec("k", *sizes), RowSpec("v", *sizes)

    @classmethod
    def read(cls, reader: Reader, layer: int, place: int) -> Attention:
        c, at = reader.config, f"layers.{layer}.self_attn"
        q, kv = c.heads * c.head_dim, c.key_heads * c.head_dim
        queries, keys = {"head": (c.head_dim, c.head_dim), "width": (q, kv), None: (0, 0)}[c.query_norm]
        names = ["qkv_proj"] if c.fused else ["q_proj", "k_proj", "v_proj"]
        return cls(
            c,
            place,
            c.ropes[layer],
            inputs=reader.linear([f"{at}.{name}" for name in names], q * (1 + c.output_gate) + 2 * kv, c.width),
            query_norm=reader.norm(f"{at}.q_norm", queries) if queries else None,
            key_norm=reader.norm(f"{at}.k_norm", keys) if keys else None,
            output=reader.linear([f"{at}.o_proj"], c.width, q),
            strict=reader.strict,
            sinks=reader.exact(f"{at}.sinks", (c.heads,)) if c.sinks else None,
        )

    @classmethod
    def workspace(cls, config: Config, rows: int) -> int:
        """Bytes of a pass's temporary tensors beside those that every plan counts."""
        return rows * 4 * config.heads * config.head_dim if config.output_gate else 0

    @property
    def is_exact(self) -> bool:
        """Whether the C kernels take all of it in bf16, so that a row's bits are its own."""
        return unfit(torch.bfloat16, torch.device("cpu"), self.config.head_dim) is None

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.inputs, self.query_norm, self.key_norm, self.sinks, self.output

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        left: Tensor = self.output(self.mix(self.inputs(x), run))
        return left

    def mix(self, made: Tensor, run: Pass) -> Tensor:
        """What is between the two products: attention's output [r, H * D], gated, of the inputs `made`."""
        made, gate = self.project(made, run.turns[self.rope] if self.rope else None)
        read = self.read_cache(made, run)
        if gate is None:
            return read
        return read * steady(torch.sigmoid, gate.contiguous(), strict=self.strict).to(read.dtype)

    def project(self, made: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values [r, (H + 2 K) * D] of the product `made`, with head norms and rotation applied, and
        the gate [r, H * D] of the output, where there is one.
        """
        c, gate = self.config, None
        sizes = (c.heads * c.head_dim * (1 + c.output_gate), c.key_heads * c.head_dim)
        queries, keys, values = made.tensor_split((sizes[0], sum(sizes)), -1)
        if c.output_gate:
            queries, gate = (half.flatten(1) for half in queries.view(len(made), c.heads, -1).chunk(2, -1))
        if c.query_norm == "width":  # OLMo 2: over all heads at once
            queries, keys = self.query_norm(queries), self.key_norm(keys)  # type: ignore[misc]
        queries, keys = (t.view(len(made), -1, c.head_dim) for t in (queries, keys))  # [r, heads, D]
        if c.query_norm == "head":
            queries, keys = self.query_norm(queries), self.key_norm(keys)  # type: ignore[misc]
        if turn is not None:
            queries, keys = rotate(queries, *turn), rotate(keys, *turn)
        return torch.cat((queries.flatten(1), keys.flatten(1), values), -1), gate

    def fill(self, made: Tensor, run: Pass) -> None:
        """Stage the keys and values of the inputs `made`, and read nothing."""
        heads = self.project(made, run.turns[self.rope] if self.rope else None)[0].view(
            len(made), -1, self.config.head_dim
        )
        _, keys, values = heads.tensor_split((self.config.heads, self.config.heads + self.config.key_heads), 1)
        for span in run.rows.spans:
            span.stage.put(self.place + span.shift, span.staged, keys[span.at], values[span.at])

    def read_cache(self, made: Tensor, run: Pass) -> Tensor:
        """Stage the keys and values of `made` [r, (H + 2 K) * D], behind which gates may stand, and return attention's
        output [r, H * D].
        """
        c, spans, texts = self.config, run.rows.spans, run.texts
        output = made.new_empty(len(made), c.heads * c.head_dim)
        if texts is not None:
            texts.read(self.place, made, output, self.sinks)
            if run.by_kernel:
                return output
        heads = made.view(len(made), -1, c.head_dim)
        queries, keys, values, _ = heads.tensor_split((c.heads, c.heads + c.key_heads, c.heads + 2 * c.key_heads), 1)
        for span in spans:
            if texts is not None and reads(span):
                continue
            own, place = queries[span.at], self.place + span.shift
            span.stage.put(place, span.staged, keys[span.at], values[span.at])
            parts = span.stage.parts(place, span.staged, own)
            output[span.at] = run.attend(own, parts, c.scale, c.attention_softcap, self.sinks).flatten(1)
        return output
