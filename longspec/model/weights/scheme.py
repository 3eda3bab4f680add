"""How a safetensors checkpoint's matrices are quantized, as its config.json says.

Takes the config's dict; gives a `Scheme`, or None where the weights are plain. What can't be read is refused here by
name, before any weight loads. Knows no tensor: `longspec.model.weights.packed` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longspec.errors import ModelError

__all__ = ["QUANTIZED", "Scheme", "scheme_of"]

QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""Where config.json says that weights are quantized; the last is MLX's."""

_MOST = 1 << 24  # rows or columns that share a scale: a matrix has no more

_SAID = ("format", "fmt", "checkpoint_format", "version", "bits", "num_bits", "group_size", "strategy", "desc_act")
"""What a refusal repeats of it."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How matrices stand in the file: FP8 values, or codes of 4 bits, each with scales beside it."""

    layout: Literal["fp8", "gptq", "awq", "packed", "mxfp4"]
    group: int | None = None  # columns that share a scale; None: all
    zero_offset: int = 0  # what is added to a stored zero point
    symmetric: bool = False  # all zero points are 8, and none are stored
    block: tuple[int, int] | None = None  # FP8: rows and columns that share a scale

    @property
    def coded(self) -> bool:
        """Whether the kernels read its bytes as they are."""
        return self.layout != "fp8" or self.block is None or self.block[1] % 128 == 0

    def __str__(self) -> str:
        if self.layout == "fp8":
            return "fp8 (e4m3), 8 bits a weight"
        if self.layout == "mxfp4":
            return "mxfp4 experts, 4.3 bits a weight"
        name = "compressed-tensors" if self.layout == "packed" else self.layout
        if self.group is None:
            return f"{name} by rows, 4 bits a weight"
        bits = 4 + (16 if self.symmetric else 20) / self.group
        return f"{name} by {self.group}, {bits:.1f} bits a weight"


def scheme_of(raw: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json, or of its text part. ModelError names one that isn't supported."""
    inner = raw.get("text_config")
    for holder in (raw, inner if isinstance(inner, Mapping) else {}):
        for name in QUANTIZED:
            if said := holder.get(name):
                return _read(said)
    return None


def _read(said: Any) -> Scheme:
    method = str(said.get("quant_method")) if isinstance(said, Mapping) else ""
    try:
        found = _METHODS[method](said) if method in _METHODS else None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        found = None
    if found is not None:
        return found
    what = f"{said!s:.100}"
    if isinstance(said, Mapping):
        parts = {**said, **_weights_of(said)}
        details = ", ".join(f"{part} {parts[part]!s:.40}" for part in _SAID if parts.get(part) not in (None, False))
        what = f"{said.get('quant_method', 'an unnamed method')!s:.40}" + (f" ({details})" if details else "")
    raise ModelError(
        f"The checkpoint's weights are quantized as {what}, which isn't supported; longspec reads fp32, fp16 and bf16 "
        "weights, FP8 (e4m3), gpt-oss's MXFP4, and GPTQ, AWQ and compressed-tensors in 4 bits without reordered columns"
        " from safetensors, and GGUF files: take one of these of the same model."
    )


def _fp8(said: Mapping[str, Any]) -> Scheme | None:
    """DeepSeek's and Qwen's, and what fbgemm writes: `weight_scale_inv` by blocks, or `weight_scale`."""
    block = said.get("weight_block_size")
    if said.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return None
    return Scheme("fp8", block=None if block is None else _pair(block))


def _gptq(said: Mapping[str, Any]) -> Scheme | None:
    """In files of the first version a zero point is stored less 1."""
    offset = {"gptq": 1, "gptq_v2": 0}.get(said.get("checkpoint_format") or "gptq")
    changed = [name for name in said.get("dynamic") or {} if not name.startswith("-:")]  # other bits in some layers
    group = int(said["group_size"])
    if int(said["bits"]) != 4 or offset is None or changed or (said.get("desc_act") and group != -1):
        return None
    return _grouped("gptq", group, zero_offset=offset)


def _awq(said: Mapping[str, Any]) -> Scheme | None:
    bits, group = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
    if bits != 4 or str(said.get("version", "gemm")).lower() != "gemm":
        return None
    return _grouped("awq", int(str(group)))


def _compressed(said: Mapping[str, Any]) -> Scheme | None:
    weights = _weights_of(said)
    sparse = (said.get("sparsity_config") or {}).get("format", "dense")
    kind = (said.get("format"), weights.get("type"), weights.get("num_bits"))
    if not weights or sparse != "dense" or said.get("transform_config"):
        return None
    if kind in (("float-quantized", "float", 8), ("naive-quantized", "float", 8)):
        block = weights.get("block_structure")
        return Scheme("fp8", block=None if block is None else _pair(block))
    strategy = weights.get("strategy")
    if kind != ("pack-quantized", "int", 4) or strategy not in ("group", "channel") or weights.get("actorder"):
        return None
    group = int(weights["group_size"]) if strategy == "group" else -1
    return _grouped("packed", group, symmetric=bool(weights.get("symmetric", True)))


def _weights_of(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors says of weights; {} where its groups of layers differ."""
    groups = said.get("config_groups")
    found = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    same = all(weights == found[0] for weights in found)
    return found[0] if found and same and isinstance(found[0], Mapping) else {}


def _grouped(layout: Literal["gptq", "awq", "packed"], group: int, **more: Any) -> Scheme | None:
    """Groups are of 32 or 64 columns, of multiples of 128, or of all (-1)."""
    if group != -1 and group not in (32, 64) and (not 1 <= group <= _MOST or group % 128):
        return None
    return Scheme(layout, group=None if group == -1 else group, **more)


def _pair(block: Any) -> tuple[int, int]:
    rows, columns = (int(size) for size in block)
    if not 1 <= min(rows, columns) <= max(rows, columns) <= _MOST:
        raise ValueError(block)
    return rows, columns


_METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme | None]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "mxfp4": lambda said: Scheme("mxfp4", 32),  # gpt-oss's experts (`longspec.model.weights.stacked`)
}
