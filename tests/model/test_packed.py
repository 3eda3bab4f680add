"""FP8, GPTQ, AWQ and compressed-tensors: values exactly those that the files stand for, and codes as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.native import TOKENS, logits
from support.packed import KINDS, write_packed

from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.native import missing
from longspec.model.weights.footprint import footprint
from longspec.model.weights.quantized import CodedLinear

CPU = torch.device("cpu")
FORMAT = {"gptq of 32": "INT4_32", "gptq, second version": "INT4_32", "awq of 32": "INT4_32"} | {
    "compressed of 32, fp16": "Q4_0",
    "compressed of 64, bf16": "INT4_32",
    **dict.fromkeys((kind for kind in KINDS if kind.startswith("fp8")), "FP8"),
}
QKV = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]


def decoder(folder: Path, dtype: torch.dtype, coded: str | None = None) -> Decoder:
    checkpoint = Checkpoint("tiny", folder)
    weights = checkpoint.weights(dtype, coded=coded is not None)
    return Decoder(Config.read(checkpoint.config()), weights, CPU, coded=coded)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantized_model(kind: str, tmp_path: Path) -> None:
    folder, model = write_packed(kind, tmp_path)
    weights = Checkpoint("tiny", folder).weights(torch.float32)
    for name in (*QKV, "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(weights[name], model.get_parameter(name))
        brief = Checkpoint("tiny", folder).weights(torch.bfloat16)[name]
        assert torch.equal(brief, model.get_parameter(name).bfloat16())  # rounded once
    with torch.inference_mode():
        want = model(torch.tensor([TOKENS[:40]])).logits[0]
    assert (logits(decoder(folder, torch.float32), [40]) - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    """Every matrix is what the file stands for; logits differ by the activations' codes; bytes are planned."""
    folder, model = write_packed(kind, tmp_path)
    checkpoint = Checkpoint("tiny", folder)
    assert checkpoint.coded
    config = Config.read(checkpoint.config())
    if missing(config, torch.bfloat16, CPU) is not None:
        pytest.skip("no kernel reads codes here")
    made = decoder(folder, torch.bfloat16, "Q8_0")
    wanted = FORMAT.get(kind, "INT4_128")
    assert wanted in made.formats
    layer = made._layers[1]
    assert isinstance(layer.mixer.inputs, CodedLinear)
    assert [piece.format for piece in layer.mixer.inputs.pieces] == [wanted]
    assert torch.equal(layer.mixer.inputs.values(), torch.cat([model.get_parameter(name) for name in QKV]).detach())
    down = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    assert torch.equal(layer.mlp.down.values(), down)
    with torch.inference_mode():
        want = model(torch.tensor([TOKENS[:60]])).logits[0]
    assert (logits(made, [3, 57]) - want).pow(2).mean().sqrt() < 0.15 * want.std()
    assert footprint(checkpoint, config, torch.bfloat16, "Q8_0").weights == made.nbytes


@pytest.mark.parametrize("kind", ["fp8 of blocks", "awq of 128"])
def test_dense_weights_take_what_was_planned(kind: str, tmp_path: Path) -> None:
    folder, _ = write_packed(kind, tmp_path)
    checkpoint = Checkpoint("tiny", folder)
    planned = footprint(checkpoint, Config.read(checkpoint.config()), torch.bfloat16)
    assert planned.weights == decoder(folder, torch.bfloat16).nbytes
    assert planned.resident <= planned.loading


def changed(folder: Path, **tensors: Any) -> Path:
    path = folder / "model.safetensors"
    kept = load_file(path)
    for part, change in tensors.items():
        name = f"model.layers.0.mlp.up_proj.{part}"
        if (made := change(kept.pop(name))) is not None:
            kept[name] = made.contiguous()
    save_file(kept, path, {"format": "pt"})
    return folder


def test_fp8_beside_other_formats_counts_as_values(tmp_path: Path) -> None:
    """A layer's keys in bf16 between queries and values in FP8, which are read as one matrix."""
    folder, model = write_packed("fp8 of rows", tmp_path)
    path = folder / "model.safetensors"
    kept = load_file(path)
    del kept[QKV[1].replace("weight", "weight_scale")]
    kept[QKV[1]] = model.get_parameter(QKV[1]).data
    save_file(kept, path, {"format": "pt"})
    made = decoder(folder, torch.bfloat16, "Q8_0")
    assert [piece.format for piece in made._layers[1].mixer.inputs.pieces] == ["Q8_0"]
    assert [piece.format for piece in made._layers[0].mixer.inputs.pieces] == ["FP8"]


def test_reordered_columns_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = write_packed("gptq of 32", tmp_path)
    with pytest.raises(ModelError, match=r"up_proj\.g_idx says that columns were reordered .*desc_act"):
        decoder(changed(folder, g_idx=lambda order: order.flip(0)), torch.float32)


@pytest.mark.parametrize(
    ("kind", "part", "change", "said"),
    [
        ("gptq of 32", "scales", lambda scales: scales[:-1], r"\[256, 128\] with scales \[256, 3\]"),
        ("gptq of 32", "qzeros", lambda zeros: zeros[:, :-1], r"scales \[256, 4\] and zero points \[248, 4\]"),
        ("awq of 32", "qweight", lambda codes: codes.long(), "should stand in int32, and stand in int64"),
        ("awq of 32", "qzeros", lambda zeros: None, r"up_proj\.qzeros is missing"),
        (
            "fp8 of blocks",
            "weight_scale_inv",
            lambda scale: scale.repeat(3, 2),
            r"scale_inv has the shape \[6, 2\], which",
        ),
        ("fp8 of rows", "weight_scale", lambda scale: None, r"up_proj\.weight_scale is missing"),
        ("fp8 of rows", "weight_scale", lambda scale: scale.bool(), r"up_proj\.weight_scale is in bool; scales in"),
        ("gptq of 32", "scales", lambda scales: scales.int(), r"up_proj\.scales is in int32; scales in"),
        (
            "compressed by rows",
            "weight_packed",
            lambda codes: codes[:, :0],
            r"and values, and has the shape \[256, 0\]",
        ),
        ("fp8 of blocks", "weight", lambda codes: codes[:0], r"and values, and has the shape \[0, 128\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(kind: str, part: str, change: Any, said: str, tmp_path: Path) -> None:
    folder, _ = write_packed(kind, tmp_path)
    with pytest.raises(ModelError, match=said):
        decoder(changed(folder, **{part: change}), torch.float32)


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_the_tools_own_config_counts(name: str, method: str, tmp_path: Path) -> None:
    folder, _ = write_packed(f"{method} of 32", tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    said = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    del said["quant_method"]
    if method == "awq":
        said = {"w_bit": said["bits"], "q_group_size": said["group_size"], "version": "GEMM", "zero_point": True}
    (folder / name).write_text(json.dumps(said))
    checkpoint = Checkpoint("tiny", folder)
    assert checkpoint.coded
    assert checkpoint.format == f"{method} by 32, 4.6 bits a weight"
