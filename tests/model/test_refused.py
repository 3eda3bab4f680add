"""Checkpoints that can't be run as they are: refused by name before weights load, or read as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load, oracle, write
from support.passes import feed

from longspec.cache import Dense
from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.load import open_model
from longspec.model.weights.read import Weights
from longspec.model.weights.safetensors import write_shard

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
PACKED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
TOKENS = [3, 14, 15, 92, 65]


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantization_config": FP8}, r"quantized as fp8 \(fmt e4m3\)"),
        ({"quantization_config": PACKED}, r"quantized as compressed-tensors \(format float-quantized\)"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            r"awq \(bits 4, group_size 128\)",
        ),
        ({"compression_config": {"quant_method": "sparseml"}}, "quantized as sparseml,"),
        ({"quantization_config": ["odd"]}, r"quantized as \['odd'\],"),
    ],
)
def test_quantized_weights_are_refused_by_name(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    folder = changed(write(oracle("llama"), tmp_path), **values)
    (folder / "model.safetensors").unlink()  # no weight is looked at
    with pytest.raises(ModelError, match=said) as refused:
        open_model(str(folder))
    assert refused.value.exit_code == 3


def test_the_outer_config_of_gemma3_counts(tmp_path: Path) -> None:
    raw = json.loads((write(oracle("gemma3"), tmp_path) / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": raw}
    assert Config.read(outer | {"tie_word_embeddings": False}).tied is False
    with pytest.raises(ModelError, match="quantized as fp8"):
        Config.read(outer | {"quantization_config": FP8})


def test_fp8_tensors_are_refused_where_nothing_says_so(tmp_path: Path) -> None:
    folder = write(oracle("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.weight in FP8 \(float8_e4m3fn\)"):
        Weights.of_folder(folder, torch.float32)


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = load(folder)
        return feed(model, Dense(model.shape), TOKENS)[1]


def test_a_second_head_of_a_tied_model_counts_as_for_transformers(tmp_path: Path) -> None:
    model = oracle("llama-tied-biased")
    folder = write(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    second = {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])}
    save_file(tensors | second, folder / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        wanted = type(model).from_pretrained(folder)(torch.tensor([TOKENS])).logits[0]
    assert (logits(folder) - wanted).abs().max() < 1e-4


def test_a_missing_head_of_an_untied_model_is_refused(tmp_path: Path) -> None:
    folder = write(oracle("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no lm_head\.weight.*tie_word_embeddings"):
        load(folder)


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma2", "Gemma3Text", "Phi3", "Olmo2"]
)
def test_what_config_json_leaves_out_is_as_transformers_has_it(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    raw = {name: value for name, value in config.to_dict().items() if name != "tie_word_embeddings"}
    assert Config.read(raw).tied == config.tie_word_embeddings


def test_a_tensor_unlike_its_header_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"The tensor a is \[3\], and its file says \[4\]"):
        write_shard(tmp_path / "a", [("a", (4,))], torch.float32, lambda name: torch.ones(3))
