"""Tiny checkpoints in FP8, GPTQ, AWQ and compressed-tensors, packed as their tools pack them, and the values they stand
for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import oracle, write
from torch import Tensor

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
Packed = tuple[dict[str, Tensor], Tensor]  # tensors by the names that follow the matrix', and its values


def words(codes: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Codes [a, 8 b] as int32 [a, b]: of each eight, that of column order[i] is in bits 4i."""
    each = codes.long().reshape(len(codes), -1, 8)[..., list(order)]
    whole = sum(each[..., i] << (4 * i) for i in range(8))
    assert isinstance(whole, Tensor)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int().contiguous()


def drawn(weight: Tensor, group: int, dtype: torch.dtype, zeros: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [out, in], steps and zero points [out, groups] of a matrix, and the values that they stand for."""
    grouped = weight.view(len(weight), -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    steps = ((high - low) / 15 if zeros else grouped.abs().amax(2) / 7).to(dtype)
    points = (-low / steps.float()).round().clamp(1, 15) if zeros else torch.full_like(low, 8)
    codes = (grouped / steps.float()[..., None] + points[..., None]).round().clamp(0, 15)
    values = steps.float()[..., None] * (codes - points[..., None])
    return codes.flatten(1).to(torch.uint8), steps, points.to(torch.uint8), values.flatten(1)


def gptq(group: int, version: int = 1) -> tuple[dict[str, Any], Callable[[Tensor], Packed]]:
    def pack(weight: Tensor) -> Packed:
        codes, steps, points, values = drawn(weight, group, torch.float16)
        tensors = {
            "qweight": words(codes).T.contiguous(),
            "qzeros": words(points.T.int() - int(version == 1)),
            "scales": steps.T.contiguous(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }
        return tensors, values

    said = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": False}
    return said | ({} if version == 1 else {"checkpoint_format": "gptq_v2"}), pack


def awq(group: int) -> tuple[dict[str, Any], Callable[[Tensor], Packed]]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(weight: Tensor) -> Packed:
        codes, steps, points, values = drawn(weight, group, torch.float16)
        tensors = {
            "qweight": words(codes.T.contiguous(), order),
            "qzeros": words(points.T.contiguous(), order),
            "scales": steps.T.contiguous(),
        }
        return tensors, values

    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "GEMM", "zero_point": True}, pack


def compressed(
    group: int | None, dtype: torch.dtype = torch.bfloat16, *, symmetric: bool = True
) -> tuple[dict[str, Any], Callable[[Tensor], Packed]]:
    def pack(weight: Tensor) -> Packed:
        codes, steps, points, values = drawn(weight, group or weight.shape[1], dtype, not symmetric)
        tensors = {"weight_packed": words(codes), "weight_scale": steps, "weight_shape": torch.tensor(weight.shape)}
        if not symmetric:
            tensors["weight_zero_point"] = words(points.T.contiguous()).T.contiguous()
        return tensors, values

    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": symmetric, "actorder": None}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}, pack


def fp8(by: str) -> tuple[dict[str, Any], Callable[[Tensor], Packed]]:
    """by: tensor, row, or block."""
    said: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if by == "row":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}}
        said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}

    def pack(weight: Tensor) -> Packed:
        if by == "block":
            rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
            scale = torch.rand(rows, columns) / 400 + 1e-3
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        else:
            scale = (weight.abs().amax(1, keepdim=True) if by == "row" else weight.abs().amax().view(1)) / 448
            spread = scale
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        name = "weight_scale_inv" if by == "block" else "weight_scale"
        return {"weight": codes, name: scale}, codes.float() * spread

    return said | ({"weight_block_size": [128, 128]} if by == "block" else {}), pack


KINDS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq of 32": gptq(32),
    "gptq of 128": gptq(128),
    "gptq, second version": gptq(64, 2),
    "awq of 32": awq(32),
    "awq of 128": awq(128),
    "compressed of 32, fp16": compressed(32, torch.float16),
    "compressed of 64, bf16": compressed(64),
    "compressed of 128": compressed(128),
    "compressed, asymmetric": compressed(128, symmetric=False),
    "compressed by rows": compressed(None),
    "fp8 of a tensor": fp8("tensor"),
    "fp8 of rows": fp8("row"),
    "fp8 of blocks": fp8("block"),
}


def write_packed(kind: str, folder: Path, **changes: Any) -> tuple[Path, Any]:
    """A Llama whose layers' matrices are of this kind, and transformers' model of their values."""
    model = oracle("llama", **{**SIZES, **changes})
    write(model, folder)
    said, pack = KINDS[kind]
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made, values = pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in made.items()}
        model.get_parameter(name).data.copy_(values)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    return folder, model
