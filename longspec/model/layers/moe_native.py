"""Experts' MLPs by the C kernel of `layer.c`, in bf16 or codes, on a CPU: one call for all experts of a pass.

Takes rows sorted by expert; gives each its expert's output, in the same order. An expert's weights are read once for
64 of its rows. A row's bits don't depend on the other rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from longspec.kernels.boundary import pointer, workspace
from longspec.kernels.team import team
from longspec.model.config import Config
from longspec.model.layers.dense_mlp import DenseMlp
from longspec.model.native import ACTIVATIONS, Matrix, kernel, matrix_of

__all__ = ["KernelExperts"]


class _Expert(ctypes.Structure):
    _fields_ = (("gate_up", Matrix), ("down", Matrix))


class KernelExperts:
    """The experts of one layer, whose tensors the caller keeps alive."""

    def __init__(self, experts: Sequence[DenseMlp], config: Config) -> None:
        found = kernel()
        if isinstance(found, str):
            raise RuntimeError(found)
        self._kernel, self._width = found, config.width
        self._experts = (_Expert * len(experts))(
            *(_Expert(matrix_of(each.gate_up), matrix_of(each.down)) for each in experts)
        )
        self._activation = ACTIVATIONS[config.activation]
        widest = max(config.width, *(each.down.width for each in self._experts))
        self._workspace_nbytes = found.layer_workspace(None, widest)

    def __call__(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Outputs [p, width] of rows [p, width]: the first counts[0] are the first expert's, and so on."""
        assert len(counts) == len(self._experts), counts
        assert sum(counts) == len(rows), counts
        rows = rows.contiguous()
        made = torch.empty_like(rows)
        self._kernel.experts(
            ctypes.addressof(self._experts),
            (ctypes.c_int64 * len(counts))(*counts),
            len(counts),
            self._activation,
            pointer(rows, torch.bfloat16, len(rows), self._width),
            made.data_ptr(),
            workspace("layer", self._workspace_nbytes).data_ptr(),
            *team(),
        )
        return made
