"""Data-parallel training: each process takes a share of a step's texts, and gradients are summed over processes.

Takes `torchrun`'s environment variables; without them there is a single process. Rank 0 writes files, validates and
reports; the others train and read the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from longspec.errors import UsageError

__all__ = ["ALONE", "Together", "together"]

T = TypeVar("T")

_PATIENCE = timedelta(days=30)  # the other ranks wait while rank 0 generates all texts


@dataclass(frozen=True, slots=True)
class Together:
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process handles."""
        return list(islice(items, self.rank, None, self.size))

    def add(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the gradients over all processes, in place and in one all-reduce; returns the sum of the losses."""
        if self.size == 1:
            return loss
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss * torch.ones_like(gradients[0].flatten()[:1]), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        start = 1
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = flat[start : start + gradient.numel()].view_as(gradient)
            start += gradient.numel()
        return float(flat[0])

    def tell(self, value: float) -> float:
        """Broadcast rank 0's value."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def wait(self) -> None:
        """Barrier."""
        if self.size > 1:
            dist.barrier()


ALONE = Together()


@contextmanager
def together(device: torch.device) -> Iterator[Together]:
    """The process group that torchrun started, or this process alone.

    Raises:
        UsageError: the process group can't be initialised.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"The processes can't find each other ({error}); start them all with torchrun.") from error
    try:
        yield Together(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
