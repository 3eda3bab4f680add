"""Files from elsewhere are ordinary files of a bounded size, whatever stands in their place; docs/limits.md names the
bounds, and what this reads there is what the code has.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from hostile.targets import folder_of
from safetensors.torch import load_file, save_file

from longspec.cache import snapshot
from longspec.cli.io import batch_forecast
from longspec.engine import conversation
from longspec.errors import LongspecError, ModelError, UsageError
from longspec.heads import draft_vocabulary
from longspec.heads import format as heads
from longspec.heads.published.eagle3 import load_eagle3
from longspec.machine import files
from longspec.machine.files import parse_json, read_bytes, read_text
from longspec.model import config_values
from longspec.model.files import checkpoint, tokenizer_files
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.hub import find
from longspec.model.gguf import header
from longspec.model.gguf import tokenizer as gguf_tokenizer
from longspec.model.gguf.file import GgufFile
from longspec.model.gguf.tokenizer import build_tokenizer
from longspec.model.weights import read, safetensors
from longspec.model.weights.read import Weights
from longspec.model.weights.safetensors import Shard
from longspec.semantic import probe
from longspec.training import features, semantic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return folder_of(tmp_path_factory.mktemp("seed"), "llama")


@pytest.fixture
def folder(seed: dict[str, bytes], tmp_path: Path) -> Path:
    for name, data in seed.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
READERS: dict[str, Callable[[Checkpoint], Any]] = {
    "config.json": Checkpoint.config,
    "generation_config.json": Checkpoint.generation_config,
    "tokenizer_config.json": Checkpoint.tokenizer_config,
    "tokenizer.json": Checkpoint.tokenizer,
    "chat_template.jinja": Checkpoint.chat_template,
    "model.safetensors": lambda made: made.weights(torch.float32),
    "model.safetensors.index.json": lambda made: made.weights(torch.float32),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_gigabytes_is_refused_at_once(folder: Path, name: str) -> None:
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(1 << 33)  # sparse: it takes no disk
    with pytest.raises(ModelError):
        READERS[name](Checkpoint("here", folder=folder))


def test_a_device_is_no_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="isn't an ordinary file"):
        Checkpoint("here", folder=folder).config()


def test_a_pipe_in_a_file_s_place_is_not_waited_for(folder: Path) -> None:
    part = folder / "part.safetensors"
    os.mkfifo(part)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part.name}}))
    with pytest.raises(ModelError, match="isn't an ordinary file"):
        Weights.of_folder(folder, torch.float32)
    for name in ("config.json", "x.gguf"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    with pytest.raises(ModelError):
        find(str(folder / "x.gguf"))
    with pytest.raises(ModelError):
        Checkpoint("here", folder=folder).config()
    with pytest.raises(ModelError, match="isn't an ordinary file"):
        header.read_header(folder / "x.gguf")
    assert not header.is_gguf(folder / "x.gguf")
    with pytest.raises(UsageError, match="isn't an ordinary file"):
        snapshot.Snapshot(part)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_has(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a name that no file can have"):
        read_bytes(folder / name, 8, "The file")
    (folder / "model.safetensors").unlink()
    weights = {"weight_map": {"a": f"{name}.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(ModelError):
        Weights.of_folder(folder, torch.float32)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match="isn't UTF-8 at byte 3"):
        read_text(tmp_path / "a", 8, "The file")


def test_json_is_bounded_in_depth() -> None:
    assert parse_json(b"[" * files.MOST_DEPTH + b"]" * files.MOST_DEPTH)
    for depth in (files.MOST_DEPTH + 1, 5_000, 1_000_000):
        with pytest.raises(ValueError, match=r"nested deeper|recursion"):
            parse_json(b"[" * depth + b"]" * depth)
    with pytest.raises(ValueError, match="twice"):
        parse_json(b'{"a": 1, "a": 2}', unique=True)


def test_json_of_half_a_character_is_no_text() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    for text in (b'"\\ud800"', b'{"\\udc00": 1}', b'[["a\\ud83d"]]'):
        with pytest.raises(ValueError, match="surrogates"):
            parse_json(text)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("coded", [None, "Q8_0"])
def test_a_weight_is_of_floats(folder: Path, dtype: torch.dtype, name: str, coded: str | None) -> None:
    from support.checkpoints import load

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ModelError):
        load(folder, torch.bfloat16, coded=coded)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("coded", [None, "Q8_0"])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("how", ["flat", "deep", "empty", "without columns", "transposed", "scalar"])
def test_a_weight_of_another_shape_is_refused(
    folder: Path, name: str, how: str, planned: bool, coded: str | None
) -> None:
    from support.checkpoints import load

    from longspec.model.config import Config
    from longspec.model.weights.footprint import footprint

    tensors = load_file(folder / "model.safetensors")
    held = tensors[name]
    if held.ndim == 1 and how in ("flat", "transposed"):
        return
    changed = {
        "flat": held.flatten(),
        "deep": held[None],
        "empty": held[:0],
        "without columns": held[..., None][..., :0],
        "transposed": held.t().contiguous(),
        "scalar": held.flatten()[0],
    }
    save_file(tensors | {name: changed[how].clone()}, folder / "model.safetensors")
    made = Checkpoint("here", folder=folder)
    config = Config.read(made.config())
    act = partial(footprint, made, config) if planned else partial(load, folder)
    with pytest.raises(ModelError):
        act(dtype=torch.bfloat16, coded=coded)


def test_what_a_state_decays_by_is_of_floats(tmp_path: Path) -> None:
    from support.checkpoints import load, oracle, write

    tensors = load_file(write(oracle("qwen3_5"), tmp_path) / "model.safetensors")
    for name in ("A_log", "dt_bias", "norm.weight", "conv1d.weight"):
        full = next(each for each in tensors if each.endswith(f"linear_attn.{name}"))
        save_file(tensors | {full: tensors[full].to(torch.int8)}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=rf"{re.escape(full)} as int8, where fp32"):
            load(tmp_path)


@pytest.mark.parametrize("shape", [(1 << 40, 0, 4), (1 << 18, 1, 1)], ids=str)
def test_experts_are_counted_before_each_has_a_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """One tensor may stack as many as its shape says, and where one size is 0, that takes no bytes."""
    nbytes = 2 * shape[0] * shape[1] * shape[2]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    text = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    with pytest.raises(ModelError, match=rf"stacks {shape[0]:,} experts; at most {config_values.MOST_EXPERTS:,} were"):
        Weights.of_folder(tmp_path, torch.bfloat16)


def test_experts_of_a_gguf_file_are_counted(tmp_path: Path) -> None:
    from support.checkpoints import oracle
    from support.ggufs import write_gguf

    made = header.read_header(write_gguf(oracle("qwen3_moe", mlp_only_layers=[]), tmp_path / "a.gguf"))
    name = "blk.0.ffn_down_exps.weight"
    made.tensors[name] = replace(made.tensors[name], shape=(1 << 30, 1, 1))
    with pytest.raises(ModelError, match=r"ffn_down_exps.weight stacks 1,073,741,824 experts"):
        GgufFile(made)


def test_a_safetensors_header_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (safetensors._MOST_HEADER_NBYTES + 1, 1 << 63):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(1 << 31)
        with pytest.raises(ModelError, match="bytes, more than"):
            Shard(path)


@pytest.mark.parametrize(
    "tokens",
    [["a" * 20_000, "b"], ["<unk>", *("a" * n for n in range(1, 2_500))]],
    ids=["a token of 20,000 letters", "tokens that join in too many ways"],
)
def test_merges_are_bounded(tokens: list[str]) -> None:
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
    }
    with pytest.raises(ModelError, match="too long, or join in too many ways"):
        build_tokenizer(fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": 5},
        {"architectures": [None]},
        {"speculators_model_type": ["eagle3"]},
        {"transformer_layer_config": [1]},
        {"longspec": 3},
        {"longspec": {"version": 1}, "speculators_model_type": []},
        {"longspec": {"version": 1}, "speculators_config": {"proposal_methods": {}}},
    ],
    ids=str,
)
def test_a_head_s_config_of_other_types_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    from longspec.drafters.spec import parse

    (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(LongspecError) as refused:
        parse(f"{tmp_path}/")
    assert refused.value.exit_code in (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"eagle_aux_hidden_state_layer_ids": 5},
        {"eagle_aux_hidden_state_layer_ids": ["a"]},
        {"hidden_size": "64"},
        {"max_position_embeddings": 1e30},
        {"rope_scaling": 4},
    ],
    ids=str,
)
def test_an_eagle_head_s_values_are_checked(tmp_path: Path, changes: dict[str, Any]) -> None:
    from support.engines import tiny
    from support.published import write

    model = tiny(tmp_path / "model")
    folder = write(tmp_path / "head", "authors", model)
    raw = json.loads((folder / "config.json").read_text())
    load_eagle3(folder, {**raw, "num_hidden_layers": "many", "sliding_window": 0, "eos_token_id": "x"}, model)
    with pytest.raises(LongspecError) as refused:
        load_eagle3(folder, raw | changes, model)
    assert refused.value.exit_code in (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_an_eagle_head_s_tensors_are_checked(tmp_path: Path, dtype: torch.dtype) -> None:
    from support.engines import tiny
    from support.published import write

    model = tiny(tmp_path / "model")
    folder = write(tmp_path / "head", "authors", model)
    raw, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    for name in ("d2t", "fc.weight"):
        changed = tensors[name][None].float() if dtype.is_floating_point else tensors[name].to(dtype)
        save_file(tensors | {name: changed}, folder / "model.safetensors")
        with pytest.raises(LongspecError) as refused:
            load_eagle3(folder, raw, model)
        assert refused.value.exit_code in (2, 3)


def test_an_added_token_that_tokenizer_json_lacks_is_added(folder: Path) -> None:
    plain = Checkpoint("here", folder=folder)
    made = plain.tokenizer()
    assert made.encode("ab<|extra|>c").ids[-2] == made.token_to_id("<|extra|>") == 96
    assert made.get_added_tokens_decoder()[96].special
    config = plain.tokenizer_config()
    config["added_tokens_decoder"]["5"] = {
        "content": made.id_to_token(5),
        "special": False,
    }  # a token of the model's own
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    again = plain.tokenizer()
    assert again.get_added_tokens_decoder()[5].content == made.id_to_token(5)


def test_added_tokens_cost_what_they_are(folder: Path) -> None:
    """Each call of the library reads all of them again: one by one 20,000 took minutes."""
    made = Checkpoint("here", folder=folder)
    config, size = made.tokenizer_config(), made.tokenizer().get_vocab_size()
    config["added_tokens_decoder"] |= {str(size + i): {"content": f"<x{i}>"} for i in range(20_000)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    began = monotonic()
    assert made.tokenizer().token_to_id("<x19999>") == size + 19_999
    assert monotonic() - began < 10
    config["added_tokens_decoder"][str(size + 20_000)] = {"content": "<x7>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no place for"):
        made.tokenizer()


def test_limits_md_names_every_limit() -> None:
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) +\| ([\d,]+)(?: (MiB|KiB))? +\|", text, re.MULTILINE)
    said = {name: int(n.replace(",", "")) << {"MiB": 20, "KiB": 10, "": 0}[unit] for name, n, unit in rows}
    known = {
        "a config file of a model": checkpoint._MOST_NBYTES,
        "a chat template's file": checkpoint._MOST_TEMPLATE_NBYTES,
        "a file of a tokenizer": tokenizer_files._MOST_TOKENIZER_NBYTES,
        "letters that a tokenizer makes of one": tokenizer_files.MOST_GROWTH,
        "tokens that a tokenizer puts around a text": tokenizer_files.MOST_ADDED,
        "an index of safetensors files": read._MOST_INDEX_NBYTES,
        "the header of a safetensors file": safetensors._MOST_HEADER_NBYTES,
        "the header of a GGUF file": header._MOST_HEADER_NBYTES,
        "fields of a GGUF file": header._MOST_FIELDS,
        "tensors of a GGUF file": header._MOST_TENSORS,
        "parts of a split GGUF file": header._MOST_PARTS,
        "merges of a GGUF file's sentencepiece tokens": gguf_tokenizer._MOST_MERGES,
        "a draft head's config": heads._MOST_NBYTES,
        "a `--summary` that `plan --measured` reads": batch_forecast._MOST_NBYTES,
        "the manifest of a folder of features": features._MOST_NBYTES,
        "a probe's description, `probe.json`": probe._MOST_NBYTES,
        "a probe's training group of texts": semantic._MOST_NBYTES,
        "the index of a prompt cache": snapshot._INDEX_LIMIT,
        "arrays and objects within each other in JSON": files.MOST_DEPTH,
        "a saved conversation": conversation._MOST_NBYTES,
        "a text of hot tokens": draft_vocabulary._MOST_NBYTES,
        "channels of a model, or of its MLP": config_values._MOST_WIDTH,
        "heads of a layer, and channels of a head": config_values._MOST_HEADS,
        "layers of a model": config_values.MOST_LAYERS,
        "loops of a looped model": config_values.MOST_LOOPS,
        "tokens that a draft head drafts": heads.MOST_DEPTH,
        "positions that a draft head reads": heads.MOST_WINDOW,
        "experts of a layer": config_values.MOST_EXPERTS,
        "dimensions of a head of linear attention": config_values.MOST_STATE_DIM,
        "positions of a model's context": config_values.MOST_CONTEXT,
    }
    assert said == known
