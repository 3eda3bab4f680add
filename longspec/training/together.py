"""Several processes at one training: each takes a share of a step's texts, and what they find is summed.

Takes what `torchrun` says in the environment; without it there is one process, which does everything. The first one
writes files, validates and reports; the others train beside it and read the same folder.
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

_PATIENCE = timedelta(days=30)  # the others wait while the first one writes all texts


@dataclass(frozen=True, slots=True)
class Together:
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """What this process does of it."""
        return list(islice(items, self.rank, None, self.size))

    def add(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the gradients of all processes in place, as one message; the sum of their losses."""
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
        """The first one's value, for all."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Together()


@contextmanager
def together(device: torch.device) -> Iterator[Together]:
    """The processes that torchrun started, or this one alone.

    Raises:
        UsageError: they can't find each other.
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
