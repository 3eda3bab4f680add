"""gpt-oss: its published layout of experts, sinks in every way of attending, GGUF files, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.blocks import random_blocks, values
from support.checkpoints import load, oracle, write
from support.ggufs import write_gguf
from support.native import SIZES
from support.passes import feed
from torch import Tensor

from longspec.cache import CACHES
from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.gguf.file import read_gguf
from longspec.model.weights.read import Weights

TOKENS = torch.randint(3, 70, (60,), generator=torch.Generator().manual_seed(1)).tolist()
WIDE = SIZES | {"head_dim": 32, "intermediate_size": 64}


def _published(model: Any, folder: Path) -> Path:
    """The checkpoint with random codes of MXFP4 for its experts, as the published ones have them; the model gets what
    they stand for.
    """
    write(model, folder)
    held = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("gate_up_proj", "down_proj")):
                continue
            experts, width, size = parameter.shape
            blocks = random_blocks("MXFP4", experts * size, width, seed=len(held))
            each = blocks.view(experts, size, width // 32, 17)
            codes = torch.stack((each[..., 1:] & 15, each[..., 1:] >> 4), -2).flatten(-2)  # in the columns' order
            del held[name]
            held[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()
            held[f"{name}_scales"] = each[..., 0].contiguous()
            parameter.copy_(values("MXFP4", blocks).view(experts, size, width).transpose(1, 2))
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _opened(folder: Path, dtype: torch.dtype, coded: str | None = None) -> Decoder:
    checkpoint = Checkpoint("a", folder)
    weights = checkpoint.weights(dtype, coded=coded is not None)
    return Decoder(Config.read(checkpoint.config()), weights, torch.device("cpu"), coded=coded)


def _logits(decoder: Decoder, kind: str = "dense") -> Tensor:
    with torch.inference_mode():
        return feed(decoder, CACHES[kind](decoder.shape), TOKENS)[1]


@pytest.mark.parametrize("changes", [{}, WIDE], ids=["tiny", "wide"])
def test_published_codes_are_what_they_stand_for(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = oracle("gpt_oss", **({"hidden_size": 64} | changes))
    folder = _published(model, tmp_path)
    checkpoint = Checkpoint("a", folder)
    assert checkpoint.coded
    assert "mxfp4" in checkpoint.format
    with torch.inference_mode():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    assert (_logits(_opened(folder, torch.float32)) - wanted).abs().max() < 1e-4
    if changes:
        decoder = _opened(folder, torch.bfloat16, "Q8_0")
        if decoder.slow is not None:
            pytest.skip(decoder.slow)
        assert decoder.is_exact
        stored = load_file(folder / "model.safetensors").items()
        nbytes = sum(tensor.nbytes for name, tensor in stored if name.endswith(("_blocks", "_scales")))
        assert nbytes <= decoder.formats["MXFP4"] < 1.05 * nbytes  # tiles are padded
        assert (_logits(decoder) - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("coded", [None, "Q8_0"])
def test_a_gguf_file_is_the_same_model(tmp_path: Path, coded: str | None) -> None:
    model = oracle("gpt_oss", **(WIDE if coded else {}))
    kinds = {"exps.weight": gguf.GGMLQuantizationType.MXFP4} if coded else {}
    file = read_gguf(write_gguf(model, tmp_path / "a.gguf", others=kinds))
    config = Config.read(file.config())
    assert config.windows == (24, None, 24, None)
    assert config.ropes[0].get("truncate") is False  # type: ignore[union-attr]
    dtype = torch.bfloat16 if coded else torch.float32
    decoder = Decoder(config, Weights.of_gguf(file, dtype), torch.device("cpu"), coded=coded)
    if not coded:
        with torch.inference_mode():
            wanted = model(torch.tensor([TOKENS])).logits[0]
        assert (_logits(decoder) - wanted).abs().max() < 1e-4
        return
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    assert "MXFP4" in decoder.formats
    state = {name: file.take(name) for name in file.names}
    exact = Decoder(config, Weights.of_tensors(state, torch.float32), torch.device("cpu"))
    wanted = _logits(exact)
    assert (_logits(decoder) - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("kind", sorted(CACHES))
def test_the_kernels_attend_as_torch_does_in_every_cache(tmp_path: Path, kind: str) -> None:
    """In bf16: sinks beside rows that are dense, codes, or streamed."""
    folder = write(oracle("gpt_oss", **WIDE), tmp_path)
    decoder = load(folder, torch.bfloat16)
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    wanted, got = _logits(load(folder, torch.float32), kind), _logits(decoder, kind)
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    for layer in decoder._layers:
        layer.mixer.sinks.fill_(-1e4)  # no share at all
    assert (_logits(decoder, kind) - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("layers.1.self_attn.sinks", r"layers\.1\.self_attn\.sinks is missing"),
        ("router.bias", r"layers\.0\.mlp\.router\.bias is missing"),
        ("gate_up_proj_scales", r"gate_up_proj_scales is missing"),
        ("down_proj_blocks", r"experts\.0\.down_proj\.weight is missing"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, removed: str, said: str) -> None:
    folder = _published(oracle("gpt_oss", hidden_size=64, num_hidden_layers=2, layer_types=None), tmp_path)
    held = load_file(folder / "model.safetensors")
    save_file({name: held[name] for name in held if removed not in name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said) as refused:
        _opened(folder, torch.float32)
    assert refused.value.exit_code == 3


def test_scales_that_fit_no_codes_are_refused(tmp_path: Path) -> None:
    folder = _published(oracle("gpt_oss", hidden_size=64, num_hidden_layers=1, layer_types=None), tmp_path)
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    held[name] = held[name][:, :5].contiguous()
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ModelError, match="aren't blocks of 32 values"):
        _opened(folder, torch.float32)
