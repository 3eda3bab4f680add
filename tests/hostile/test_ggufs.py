"""GGUF files whose fields are of another kind, and those of older converters, which lack some."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.checkpoints import oracle
from support.ggufs import write_gguf

from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.gguf.config import config_of
from longspec.model.gguf.file import GgufFile, read_gguf
from longspec.model.gguf.header import GgufHeader, read_header
from longspec.model.gguf.tokenizer import build_tokenizer, tokenizer_config_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(oracle("llama"), tmp_path_factory.mktemp("llama") / "a.gguf")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(oracle("gemma2", tie_word_embeddings=True), tmp_path_factory.mktemp("gemma2") / "a.gguf")


def changed(path: Path, **fields: Any) -> GgufHeader:
    """Fields by their names' last words; None takes one away."""
    header = read_header(path)
    for name, value in fields.items():
        full = next((held for held in header.fields if held.endswith(name)), name)
        if value is None:
            header.fields.pop(full, None)
        else:
            header.fields[full] = value
    return header


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": [2]},
        {"eos_token_id": math.nan},
        {"bos_token_id": -1},
        {"bos_token_id": True},
        {"padding_token_id": "0"},
        {"tokens": 5},
        {"tokens": [1, 2]},
        {"tokens": None},
        {"token_type": "a"},
        {"merges": [1]},
        {"merges": {"a": 1}},
        {"tokenizer.ggml.pre": ["smollm"]},
        {"tokenizer.ggml.model": ["gpt2"]},
        {"dimension_count": 64},
        {"dimension_count": 1 << 40},
        {"dimension_count": 7},
        {"head_count": [6, 6]},
        {"head_count": "6"},
        {"head_count": math.inf},
        {"context_length": 1 << 63},
        {"context_length": 1e300},
        {"freq_base": math.nan},
        {"freq_base": -1.0},
        {"layer_norm_rms_epsilon": math.inf},
        {"block_count": 10**12},
        {"block_count": 0},
        {"general.architecture": ["llama"]},
        {"llama.rope.scaling.type": ["yarn"]},
        {"llama.rope.scaling.factor": "4"},
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_refused(llama: Path, fields: dict[str, Any]) -> None:
    header = changed(llama, **fields)

    def read() -> None:
        file = GgufFile(header)
        Config.read(file.config())
        file.tokenizer_config()
        file.tokenizer()

    with pytest.raises(ModelError) as refused:
        read()
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("count", ["7", [1], math.nan, {}, -1])
def test_a_split_count_of_another_kind_is_refused(llama: Path, tmp_path: Path, count: Any) -> None:
    path = tmp_path / "a.gguf"
    kinds = {str: 8, list: 9, float: 6, dict: 8, int: 5}
    values = {
        8: struct.pack("<Q", 1) + b"7",
        9: struct.pack("<IQi", 5, 1, 1),
        6: struct.pack("<f", math.nan),
        5: b"\xff" * 4,
    }
    kind = kinds[type(count)]
    name = b"split.count"
    field = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + values[kind]
    path.write_bytes(struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 0, 1) + field)
    with pytest.raises(ModelError, match="one part of a split GGUF"):
        read_header(path)
    with pytest.raises(ModelError, match=r"parts; at most"):
        read_header(tmp_path / "a-00001-of-99999.gguf")


def test_a_tensor_without_values_is_refused(llama: Path, tmp_path: Path) -> None:
    data = bytearray(llama.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    data[at : at + 8] = bytes(8)
    (path := tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"token_embd\.weight has the shape \[96, 0\]"):
        read_header(path)


def test_a_step_that_is_no_number_is_no_warning(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 1}
    path = write_gguf(oracle("llama", **sizes), tmp_path / "a.gguf", matrices=kind)  # of 8 rows, which no kernel takes
    place = read_header(path).tensors["blk.0.attn_k.weight"]
    data = bytearray(path.read_bytes())
    data[place.begin : place.begin + 34] = struct.pack("<e", math.inf) + bytes(32)
    path.write_bytes(data)
    assert read_gguf(path).take("model.layers.0.self_attn.k_proj.weight").isnan().any()


@pytest.mark.parametrize(("name", "what"), [("_MOST_TENSORS", "tensors"), ("_MOST_FIELDS", "fields")])
def test_counts_are_bounded(llama: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    monkeypatch.setattr(f"longspec.model.gguf.header.{name}", 3)
    with pytest.raises(ModelError, match=rf"it has \d+ {what}, and at most 3"):
        read_header(llama)


def test_a_header_is_bounded_however_long_its_file_is(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    listed = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 1 << 28)  # a list of 268 million empty strings
    with path.open("wb") as file:
        file.write(struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 0, 1) + listed)
        file.truncate(1 << 33)
    with pytest.raises(ModelError, match="doesn't fit"):
        read_header(path)


def test_gemma2_by_an_older_converter_has_llama_cpps_defaults(gemma2: Path) -> None:
    missing = {"sliding_window": None, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = Config.read(config_of(changed(gemma2, **missing)))
    assert config.windows == (4096, None, 4096, None)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert Config.read(config_of(changed(gemma2, sliding_window=0))).windows == (None,) * 4


@pytest.mark.parametrize(
    ("fields", "kind", "factor"),
    [
        ({}, "default", None),
        ({"llama.rope.scaling.factor": 4.0}, "linear", 4.0),  # a factor without a type
        ({"llama.rope.scale_linear": 4.0}, "linear", 4.0),  # its older name
        ({"llama.rope.scaling.factor": 0.0}, "default", None),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, "default", None),
    ],
)
def test_rope_by_an_older_converter(llama: Path, fields: dict[str, Any], kind: str, factor: float | None) -> None:
    config = Config.read(config_of(changed(llama, **fields)))
    assert config.context == 512, "a GGUF file says the lengthened context"
    assert config.ropes[0] is not None
    assert (config.ropes[0].kind, config.ropes[0].get("factor")) == (kind, factor)


def test_what_else_may_be_missing(llama: Path) -> None:
    names = ("head_count_kv", "key_length", "dimension_count", "freq_base")
    config = Config.read(config_of(changed(llama, **dict.fromkeys(names))))
    assert (config.key_heads, config.head_dim) == (6, 8)
    assert config.ropes[0] is not None
    assert (config.ropes[0].theta, config.ropes[0].dims) == (10_000.0, 8)


def test_sentencepiece_without_ids_begins_and_ends_as_llama_cpp_does() -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 3 + [-3.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    }
    assert build_tokenizer(fields).encode("a").ids == [1, 5]
    config = tokenizer_config_of(fields)
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
