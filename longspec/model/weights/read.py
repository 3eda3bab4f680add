"""Weights: tensors by name, from safetensors files or a GGUF file, in the dtype requested.

Takes a folder or a file; gives tensors on demand. Knows nothing of architectures: names are those of the Hugging Face
checkpoint, and the decoder chooses among them. Pickled files are never opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.machine.files import parse_json, read_bytes
from longspec.machine.schema import TEXT, mapped
from longspec.model.weights.packed import Packed, packed
from longspec.model.weights.quantized import FP8, Blocks, CodedLinear, Piece, Room
from longspec.model.weights.safetensors import Shard
from longspec.model.weights.scheme import Scheme
from longspec.model.weights.stacked import Experts, by_expert

if TYPE_CHECKING:
    from longspec.model.gguf.file import GgufFile
    from longspec.model.weights.pool import Pool
    from longspec.model.weights.ring import Ring

__all__ = ["Weights", "check_matrices", "check_values"]

_MOST_INDEX_NBYTES = 16 << 20  # 100,000 tensors take 10 MB
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Source(Protocol):
    """A file of tensors."""

    path: Path

    def shape(self, name: str) -> tuple[int, ...]: ...

    def take(self, name: str) -> Tensor: ...

    def take_run(self, names: Sequence[str]) -> Tensor | None: ...

    def blocks(self, name: str) -> Blocks | None: ...

    def release(self, name: str) -> None: ...


class Weights(Mapping[str, Tensor]):
    """Tensors by name, each loaded from its file on access, and not cached.

    Floating tensors are converted to `dtype`; others stay as they are. Where the file already holds `dtype`, a tensor
    of a safetensors file is a view of the mapped file: no copy, and no memory until its values are read. Writing to
    such a tensor changes this process's pages only, never the file.
    """

    ring: Ring | None = None  # where layers stand that are on disk (`longspec.model.weights.streamed`)
    pool: Pool | None = None  # and their experts

    def __init__(self, sources: Mapping[str, _Source], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sources = sources
        self._room = Room()

    @classmethod
    def of_folder(cls, folder: Path, dtype: torch.dtype, scheme: Scheme | None = None) -> Weights:
        """The weights of a Hugging Face folder: `model.safetensors`, or `model.safetensors.index.json` and its
        shards. scheme: how its matrices are quantized.

        Raises ModelError where there are none, or one is missing, damaged or outside the folder.
        """
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file() or index.is_file():
            sources = by_expert(_single(single) if single.is_file() else _shards(folder, index))
            files = {name: source for name, source in sources.items() if isinstance(source, Shard)}
            made: dict[str, Shard | Packed | Experts] = {**sources}
            if scheme is not None and scheme.layout != "mxfp4":
                others = {name: sources[name] for name in sources.keys() - files.keys()}
                made = {**others, **packed(files, scheme, dtype)}
            _check_floats({name: source for name, source in made.items() if isinstance(source, Shard)})
            return cls(made, dtype)
        raise ModelError(f"{folder} holds no model.safetensors: longspec reads weights from safetensors and GGUF only.")

    @classmethod
    def of_gguf(cls, file: GgufFile, dtype: torch.dtype) -> Weights:
        """The weights of a GGUF file: its codes, or values that are dequantized on each access."""
        return cls(dict.fromkeys(file.names, file), dtype)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
        """Weights from tensors in memory."""
        source = _Held(tensors)
        return cls(dict.fromkeys(tensors, source), dtype)

    def read(self) -> bool:
        """Read all tensors into memory of large pages, if they have the dtype already. Returns whether that was
        done.
        """
        sources = {id(source): source for source in self._sources.values()}.values()
        fit = [source for source in sources if isinstance(source, Shard) and source.dtypes == {self.dtype}]
        done = [source.read() for source in fit]
        return len(done) == len(sources) and all(done)

    def joined(self, names: Sequence[str]) -> Tensor:
        """The tensors concatenated along dimension 0: a view where they are adjacent in one file, else a copy."""
        sources = {id(source): source for source in map(self._source, names)}
        if len(sources) == 1:
            run = next(iter(sources.values())).take_run(names)
            if run is not None:
                check_values(names, [run.dtype], [tuple(run.shape)])
                return self._converted(run)
        tensors = [self[name] for name in names]
        check_values(names, [tensor.dtype for tensor in tensors], [tuple(tensor.shape) for tensor in tensors])
        return torch.cat(tensors)

    def blocks(self, name: str) -> Blocks | None:
        """The file's own codes of a matrix; None where it holds values, or a format that has no kernel."""
        return self._source(name).blocks(name)

    def release(self, name: str) -> None:
        """Let go of the file's pages that hold a tensor."""
        self._source(name).release(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, by its file's header alone."""
        return self._source(name).shape(name)

    def exact(self, name: str) -> Tensor:
        """A tensor's values in fp32, whatever the dtype: not rounded on the way. Raises ModelError where they aren't
        floats.
        """
        tensor = self._source(name).take(name)
        check_values([name], [tensor.dtype], [])
        return tensor.float()

    def coded(self, names: Sequence[str], kind: str, bias: Tensor | None = None) -> CodedLinear:
        """The matrices concatenated along dimension 0 as a coded layer: the file's codes as they are, values quantized
        to `kind`. Neighbours of one format become one piece.
        """
        pieces: list[Piece] = []
        for run, found in self._runs(names):
            first = found[0]
            if first is not None:
                rows = [(each.read(), each.heads) for each in found if each is not None]
                pieces.append(Piece.of_blocks(first.format, rows, first.width, self._room, partial(self._let_go, run)))
            else:
                values = self.joined(run)
                check_matrices(run, [tuple(values.shape)])
                pieces.append(Piece.of_values(values, kind, self._room))
            self._let_go(run)
        if any(piece.width != pieces[0].width for piece in pieces):
            raise ModelError(f"{', '.join(names)} should have rows of one length, and don't.")
        return CodedLinear(pieces, bias)

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            self.release(name)

    def _runs(self, names: Sequence[str]) -> Iterator[tuple[list[str], list[Blocks | None]]]:
        """The names, neighbours of one format and width together, and the file's codes of each. FP8 beside another
        format counts as values: their products take other rows.
        """
        found = {name: self.blocks(name) for name in names}
        formats = {None if blocks is None else blocks.format for blocks in found.values()}
        if FP8 in formats and len(formats) > 1:
            found = dict.fromkeys(names)

        def kind(name: str) -> tuple[str, int] | None:
            blocks = found[name]
            return None if blocks is None else (blocks.format, blocks.width)

        for _, run in groupby(names, kind):
            together = list(run)
            yield together, [found[name] for name in together]

    def __getitem__(self, name: str) -> Tensor:
        return self._converted(self._source(name).take(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._sources else default  # Mapping's own implementation relies on KeyError

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _source(self, name: str) -> _Source:
        try:
            return self._sources[name]
        except KeyError:
            where = ", ".join(sorted({str(source.path) for source in self._sources.values()})) or "the checkpoint"
            raise ModelError(f"The tensor {name} is missing from {where}: the files are incomplete.") from None

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def check_values(names: Sequence[str], dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]]) -> None:
    """Hold weights that are taken together to be values, of rows of one length.

    Raises:
        ModelError: they are whole numbers, or FP8 without its scales, or have no rows, or rows of different lengths.
    """
    for dtype in dtypes:
        if dtype not in _FLOATS:
            raise ModelError(
                f"The checkpoint holds {', '.join(names)} as {str(dtype).removeprefix('torch.')}, where fp32, bf16 or "
                "fp16 was expected: it is quantized in a way that its config.json doesn't say, or damaged."
            )
    if any(not shape or shape[1:] != shapes[0][1:] or 0 in shape for shape in shapes):
        said = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=False))
        raise ModelError(f"These weights should have rows of one length, and don't: {said}.")


