"""The fields of a GGUF file's own architecture, checked to be what they must be.

Takes a header; gives numbers, sizes, and lists of one value for each layer. Knows no family.
"""

from __future__ import annotations

import numpy as np

from longspec.errors import ModelError
from longspec.machine.schema import number, shown
from longspec.model.gguf.header import GgufHeader

__all__ = ["BY_LAYER", "Fields"]

BY_LAYER = ("gemma4",)
"""Architectures whose fields may be lists of one value for each layer."""

_MOST_FACTORS = 1 << 16  # of a rope's tensor


class Fields:
    """The fields of the file's own architecture, checked to be numbers."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.kind = str(header.fields["general.architecture"])

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; an fp32 value is converted to its shortest decimal (1e-05). Where a file says one for each
        layer, the least of them.
        """
        value = self.header.fields.get(f"{self.kind}.{name}", default)
        if self.kind in BY_LAYER and isinstance(value, list) and value and len({type(each) for each in value}) == 1:
            value = min(value)
        kind = number(-3e38, 3e38)  # fp32's range
        if not kind.holds(value):
            seen = "lacks" if value is None else f"has the value {shown(value)} in"
            raise ModelError(f"{self.header.path} {seen} the field {self.kind}.{name}, where a number was expected.")
        return float(str(np.float32(value))) if isinstance(value, float) else int(value)  # type: ignore[arg-type]

    def size(self, name: str, default: float | None = None) -> int:
        value = self.number(name, default)
        if value < 1 or value != int(value):
            raise ModelError(f"{self.header.path} says {value} in {self.kind}.{name}, where a size was expected.")
        return int(value)

    def listed(self, name: str, layers: int) -> list[int]:
        """A size for each layer, of a list or of one number for all."""
        value = self.header.fields.get(f"{self.kind}.{name}")
        if not isinstance(value, list):
            return [self.size(name)] * layers
        if len(value) != layers or any(type(each) is not int or each < 1 for each in value):
            raise self._strange(name, f"{layers} sizes")
        return value

    def flags(self, name: str, layers: int) -> list[bool]:
        """A flag for each layer."""
        value = self.header.fields.get(f"{self.kind}.{name}")
        if not isinstance(value, list) or len(value) != layers or any(type(each) is not bool for each in value):
            raise self._strange(name, f"{layers} flags")
        return value

    def optional(self, name: str, default: float | None = None) -> float | None:
        return self.number(name) if f"{self.kind}.{name}" in self.header.fields else default

    def _strange(self, name: str, wanted: str) -> ModelError:
        seen = shown(self.header.fields.get(f"{self.kind}.{name}"))
        return ModelError(f"{self.header.path} says {seen} in {self.kind}.{name}, where {wanted} were expected.")

    def factors(self, name: str) -> list[float]:
        """A tensor of factors of a rope's frequencies."""
        tensor = self.header.tensors.get(name)
        if tensor is None or tensor.kind != 0 or len(tensor.shape) != 1 or tensor.shape[0] > _MOST_FACTORS:  # 0 is F32
            raise ModelError(f"{self.header.path} should hold {name} as one row of 32-bit floats, and doesn't.")
        values = tensor.bytes.view("<f4")
        if not (np.isfinite(values) & (values > 0)).all():
            raise ModelError(f"{self.header.path} holds values in {name} that aren't above 0.")
        return [float(str(value)) for value in values]
