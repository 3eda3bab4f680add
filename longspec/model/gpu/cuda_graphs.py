"""CUDA graphs of decoding passes: few positions of one sequence through all layers, in one launch.

Takes a decoder's weights and the positions of a pass; gives their hidden states, and stages their keys and values. A
small pass is hundreds of kernel launches of a few microseconds of host time each, which a graph saves: it is recorded
once for each number of positions in `BUCKETS` and each kind of codes, and replayed for any sequence, since all inputs
that change between two passes (tokens, lengths, attention masks, base pointers of rows and codes) are read from
device memory. One copy updates them.

Not taken: several sequences, more positions, caches with several dense segments, caches whose segments depend on the
query, passes that begin or stop between layers. These use torch's operators.

No hardware has run this yet. Without a GPU the same launches run one by one through Triton's interpreter, by which
`tests/model/test_graphs.py` compares them with the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longspec.attention import triton
from longspec.attention.native_batch import Span
from longspec.attention.triton import MOST_CHUNKS, OPTIONS
from longspec.cache.codes import Codec
from longspec.cache.stage import Stage
from longspec.model.config import Config
from longspec.model.rope import Rotation

__all__ = ["BUCKETS", "Graphs", "missing"]

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows of a recorded pass; others take the next one."""

_MOST_STAGED = 63
"""A row's bits of staged rows are one signed word."""

_WARM = 2
"""Passes before one is recorded: kernels are compiled and libraries take their memory in these."""

_NEAR = 3
"""Chunks of a coded cache's dense rows, which with what is staged are three blocks at most."""

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_WIDE = 1024  # channels of a program between gate_up and down


class Pass(Protocol):
    """The token positions of a pass."""

    @property
    def tokens(self) -> Tensor: ...  # [r]
    @property
    def positions(self) -> Tensor: ...  # [r]
    @property
    def long(self) -> Tensor: ...  # [r] bool: of a sequence planned beyond the original context
    @property
    def spans(self) -> Sequence[Span]: ...


class _Inputs(NamedTuple):
    """Device inputs of a pass of R positions; see `longspec.model.gpu.kernels`."""

    text: Tensor  # [6]
    rows: Tensor  # [4, R]
    places: Tensor  # [layers, 1], or 10 with codes
    codec: Codec | None


