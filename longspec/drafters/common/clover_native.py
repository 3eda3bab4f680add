"""A Clover-2 head's cell in C: expands the whole draft tree of one greedy sequence in a call.

Takes a head, its decoder and the embeddings of its draft tokens; gives the draft that `grow` would give, up to
bf16 rounding. It needs the native kernel of the target's layers. An expanded node costs three small matrix
products.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.drafters.common import tree_growth
from longspec.drafters.common.tree_growth import likeliest
from longspec.heads.clover2 import Clover2
from longspec.kernels.boundary import pointer
from longspec.kernels.build import library
from longspec.kernels.team import team
from longspec.model.decoder import Decoder
from longspec.model.linear import Linear
from longspec.model.native import matrix_of
from longspec.model.weights.quantized import CodedLinear, Piece
from longspec.types import Draft

__all__ = ["Cell", "missing"]

_MOST_TABLE = 64 << 20
"""Limit in bytes of the precomputed K, V and join tables of the draft tokens: 3 x [D, width] in bf16."""


class _Cell(ctypes.Structure):
    _fields_ = (
        ("linear", ctypes.c_void_p),
        ("team", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("asks", "told", "first", "query", "join", "head")),
        *((name, ctypes.c_void_p) for name in ("feature_norm", "token_norm", "between", "norm")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "joined")),
        *((name, ctypes.c_int64) for name in ("width", "heads", "size")),
        ("eps", ctypes.c_float),
    )


def missing(module: object, decoder: Decoder) -> str | None:
    """Reason why the cell can't run in C; None if it can. decoder: the head's."""
    if not isinstance(module, Clover2):
        return "it knows Clover-2's cell alone"
    config = decoder.config
    if module.norm.weight.dtype != decoder.dtype:
        return f"the head is in {module.norm.weight.dtype}, and the target in {decoder.dtype}".replace("torch.", "")
    if decoder.kernel is None:
        return decoder.slow or "the layers have no kernel"
    if config.width // module.cell.heads % 16:
        return "a head's channels aren't a multiple of 16"
    if 3 * config.vocabulary * config.width * 2 > _MOST_TABLE:
        return "the draft vocabulary is too large for its tables"
    found = _library()
    return found if isinstance(found, str) else None


class Cell:
    """The native cell of one head, with its precomputed tables."""

    def __init__(self, module: Clover2, decoder: Decoder, embeddings: Tensor, *, coded: bool) -> None:
        """embeddings: [D, width] of the draft tokens. coded: quantize the matrices to int8 codes."""
        found, kernel, width = _library(), decoder.kernel, decoder.config.width
        if isinstance(found, str) or kernel is None:
            raise RuntimeError(missing(module, decoder))
        self._library, self._kernel, self._width = found, kernel, width
        tokens, join = module.token_norm(embeddings), module.join.weight
        tables = [module.cell.key(tokens), module.cell.value(tokens), F.linear(tokens, join[:, width:])]
        entry, query = module.entry, module.cell.query
        told = (torch.cat([getattr(each, name) for each in (entry.key, entry.value)]) for name in ("weight", "bias"))
        layers = [
            _made(entry.query.weight, entry.query.bias, coded=coded),
            _made(*told, coded=coded),
            _made(module.first.weight, None, coded=coded),
            _made(query.weight, query.bias, coded=coded),
            _made(join[:, :width].contiguous(), None, coded=coded),
        ]
        norms = [
            each.weight.detach().float().contiguous()
            for each in (module.feature_norm, module.token_norm, module.between, module.norm)
        ]
        tables = [table.contiguous() for table in tables]
        matrices = [matrix_of(each) for each in layers]
        self._held = decoder, layers, matrices, norms, tables  # keeps alive what the C struct points to
        self.nbytes = sum(table.nbytes for table in tables)
        self._cell = _Cell(
            kernel.linear,
            *team(),
            *(ctypes.addressof(each) for each in matrices),
            kernel.head_matrix,
            *(pointer(each, torch.float32, width) for each in norms),
            *(pointer(each, torch.bfloat16, len(embeddings), width) for each in tables),
            width,
            module.cell.heads,
            len(embeddings),
            decoder.config.eps,
        )

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Input of the head's layers [r, width], from hidden states and the embeddings of the tokens after them."""
        features, tokens, rows = features.contiguous(), tokens.contiguous(), len(features)
        entered, beside = torch.empty_like(features), features.new_empty(4 * rows, self._width)
        places = (pointer(each, torch.bfloat16, rows, self._width) for each in (features, tokens))
        self._library.cell_enter(
            self._cell, *places, rows, beside.data_ptr(), self._kernel.workspace(), entered.data_ptr()
        )
        return entered

    def draft(self, hidden: Tensor, limit: int, deepest: int, vocabulary: Tensor | None) -> Draft:
        """The `limit` most probable nodes of the tree. hidden: [width], the layers' output for the newest position."""
        breadth, floor = tree_growth.HEAD_BREADTH, tree_growth.HEAD_FLOOR
        most, expanded = (limit + 1) * breadth, (limit + 1) * self._width
        room = hidden.new_empty(2 * expanded + max(self._cell.size, self._width))
        numbers = torch.empty(4, most, dtype=torch.int64)
        chances = torch.empty(most, dtype=torch.float32)
        tokens, parents, depths, rows = (each.data_ptr() for each in numbers)
        count = self._library.cell_grow(
            self._cell,
            pointer(hidden := hidden.contiguous(), torch.bfloat16, self._width),
            limit,
            deepest,
            breadth,
            floor,
            *(room[at:].data_ptr() for at in (0, expanded, 2 * expanded)),
            self._kernel.workspace(),
            *(tokens, parents, chances.data_ptr(), depths, rows),
        )
        drafted = numbers[0, :count] if vocabulary is None else vocabulary[numbers[0, :count]]
        return likeliest(drafted.tolist(), numbers[1, :count].tolist(), chances[:count].tolist(), limit)


def _made(weight: Tensor, bias: Tensor | None, *, coded: bool) -> Linear | CodedLinear:
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return CodedLinear([Piece.of_values(weight)], bias) if coded else Linear(weight, bias)


def _library() -> ctypes.CDLL | str:
    found = library("clover.c")
    if isinstance(found, str):
        return found
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.cell_enter.argtypes = (ctypes.POINTER(_Cell), place, place, number, place, place, place)
    found.cell_grow.argtypes = (
        ctypes.POINTER(_Cell), place, number, number, number, ctypes.c_float, *(place,) * 9,
    )  # fmt: skip
    found.cell_grow.restype = number
    return found
