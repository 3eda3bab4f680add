"""Triton kernels compiled for GPUs that aren't here: what a program launches is compiled and not run.

For a process of its own, without Triton's interpreter: `targets` takes the place of the driver for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any


class Driver:
    capability = 0

    def get_current_device(self) -> int:
        return self.capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

        return GPUTarget("cuda", self.capability, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    def __init__(self, name: str, kernel: Any, made: list[tuple[str, Any]]) -> None:
        self._name, self._kernel, self._made = name, kernel, made

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **constants: Any) -> None:
            self._made.append((self._name, self._kernel.warmup(*given, grid=grid, **constants)))

        return launch


def targets(module: ModuleType, names: Sequence[str], capabilities: Sequence[int]) -> Iterator[list[tuple[str, Any]]]:
    """For each capability a list that fills with the names and the compiled forms of what is launched."""
    import triton  # type: ignore[import-untyped]

    driver, made = Driver(), list[tuple[str, Any]]()
    triton.runtime.driver.set_active(driver)
    for name in names:
        setattr(module, name, Compiled(name, getattr(module, name), made))
    for driver.capability in capabilities:
        made.clear()
        yield made
