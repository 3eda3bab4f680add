"""Checkpoints that can't be run as they are: refused by name before weights load, or read as transformers does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load, oracle, write
from support.commands import inside
from support.passes import feed

from longspec.cache import Dense
from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.weights.read import Weights
from longspec.model.weights.safetensors import write_shard
from longspec.model.weights.scheme import scheme_of

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
E5M2 = FP8 | {"fmt": "e5m2"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def compressed(kind: str = "pack-quantized", more: Any = None, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {**INT4, **weights}}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, **(more or {})}


BITS_AND_BYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
MIXED = {f"group_{bits}": {"weights": INT4 | {"num_bits": bits}} for bits in (4, 8)}
REFUSED: list[tuple[Any, str]] = [
    (E5M2, r"fp8 \(fmt e5m2\)"),
    (GPTQ | {"bits": 8}, r"gptq \(bits 8, group_size 128\)"),
    (GPTQ | {"desc_act": True}, r"gptq \(bits 4, group_size 128, desc_act True\)"),
    (GPTQ | {"group_size": 16}, r"gptq \(bits 4, group_size 16\)"),
    (GPTQ | {"checkpoint_format": "marlin"}, r"gptq \(checkpoint_format marlin, bits 4, group_size 128\)"),
    (GPTQ | {"dynamic": {"+:lm_head": {"bits": 8}}}, "gptq"),
    ({"quant_method": "gptq"}, "gptq,"),
    (GPTQ | {"bits": math.inf}, r"gptq \(bits inf, group_size 128\)"),
    (GPTQ | {"group_size": 1e30}, r"gptq \(bits 4, group_size 1e\+30\)"),
    (GPTQ | {"bits": "a" * 9999}, r"gptq \(bits a{40}, group_size 128\)"),
    (FP8 | {"weight_block_size": [1 << 40, 128]}, r"fp8 \(fmt e4m3\),"),
    (FP8 | {"weight_block_size": [math.inf, 128]}, r"fp8 \(fmt e4m3\),"),
    (AWQ | {"version": "gemv"}, r"awq \(version gemv, bits 4, group_size 128\)"),
    (AWQ | {"bits": 3}, r"awq \(version gemm, bits 3, group_size 128\)"),
    (compressed(num_bits=8), r"compressed-tensors \(format pack-quantized, num_bits 8, group_size 128, strategy"),
    (compressed(actorder="group"), "compressed-tensors"),
    (compressed("nvfp4-pack-quantized", type="float"), r"compressed-tensors \(format nvfp4-pack-quantized"),
    (compressed("int-quantized", num_bits=8), r"compressed-tensors \(format int-quantized"),
    (compressed(more={"config_groups": MIXED}), r"compressed-tensors \(format pack-quantized\)"),
    (compressed(more={"sparsity_config": {"format": "sparse-24-bitmask"}}), "compressed-tensors"),
    (compressed(more={"transform_config": {"config_groups": {"R1": {}}}}), "compressed-tensors"),
    (BITS_AND_BYTES, "bitsandbytes,"),
    *(({"quant_method": name}, f"{name},") for name in (
        "hqq", "aqlm", "quanto", "torchao", "eetq", "higgs", "spqr", "vptq", "bitnet", "modelopt", "exl2",
        "exl3", "auto-round", "quark", "fp_quant",
    )),
    ({"group_size": 64, "bits": 4}, r"an unnamed method \(bits 4, group_size 64\)"),
    (["odd"], r"\['odd'\],"),
]  # fmt: skip
TOKENS = [3, 14, 15, 92, 65]


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(("quantized", "said"), REFUSED)
def test_quantized_weights_are_refused_by_name(quantized: Any, said: str) -> None:
    with pytest.raises(ModelError, match=f"quantized as {said}") as refused:
        scheme_of({"quantization_config": quantized})
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("name", ["quantization_config", "compression_config", "quantization", "quantize_config.json"])
def test_they_are_refused_before_weights_load(tmp_path: Path, name: str) -> None:
    folder = write(oracle("llama"), tmp_path / "model")
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps({"bits": 3, "group_size": 128}))
    else:
        changed(folder, **{name: BITS_AND_BYTES})
    (folder / "model.safetensors").unlink()  # no weight is looked at
    done = inside(["run", "hello", "-m", str(folder)], tmp_path)
    assert (done.code, done.out) == (3, b"")
    assert ("gptq (bits 3, group_size 128)" if name.endswith(".json") else "bitsandbytes") in done.err


def test_the_outer_config_of_gemma3_counts(tmp_path: Path) -> None:
    raw = json.loads((write(oracle("gemma3"), tmp_path) / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": raw}
    assert Config.read(outer | {"tie_word_embeddings": False}).tied is False
    with pytest.raises(ModelError, match="quantized as fp8"):
        Config.read(outer | {"quantization_config": E5M2})


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
