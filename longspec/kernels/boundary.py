"""Between Python and C: tensors are checked before a pointer to them is taken, and workspaces are a thread's own.

ctypes lets go of the interpreter while C runs, so that two threads may be in one kernel: each has its own workspace.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["pointer", "turned", "workspace"]

_own = threading.local()


def pointer(tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> int:
    """Where the tensor's values lie, row-major and without gaps. A size of None is any.

    Raises:
        TypeError: it has another dtype, or isn't in host memory.
        ValueError: it has another shape, or gaps.
    """
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise TypeError(f"a kernel takes {dtype} in host memory, not {tensor.dtype} on {tensor.device}")
    sizes = tensor.shape
    if len(sizes) != len(shape) or any(wanted not in (None, size) for size, wanted in zip(sizes, shape, strict=True)):
        raise ValueError(f"a kernel takes the shape {list(shape)}, not {list(sizes)}")
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel takes rows without gaps, not strides of {tensor.stride()}")
    return tensor.data_ptr()


def turned(dims: int, head_dim: int) -> int:
    """The dimensions of a head that a kernel turns, in pairs.

    Raises:
        ValueError: they are odd, or more than the head's.
    """
    if dims % 2 or not 0 <= dims <= head_dim:
        raise ValueError(f"a kernel turns an even number of a head's {head_dim} dimensions, not {dims}")
    return dims


def workspace(name: str, nbytes: int) -> Tensor:
    """Bytes for one call of one kernel: the calling thread's own, and kept for its next call."""
    held: Tensor | None = getattr(_own, name, None)
    if held is None or len(held) < nbytes:
        held = torch.empty(nbytes * 5 // 4, dtype=torch.uint8)
        setattr(_own, name, held)
    return held
