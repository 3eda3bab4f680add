"""The best model of the catalogue for this machine: by its free memory, and by how fast that is read."""

from __future__ import annotations

from dataclasses import dataclass

from longspec.machine.system import available_bytes, shown
from longspec.model.files.catalogue import FAST, Entry, best

__all__ = ["Fitting", "best_here"]

_FREE = 0.9
"""Of the free memory, as `--memory auto` takes it: others grow too."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """An entry, and what it was chosen by. As a text, the reason."""

    entry: Entry | None
    memory: int  # bytes
    rate: float  # bytes per second

    def __str__(self) -> str:
        machine = f"{shown(self.memory)} of memory, read at {self.rate / 1e9:.1f} GB/s"
        if self.entry is None:
            return f"no larger model fits in {machine}, and writes {FAST:g} tokens/s"
        one = self.entry
        return f"{one.name} fits in {machine}: {shown(one.need)}, at most {one.speed(self.rate):.0f} tokens/s"


def best_here() -> Fitting:
    """The best model for this machine's device; takes half a second, and torch."""
    import torch

    from longspec.machine.bandwidth import memory_rate
    from longspec.model.load import choose_device

    device = choose_device("auto")
    free = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    memory, rate = int(free * _FREE), memory_rate(device) or 0.0  # no model fits where its rate can't be measured
    return Fitting(best(memory, rate), memory, rate)
