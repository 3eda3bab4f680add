"""A full block of 64 rows as a new state: what the positions behind it read (`longspec.cache.recurrent`).

Takes the state before the block and what its rows left; gives the state after it. By C on a CPU, where rows are added
in their order: a state's bits are then a matter of its text, on every processor. Else by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from longspec.kernels.boundary import pointer
from longspec.kernels.build import library
from longspec.kernels.team import team

__all__ = ["fold"]

_WIDE = 16


class _Fold(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("state", "k", "u", "decay", "folded", "key_of")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "key_dim", "value_dim")),
    )


def fold(state: Tensor, k: Tensor, u: Tensor, decay: Tensor, key_of: Sequence[int]) -> Tensor:
    """The state after a block, from that before it [heads, key dim, value dim] and the block's 64 rows, each
    [64, heads, dim]. key_of: of each of the state's heads, the key's.
    """
    heads, key_dim, value_dim = state.shape
    found = "a GPU's" if state.device.type != "cpu" else library("mixers.c")
    if isinstance(found, str) or key_dim % _WIDE or value_dim % _WIDE:
        return _by_torch(state, k, u, decay, key_of)
    folded, rows = torch.empty_like(state), len(k)
    k, u, decay = (each.contiguous() for each in (k, u, decay))
    call = _Fold(
        pointer(state, torch.float32, heads, key_dim, value_dim),
        pointer(k, torch.float32, rows, None, key_dim),
        pointer(u, torch.float32, rows, heads, value_dim),
        pointer(decay, torch.float64, rows, heads, 1),
        folded.data_ptr(),
        ctypes.addressof(places := (ctypes.c_int64 * heads)(*key_of)),
        heads, k.shape[1], key_dim, value_dim,
    )  # fmt: skip
    _declared(found).fold(ctypes.byref(call), *team())
    del places
    return folded


def _by_torch(state: Tensor, k: Tensor, u: Tensor, decay: Tensor, key_of: Sequence[int]) -> Tensor:
    last = decay[-1:]
    if len(key_of) != k.shape[1]:
        k = k[:, torch.tensor(key_of, device=k.device)]
    weighted = (k * (last - decay).float().exp()).permute(1, 2, 0)  # [heads, key dim, 64]
    return torch.baddbmm(state * last[0, :, :, None].float().exp(), weighted, u.transpose(0, 1))


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    found.fold.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return found
