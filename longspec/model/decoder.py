"""The target: one decoder, whose layers its config lists.

Takes the token positions of a pass, flattened over sequences, and the stage of each sequence; gives hidden states and
logits. Knows nothing of drafts, sampling or text. The linear layers run over all positions at once, attention per
sequence; a pass may start or stop at any layer, and a later one may resume, since the stage holds the keys and values
so far.

Shapes: r rows (token positions), H query heads, K key heads, D head dimension, V vocabulary. One pass reads 7 weight
matrices per layer, in 4 products: q, k, v and gate, up are one matrix each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.attention import attend, attend_strictly
from longspec.attention.native_batch import Texts, reads
from longspec.cache import native as cpu
from longspec.cache.stage import Shape
from longspec.model.config import Config, Rope
from longspec.model.gpu import cuda_graphs as graphs
from longspec.model.layer import Layer, looped, read_layer, shape_of, tensors_of, through
from longspec.model.layers.dense_mlp import DenseMlp
from longspec.model.layers.layer_inputs import LayerInputs
from longspec.model.layers.reader import Reader
from longspec.model.linear import Linear
from longspec.model.native import Fused, missing
from longspec.model.rope import Rotation
from longspec.model.rows import NO_SKIP, Chunk, Pass, Rows, Skip, Span
from longspec.model.weights.quantized import CodedLinear, Piece
from longspec.model.weights.read import Weights

__all__ = ["Chunk", "Decoder", "Rows", "Skip", "Span"]

STRICT_TILE = 16
"""Rows per tile under --strict: 1 to 16 rows cost nearly the same on a CPU with bf16 tiles (16.4 and 17.3 ms)."""


class Decoder:
    """A model's weights and its forward pass. Everything runs without gradients, under `torch.inference_mode`."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        device: torch.device,
        *,
        strict: bool = False,
        coded: str | None = None,
        output: Any = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        """strict: batch-invariant. coded: coded matrices (`longspec.model.weights.quantized`), the file's own, or of
        this format. output: another decoder's output matrix (`output_of`), shared by a draft head, which has none and
        no table either. places: where the weights are its, and how they are called (`Reader`).
        """
        self.config = config
        self.device = device
        self.dtype = weights.dtype
        self.strict = strict
        self._shape = shape_of(config, self.dtype, device)
        reader = Reader(config, weights, device, STRICT_TILE if strict else None, coded, places)
        table = getattr(output, "weight", output)
        self._embedding = reader.embedding() if output is None else table
        self.ring, self.pool = weights.ring, weights.pool  # where layers and experts stand that are on disk, or None
        for threads in (self.ring, self.pool):
            if threads is not None:
                weakref.finalize(self, threads.close)
        self._layers = looped([read_layer(reader, i) for i in range(config.group)], config.loops)
        self._inputs = LayerInputs.read(reader)
        self._norm = reader.norm("norm", config.width)
        self._head: Any = reader.head(self._embedding) if output is None else output
        self._rotations = {rope: Rotation(rope, device) for rope in config.ropes if rope is not None}
        # Gemma rounds the factor to the model's dtype before multiplying.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()
        self._attend = attend_strictly if strict else attend
        self.slow = missing(config, self.dtype, device)  # the reason why the native kernel isn't used
        self._fused = Fused(config, self._layers, self._norm.weight, self._head) if self.slow is None else None
        self._coded = coded is not None
        self._graphs = None if strict or self._coded or graphs.missing(config, self.dtype, device) else self.graphs()
        self.nbytes = reader.nbytes
        each = config.per_layer  # layers whose keys and values others read can't be left out of a pass
        self._read_by_others = frozenset(s for i, s in enumerate(each.sources) if s != i) if each else frozenset()

    @property
    def shape(self) -> Shape:
        """What a cache must know of this decoder."""
        return self._shape

    @property
    def first_context(self) -> int | None:
        """The sequence length beyond which a longrope model uses its second set of frequencies; None for other
        models.
        """
        lengths = [r.first_context for r in self._rotations.values() if r.first_context is not None]
        return min(lengths, default=None)

    @property
    def pass_nbytes(self) -> int:
        """Bytes of weights that a pass of one row reads: the embedding table only where it is also the head."""
        return self.touched(1)

    def touched(self, rows: int) -> int:
        """Bytes of weights that a pass of so many rows is expected to read: of a mixture, the union of their experts'
        besides all that isn't an expert's; of a looped model, its layers in each loop.
        """
        later = (part for layer in self._layers[self.config.group :] for part in layer.weights)
        unread = 0.0 - sum(tensor.nbytes for part in later for tensor in tensors_of(part))
        for layer in self._layers:
            held = sum(tensor.nbytes for part in layer.mlp.weights for tensor in tensors_of(part))
            unread += held - layer.mlp.touched(rows)
        table = self._embedding
        if table is not self._head and table is not getattr(self._head, "weight", None):
            unread += _nbytes(table)
        unread += 0 if self._inputs is None else _nbytes(self._inputs.table)
        return self.nbytes - round(unread)

    def _held(self) -> Iterator[tuple[int | None, Any]]:
        """Tables, norms and matrices, each with its layer, in an order that depends on the config alone; a tied head is
        the table.
        """
        own = enumerate(self._layers[: self.config.group])
        parts: list[tuple[int | None, Any]] = [(i, part) for i, layer in own for part in layer.weights]
        parts += [] if self._inputs is None else [(None, part) for part in self._inputs.weights]
        yield None, self._embedding
        yield from ((i, getattr(part, "linear", part)) for i, part in parts)  # what a KernelLinear multiplies by
        yield from ((None, self._norm), (None, self._head))

    def tensors(self) -> Iterator[Tensor]:
        """All weights. A layer's that are on disk mean something until the next one is asked for."""
        for layer, some in groupby(self._held(), itemgetter(0)):
            with nullcontext() if layer is None else self._standing(layer):
                if layer is not None and self.pool is not None:
                    self.pool.bring_layer(layer)
                yield from (tensor for _, held in some for tensor in tensors_of(held))

    @property
    def vectors(self) -> list[Tensor]:
        """Norms and biases, which are in memory wherever the matrices are."""
        return [tensor for _, held in self._held() for tensor in tensors_of(held) if tensor.dim() == 1]

    @property
    def formats(self) -> dict[str, int]:
        """Bytes of weights by format: a coded matrix's (`longspec.model.weights.quantized`), or the dtype."""
        total: dict[str, int] = {}
        for held in {id(each): each for _, each in self._held()}.values():
            pieces = held.pieces if isinstance(held, CodedLinear) else ()
            named = {id(piece.tiles): piece.format for piece in pieces}
            for tensor in tensors_of(held):
                if held is not self._head or tensor is not self._embedding:
                    name = named.get(id(tensor), str(tensor.dtype).removeprefix("torch."))
                    total[name] = total.get(name, 0) + tensor.nbytes
        return dict(sorted(total.items(), key=lambda entry: -entry[1]))

    def graphs(self) -> graphs.Graphs:
        """The CUDA graphs recorded for this decoder."""
        turns = [self._rotations[rope] if rope is not None else None for rope in self.config.ropes]
        return graphs.Graphs(self.config, self._layers, self.embed, turns, self.dtype, self.device)

    def remark(self) -> str | None:
        """A one-time warning that CUDA graph capture failed; None otherwise."""
        return None if self._graphs is None else self._graphs.remark()

    @property
    def kernel(self) -> Fused | None:
        """The native layers with this decoder's weights; None where they aren't used."""
        return self._fused

    @property
    def coded(self) -> bool:
        return self._coded

    @property
    def head(self) -> Tensor:
        """The output matrix [V, width]."""
        if isinstance(self._head, CodedLinear):
            return self._head.values().to(self.dtype)
        made: Tensor = self._head.weight
        return made

    def output_of(self, tokens: Tensor | None) -> Any:
        """The output matrix for another decoder: this one's own, or a copy of its rows for these tokens [D]."""
        if tokens is None:
            return self._head
        if isinstance(self._head, CodedLinear):
            return CodedLinear([Piece.of_values(self._head.rows(tokens, torch.float32))])
        return Linear(self._head.weight[tokens])

    def table(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding table, as the checkpoint has them: [..., width]."""
        table = self._embedding
        return F.embedding(tokens, table) if isinstance(table, Tensor) else table.rows(tokens, self.dtype)

    @property
    def layers(self) -> Sequence[Layer]:
        """For passes of another form than `forward`."""
        return self._layers

    def turn(self, rope: Rope | None, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A rope's cosines and signed sines of positions [r] in a text of ordinary length; None of no rope."""
        return None if rope is None else self._rotations[rope](positions, positions < 0, dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings, scaled: [..., width]."""
        hidden = self.table(tokens)
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale

    def readout(self, tokens: Tensor) -> Tensor:
        """The head's rows for these tokens [t], in fp32: [t, width]."""
        if isinstance(self._head, CodedLinear):
            return self._head.rows(tokens, torch.float32)
        rows: Tensor = self._head.weight[tokens]
        return rows.float()

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the final norm."""
        return self._norm(hidden)

    def forward(
        self,
        rows: Rows,
        hidden: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        skip: Skip = NO_SKIP,
    ) -> Tensor:
        """Hidden states [r, width] after layers first..last, whose keys and values are staged.

        Without `hidden` the pass begins with the tokens' embeddings. `logits` applies the final norm, which a looped
        model's rows go through between two loops too, so that `logits` reads out the end of any loop. Rows may be whole
        loops ahead of the pass (`Span.shift`). A layer whose attention is skipped stages nothing.
        """
        last = self.config.layers if last is None else last
        if self._graphs is not None and hidden is None and (first, last) == (0, self.config.layers) and not skip:
            made = self._graphs.forward(rows)
            if made is not None:
                return made
        if hidden is None:
            hidden = self.embed(rows.tokens)
        run, group = self._pass(rows), self.config.group
        cuts = [i for i in range(first + 1, last) if i % group == 0 or (self.ring and self.ring.parts(i % group))]
        for start, stop in pairwise([first, *cuts, last]):
            hidden = self._into_loop(start, hidden, rows)
            with self._standing(start):
                hidden = self._layers_of(start, stop, hidden, run, skip)
        return hidden

    def _standing(self, layer: int) -> AbstractContextManager[None]:
        """The layer's weights are in memory: those of one that stays on disk, for as long as this is entered."""
        return nullcontext() if self.ring is None else self.ring.held(layer % self.config.group)

    def _into_loop(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor:
        """Hidden states [r, width] as this layer takes them: where it is the first of a later loop, normed."""
        if self.config.loops == 1 or layer % self.config.group:
            return hidden
        norm: Callable[[Tensor], Tensor] = self._norm if self._fused is None else self._fused.norm
        later = [span.at for span in rows.spans if layer + span.shift]
        if len(later) == len(rows.spans):
            return norm(hidden)
        hidden = hidden.clone()
        for at in later:
            hidden[at] = norm(hidden[at])
        return hidden

    def _layers_of(self, first: int, last: int, hidden: Tensor, run: Pass, skip: Skip) -> Tensor:
        """Hidden states [r, width] after layers first..last, all of one loop."""
        fused, at = self._fused, first
        parts = [(i not in skip.attention) + 2 * (i not in skip.mlp) for i in range(self.config.layers)]
        while at < last:
            stop = at if fused is None else fused.run_from(at, last, run)
            if fused is not None and stop > at:
                hidden = fused.layers(at, stop, hidden, run, parts)
            else:
                hidden, stop = self._layer(at, hidden, run, skip), at + 1
            at = stop
        return hidden

    def _layer(self, i: int, hidden: Tensor, run: Pass, skip: Skip) -> Tensor:
        """Hidden states [r, width] after layer i."""
        layer, fused, mlp = self._layers[i], self._fused, i not in skip.mlp
        mixes = i not in skip.attention or i in self._read_by_others
        if fused is not None:
            whole = isinstance(layer.mlp, DenseMlp)
            hidden = fused.layer(i, hidden, run, layer.mixer if mixes else None, mlp=mlp and whole)
            mixes, mlp = False, mlp and not whole
        hidden = through(layer, hidden, run, mixes=mixes, mlp=mlp)
        return hidden if layer.end is None else layer.end(hidden, run.inputs)

    def fill(self, rows: Rows, hidden: Tensor) -> None:
        """Stage the keys and values that the first layer, an attention, makes of hidden states [r, width], and compute
        nothing else: all that later rows read, where it is the only layer.
        """
        layer, fused = self._layers[0], self._fused
        with self._standing(0):
            if fused is not None:
                made = fused.inputs(0, hidden)
            else:
                made = layer.mixer.inputs(layer.before_mixer(hidden) if layer.before_mixer else hidden)
            layer.mixer.fill(made, self._pass(rows))

    def _pass(self, rows: Rows) -> Pass:
        turns = {rope: turn(rows.positions, rows.long, self.dtype) for rope, turn in self._rotations.items()}
        inputs = None if self._inputs is None else self._inputs(rows.tokens, self.embed(rows.tokens))
        return Pass(rows, turns, self._texts(rows), self._attend, inputs)

    @property
    def is_exact(self) -> bool:
        """Whether a token position's bits depend on its own path alone: with the C kernels, and under --strict.
        torch's operators round differently for different shapes of a pass.
        """
        return self.strict or (self._fused is not None and all(layer.mixer.is_exact for layer in self._layers))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [r, V] of hidden states [r, width]: in the model's dtype, or the C kernel's fp32 sums."""
        logits = self._head(self._norm(hidden)) if self._fused is None else self._fused.head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _texts(self, rows: Rows) -> Texts | None:
        """The batched attention over all spans; None where the kernel can't take them."""
        c = self.config
        if (
            self.strict
            or not self.shape.windows
            or c.per_layer is not None
            or cpu.unfit(self.dtype, self.device, c.head_dim)
        ):
            return None
        spans = [span for span in rows.spans if reads(span)]
        return Texts(spans, self.shape, c.heads, c.scale, c.attention_softcap) if spans else None


def _nbytes(table: Tensor | CodedLinear) -> int:
    return table.pieces[0].tiles.nbytes if isinstance(table, CodedLinear) else table.nbytes
