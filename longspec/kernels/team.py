"""The process's team of threads, which all C kernels share (`team.h`).

As many as torch takes for its operators. Waiting threads sleep: between passes nothing spins.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from longspec.kernels.build import library

__all__ = ["team"]


def team() -> tuple[int | None, int]:
    """The team's address, and the number of its threads that are there: torch's, or fewer where the system gives no
    more; no team where nothing can be compiled, and the kernels that call for it neither.
    """
    found = library("team.c")
    if isinstance(found, str):
        return None, 1
    has = ctypes.c_int64()
    address: int = _declared(found).team(torch.get_num_threads(), ctypes.byref(has))
    return address, has.value


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    found.team.argtypes = (ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    found.team.restype = ctypes.c_void_p
    return found
