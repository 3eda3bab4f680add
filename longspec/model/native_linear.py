"""One linear layer by the C kernel, in bf16 or codes, on a CPU: y = x W^T + b for x [r, in].

For matrices that aren't a part of a layer's own C call. A row's bits don't depend on the other rows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from longspec.kernels.boundary import pointer, workspace
from longspec.kernels.team import team
from longspec.model.native import kernel, matrix_of

__all__ = ["KernelLinear"]


class KernelLinear:
    """A linear layer, whose tensors `linear` holds."""

    def __init__(self, linear: Any) -> None:
        """linear: a Linear or CodedLinear."""
        found = kernel()
        if isinstance(found, str):
            raise RuntimeError(found)
        self._kernel, self.linear, self._matrix = found, linear, matrix_of(linear)
        self._workspace_nbytes = found.layer_workspace(None, self._matrix.width)

    def __call__(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        made = rows.new_empty(len(rows), self._matrix.size)
        at = pointer(rows, torch.bfloat16, len(rows), self._matrix.width)
        room = workspace("layer", self._workspace_nbytes).data_ptr()
        self._kernel.linear(
            ctypes.addressof(self._matrix), None, 0.0, at, len(rows), made.data_ptr(), None, room, *team()
        )
        return made