def missing(config: Config, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why such a decoder records no passes; None where it does."""
    if device.type != "cuda":
        return f"CUDA graphs are for a GPU, and this is {device.type}"
    if config.mixers or config.mixture or config.sinks:
        return f"they don't know the layers of {config.family}"
    if config.loops > 1:
        return f"they don't know that {config.family}'s layers run {config.loops} times"
    if config.query_norm == "width" or config.head_dim > 256:
        return f"they don't know the heads of {config.family}"
    return triton.missing()


class Graphs:
    """The recorded passes of one decoder."""

    def __init__(
        self,
        config: Config,
        layers: Sequence[Any],
        embed: Callable[[Tensor], Tensor],
        rotations: Sequence[Rotation | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """rotations: one per layer."""
        self._config, self._layers, self._embed, self._rotations = config, layers, embed, rotations
        self._dtype, self._device = dtype, device
        # The layer with the widest window attends to every column that any layer does.
        self._widest = max(range(config.layers), key=lambda i: config.windows[i] or config.context)
        self._passes: dict[tuple[int, Codec | None], tuple[_Inputs, Callable[[], Tensor]]] = {}
        self._pool: Any = None
        self.broken: str | None = None  # the reason why recording was given up
        self._said = False

    def forward(self, rows: Pass) -> Tensor | None:
        """Hidden states [r, width] after all layers; None where these positions aren't taken."""
        (span, *others), count = rows.spans, len(rows.tokens)
        stage, staged = span.stage, span.staged
        if self.broken is not None or others or not self._takes(stage, staged) or count > BUCKETS[-1]:
            return None
        if (reads := stage.reads(staged)) is None:
            return None
        *far, near = stage.runs(self._widest, staged)
        coded = [run for run in far if run.is_coded]
        if len(far) > 1 or len(coded) != len(far):
            return None  # a fork: it begins with rows that it shares
        codec, places = None, [[layer.data_ptr()] for layer in near.layers if isinstance(layer, Tensor)]
        for run in coded:
            assert isinstance(run.codec, Codec)
            codec = run.codec
            for place, codes in zip(places, run.layers, strict=True):
                place += [each.data_ptr() for each in triton.all_of(tuple(codes), codec)]
                place.append(codes[0].stride(0) // codes[0].stride(1))
        first = near.start - near.column  # the position of the buffers' first column
        text = [stage.length - first, staged.start, count, near.layers[0][0].shape[1], first]
        text.append(sum(run.start + run.columns for run in coded))
        bucket = next(each for each in BUCKETS if each >= count)
        try:
            inputs, replay = self._pass(bucket, codec)
            words = torch.tensor([*text, *chain.from_iterable(places), *reads])
            if self._device.type == "cuda":
                words = words.pin_memory()  # torch keeps it until the copy is done
            words = words.to(self._device, non_blocking=True)
            inputs.text.copy_(words[: len(text)])
            inputs.places.copy_(words[len(text) : -count].view_as(inputs.places))
            for own, new in zip(inputs.rows, (rows.tokens, rows.positions, rows.long, words[-count:]), strict=True):
                own[:count] = new
            hidden = replay()[:count].clone()  # the next replay overwrites it
        except RuntimeError as error:
            self.broken = f"a pass of {bucket} rows can't be recorded: {str(error).splitlines()[0]}"
            return None
        stage.filled(range(len(places)), staged)
        return hidden

    def remark(self) -> str | None:
        """The reason why recording was given up, returned once."""
        if self.broken is None or self._said:
            return None
        self._said = True
        return f"passes go to the GPU operator by operator, which is slower: {self.broken}"

    def _takes(self, stage: Stage, staged: slice) -> bool:
        """Whether the positions are few enough, and their segments are known before the pass."""
        narrow = any(window is not None and window < _MOST_STAGED for window in self._config.windows)
        if narrow or staged.stop > _MOST_STAGED:
            return False
        return stage.is_known(staged)

    def _pass(self, bucket: int, codec: Codec | None) -> tuple[_Inputs, Callable[[], Tensor]]:
        found = self._passes.get((bucket, codec))
        if found is None:
            sizes = ((6,), (4, bucket), (len(self._layers), 1 if codec is None else 10))
            text, rows, places = (torch.zeros(*size, dtype=torch.int64, device=self._device) for size in sizes)
            inputs = _Inputs(text, rows, places, codec)
            found = self._passes[bucket, codec] = inputs, self._recorded(inputs)
        return found

    def _recorded(self, inputs: _Inputs) -> Callable[[], Tensor]:
        """The function that runs such a pass and returns hidden states [R, width], overwritten by its next run."""
        step = partial(self._step, inputs)
        if self._device.type != "cuda":
            return step
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM):
                    step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                hidden = step()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    def _step(self, inputs: _Inputs) -> Tensor:
        """All layers: four products each, with a kernel between them, or two for attention."""
        tokens, positions, long, _ = inputs.rows
        hidden = self._embed(tokens)
        turns = {id(turn): turn(positions, long != 0, hidden.dtype) for turn in self._rotations if turn is not None}
        norms = [layer.before_mixer for layer in self._layers]
        hidden, x = self._added(hidden, None, norms[0])
        for i, (layer, rotation) in enumerate(zip(self._layers, self._rotations, strict=True)):
            turn = None if rotation is None else turns[id(rotation)]
            x = layer.mixer.output(
                self._attention(i, self._normed_heads(layer.mixer, layer.mixer.inputs(x)), turn, inputs)
            )
            if layer.after_mixer:
                _, x = self._added(x, None, layer.after_mixer)
            hidden, x = self._added(hidden, x, layer.before_mlp)
            x = layer.mlp.down(self._gated(layer.mlp.gate_up(x)))
            if layer.after_mlp:
                _, x = self._added(x, None, layer.after_mlp)
            hidden, x = self._added(hidden, x, norms[i + 1] if i + 1 < len(norms) else None)
        return hidden

    def _added(self, hidden: Tensor, x: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """The sum, and its norm; without a norm the sum twice."""
        from longspec.model.gpu import kernels

        if norm is None:
            total = hidden if x is None else hidden + x
            return total, total
        rows, width = hidden.shape
        output, total = torch.empty_like(hidden), hidden if x is None else torch.empty_like(hidden)
        kernels.added[rows,](
            hidden, hidden if x is None else x, norm.weight, total, output, norm.eps, width,
            ADDED=x is not None, W_PADDED=triton.power_of_2(width), num_warps=8, **OPTIONS,
        )  # fmt: skip
        return total, output

    def _normed_heads(self, mixer: Any, made: Tensor) -> Tensor:
        """Queries, keys and values [R, (H + 2 K) * D], with the head norms applied, if the layer has them."""
        c = self._config
        if c.query_norm is None:
            return made
        queries, keys, values = made.view(len(made), -1, c.head_dim).tensor_split((c.heads, c.heads + c.key_heads), 1)
        return torch.cat((mixer.query_norm(queries), mixer.key_norm(keys), values), 1).flatten(1)

    def _attention(self, index: int, made: Tensor, turn: tuple[Tensor, Tensor] | None, inputs: _Inputs) -> Tensor:
        """Attention's output [R, H * D] from queries, keys and values [R, (H + 2 K) * D]; keys and values are written
        to the layer's buffer.
        """
        from longspec.attention.triton_kernels import dtypes, joined
        from longspec.model.gpu import kernels

        c, rows, codec = self._config, len(made), inputs.codec
        cos, sin = turn or (made, made)
        heads = {"P": inputs.places.shape[1], "K": c.key_heads, "D": c.head_dim}
        padded = max(16, triton.power_of_2(c.head_dim))
        queries = made.new_empty(rows, c.heads, c.head_dim)
        kernels.put[rows, c.heads + 2 * c.key_heads](
            made, cos, sin, inputs.text, inputs.places, index, queries,
            **heads, H=c.heads, DIMS=cos.shape[-1] if turn else 0, D_PADDED=padded, num_warps=1, **OPTIONS,
        )  # fmt: skip
        groups, window = c.heads // c.key_heads, c.windows[index]
        launches = [self._chunks(kernels.read, rows, coded=False, most=MOST_CHUNKS if codec is None else _NEAR)]
        kinds: list[dict[str, Any]] = [{"NEAR": codec is not None}]
        if codec is not None:
            launches.append(self._chunks(kernels.read_codes, rows, coded=True, most=MOST_CHUNKS - _NEAR))
            kinds.append(triton.kind_of(codec))
        chunks = sum(each for _, (_, each, _), _ in launches)
        outputs = made.new_empty(chunks, rows, c.heads, c.head_dim, dtype=torch.float32)
        lses = made.new_empty(chunks, rows, c.heads, dtype=torch.float32)
        at = 0
        for (kernel, grid, tile), kind in zip(launches, kinds, strict=True):
            kernel[grid](
                queries, inputs.text, inputs.rows, inputs.places, index, outputs[at:], lses[at:], rows, window or 0,
                *triton.score_factors(c.scale, c.attention_softcap), **heads, G=groups, WINDOWED=window is not None,
                CAPPED=c.attention_softcap is not None, **dtypes(made.dtype, at > 0), **kind, **tile, **OPTIONS,
            )  # fmt: skip
            at += grid[1]
        output, lse = made.new_empty(rows, c.heads * c.head_dim), torch.empty_like(lses[0])
        joined[rows * c.heads,](
            outputs, lses, output, lse, chunks, rows * c.heads, D=c.head_dim, D_PADDED=padded, **OPTIONS
        )
        return output

    def _chunks(
        self, kernel: Any, rows: int, *, coded: bool, most: int
    ) -> tuple[Any, tuple[int, int, int], dict[str, int]]:
        """The kernel, its grid (tiles of rows, chunks of columns, key heads), and the tile's size."""
        c = self._config
        grouped = c.heads // c.key_heads * rows
        tile = triton.tile(grouped, c.head_dim, self._dtype, coded)
        tiles = -(-grouped // tile["M"])
        return kernel, (tiles, min(most, triton.most_chunks(tiles * c.key_heads, self._device)), c.key_heads), tile

    def _gated(self, made: Tensor) -> Tensor:
        """activation(gate) * up [R, mlp width], from gate and up side by side."""
        from longspec.model.gpu import kernels

        rows, width = len(made), made.shape[1] // 2
        output = made.new_empty(rows, width)
        kernels.gated[rows, -(-width // _WIDE)](
            made, output, width, ACTIVATION=_ACTIVATIONS[self._config.activation], N=_WIDE, **OPTIONS
        )
        return output