def check_matrices(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ModelError where one of the shapes isn't a matrix's."""
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise ModelError(f"{', '.join(names)}: the checkpoint has {list(map(list, shapes))}, where rows and columns "
                         "were expected.")  # fmt: skip


class _Held:
    """Tensors in memory, with the interface of a file."""

    path = Path("memory")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def take(self, name: str) -> Tensor:
        return self._tensors[name]

    def take_run(self, names: Sequence[str]) -> Tensor | None:
        return self._tensors[names[0]] if len(names) == 1 else None

    def blocks(self, name: str) -> Blocks | None:
        return None

    def release(self, name: str) -> None:
        pass


def _single(path: Path) -> dict[str, Shard]:
    shard = Shard(path)
    return dict.fromkeys(shard.names, shard)


def _check_floats(sources: Mapping[str, Shard]) -> None:
    """Raise ModelError where a tensor is in FP8 that config.json says nothing of: it means nothing without scales."""
    for name, shard in sources.items():
        if (dtype := shard.dtype(name)).is_floating_point and dtype.itemsize == 1:
            raise ModelError(
                f"{shard.path} holds {name} in FP8 ({str(dtype).removeprefix('torch.')}), and config.json doesn't "
                "say by quantization_config where its scales are; take the model in bf16, or as a GGUF file."
            )


def _shards(folder: Path, index: Path) -> dict[str, Shard]:
    try:
        files = parse_json(read_bytes(index, _MOST_INDEX_NBYTES, "The index", error=ModelError))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} isn't an index of safetensors files ({error!r}). Fetch it again.") from error
    if not mapped(TEXT).holds(files):
        raise ModelError(f"{index} has no weight_map from tensor names to file names. Fetch it again.")
    shards: dict[str, Shard] = {}
    for file in sorted(set(files.values())):
        # Cached snapshots are symbolic links to files elsewhere, so the name must be inside the folder, not the
        # target.
        if Path(file).name != file or file in ("", "..") or "\0" in file or not file.endswith(".safetensors"):
            raise ModelError(f"{index} names the file {file!r}, which isn't a safetensors file of its folder.")
        shards[file] = Shard(folder / file)
    for name, file in files.items():
        if name not in shards[file].names:
            raise ModelError(f"{index} says that {file} holds the tensor {name}, and it doesn't. Fetch it again.")
    return {name: shards[file] for name, file in files.items()}
