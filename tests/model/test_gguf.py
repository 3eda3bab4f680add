"""GGUF files against the transformers models that they were written from, and files that mustn't be believed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.checkpoints import FAMILIES, oracle
from support.ggufs import add_tokenizer, finish, write_gguf
from support.passes import feed

from longspec.cache import CACHES
from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.convert import converted
from longspec.model.files.hub import find
from longspec.model.gguf.file import read_gguf
from longspec.model.gguf.header import read_header
from longspec.model.load import end_tokens, open_model
from longspec.model.weights.read import Weights
from longspec.text.prompt import encode

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 7, "sliding_window": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: FAMILIES[name] for name in ("llama", "llama-tied-biased", "llama-linear", "llama-yarn", "llama-llama3")},
    **{name: FAMILIES[name] for name in ("qwen2", "qwen3", "smollm3", "phi3", "phi3-longrope", "olmo2")},
    "llama-as-meta": (
        "Llama",
        {"head_dim": 16, "max_position_embeddings": 32768, "rope_parameters": dict(_LLAMA3)},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma2": ("Gemma2", _GEMMA | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", _GEMMA | {"tie_word_embeddings": True}),
    "gemma4": FAMILIES["gemma4"],
    "gemma4-keys": FAMILIES["gemma4-keys"],
    "mixtral": FAMILIES["mixtral"],
    "olmoe": FAMILIES["olmoe"],
    "qwen3_moe": ("Qwen3Moe", FAMILIES["qwen3_moe"][1] | {"mlp_only_layers": None}),
    "qwen3_5": ("Qwen3_5", FAMILIES["qwen3_5"][1] | {"layer_types": None, "full_attention_interval": 4}),
}
TOKENS = torch.randint(3, 70, (1, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model, and the folder of its GGUF file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, request.param, MODELS[request.param])
        model = oracle(request.param)
    folder = tmp_path_factory.mktemp("pulled") / "model"
    folder.mkdir()
    write_gguf(model, folder / "source.gguf")
    return model, folder


def by_expert(name: str, tensor: torch.Tensor, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor under the names of a published checkpoint, which holds each expert's matrices by themselves."""
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    stem, _, matrix = name.rpartition(".experts.")
    if family == "mixtral":
        names = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
        stem, name = (each.replace("mlp", "block_sparse_moe") for each in (stem, name))
    if matrix not in names:
        yield name, tensor
        return
    for i, own in enumerate(tensor):
        for part, values in zip(names[matrix], own.chunk(len(names[matrix])), strict=True):
            yield f"{stem}.experts.{i}.{part}.weight", values


def test_tensors_come_back(pair: tuple[Any, Path]) -> None:
    model, folder = pair
    family, held = model.config.model_type, model.state_dict()
    state = dict(each for name, tensor in held.items() for each in by_expert(name, tensor, family))
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    file = read_gguf(folder / "source.gguf")
    seen = dict(file.tensors())
    assert seen.keys() == state.keys() == set(file.names)
    # (w + 1) - 1, and log exp w
    rounding = 1e-6 if model.config.model_type.startswith(("gemma", "qwen3_5")) else 0.0
    for name, tensor in seen.items():
        assert file.shape(name) == tuple(tensor.shape)
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=rounding)


def test_a_converted_folder_is_the_same_model_to_transformers(pair: tuple[Any, Path]) -> None:
    import transformers

    model, folder = pair
    folder = converted(folder, torch.float32)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(other) is type(model) or model.config.model_type == "mistral"
    with torch.inference_mode():
        torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=2e-5)


def test_our_decoder_reads_it_without_a_folder(pair: tuple[Any, Path]) -> None:
    model, folder = pair
    path = folder / "source.gguf"
    decoder = Decoder(
        Config.read(read_gguf(path).config()), Weights.of_gguf(read_gguf(path), torch.float32), torch.device("cpu")
    )
    with torch.inference_mode():
        _, logits = feed(decoder, CACHES["dense"](decoder.shape), TOKENS[0].tolist())
        torch.testing.assert_close(logits, model(TOKENS).logits[0], rtol=0, atol=1e-4)


def test_value_heads_are_read_in_the_files_order(tmp_path: Path) -> None:
    """Three to a key head, which llama.cpp's converter tiles; and a drafting head's block behind the layers."""
    model = oracle("qwen3_5-wide")

    def with_a_head(writer: gguf.GGUFWriter) -> None:
        writer.add_nextn_predict_layers(1)
        writer.add_tensor("blk.4.nextn.eh_proj.weight", np.zeros((48, 96), np.float32))

    file = read_gguf(write_gguf(model, tmp_path / "a.gguf", with_a_head, blocks=5))
    config = Config.read(file.config())
    decoder = Decoder(config, Weights.of_gguf(file, torch.float32), torch.device("cpu"))
    with torch.inference_mode():
        _, logits = feed(decoder, CACHES["dense"](decoder.shape), TOKENS[0].tolist())
        torch.testing.assert_close(logits, model(TOKENS).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("coded", [None, "Q8_0"])
def test_a_hybrids_experts_are_read(tmp_path: Path, coded: str | None) -> None:
    """With a shared expert, whose gate is a vector in the file; in codes of two formats to an expert."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    heads = {"num_attention_heads": 4, "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 16}
    model = oracle("qwen3_5_moe", **(sizes | heads if coded else {}))
    matrices = {"exps": gguf.GGMLQuantizationType.Q4_K, "down_exps": gguf.GGMLQuantizationType.Q6_K}
    kinds = {"down_exps": matrices["down_exps"], "exps": matrices["exps"]} if coded else {}
    file = read_gguf(write_gguf(model, tmp_path / "a.gguf", others=kinds))
    dtype = torch.bfloat16 if coded else torch.float32
    decoder = Decoder(Config.read(file.config()), Weights.of_gguf(file, dtype), torch.device("cpu"), coded=coded)
    if coded and decoder.slow is not None:
        pytest.skip(decoder.slow)
    assert {"Q4_K", "Q6_K"} <= decoder.formats.keys() or not coded
    with torch.inference_mode():
        state = {name: file.take(name) for name in file.names}
        exact = Decoder(Config.read(file.config()), Weights.of_tensors(state, torch.float32), torch.device("cpu"))
        _, logits = feed(decoder, CACHES["dense"](decoder.shape), TOKENS[0].tolist())
        _, wanted = feed(exact, CACHES["dense"](exact.shape), TOKENS[0].tolist())
        assert (logits - wanted).norm() < (0.1 if coded else 1e-5) * wanted.norm()
        if not coded:
            torch.testing.assert_close(logits, model(TOKENS).logits[0], rtol=0, atol=1e-4)


def test_llama3s_own_constants_are_recognized(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama-as-meta", MODELS["llama-as-meta"])
        path = write_gguf(oracle("llama-as-meta"), tmp_path / "a.gguf")
    config = read_gguf(path).config()
    assert config["rope_scaling"] | {"rope_theta": config["rope_theta"]} == _LLAMA3


def test_neighbours_are_read_as_one(pair: tuple[Any, Path]) -> None:
    _, folder = pair
    weights = Weights.of_folder(converted(folder, torch.float32), torch.float32)
    for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
        full = [f"model.layers.1.{name}.weight" for name in names]
        if all(name in weights for name in full):  # Phi-3's are one matrix already, and Gemma 4 may have no values
            assert weights.joined(full).data_ptr() == weights[full[0]].data_ptr()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_values_are_the_packages_dequantization(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((80, 64)).astype(np.float32)
    quantized = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    path = _one_tensor(tmp_path / "a.gguf", quantized, gguf.GGMLQuantizationType[kind])
    expected = torch.from_numpy(gguf.dequantize(quantized, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(read_gguf(path).take("model.embed_tokens.weight"), expected)
    weights = Weights.of_gguf(read_gguf(path), torch.bfloat16)
    assert torch.equal(weights["model.embed_tokens.weight"], expected.to(torch.bfloat16))


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    path = _one_tensor(tmp_path / "a.gguf", np.zeros((80, 64), np.int8), gguf.GGMLQuantizationType.I8)
    with pytest.raises(ModelError, match=r"token_embd\.weight as I8"):
        read_gguf(path).take("model.embed_tokens.weight")


def test_a_type_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = _one_tensor(tmp_path / "a.gguf", np.zeros((80, 64), np.float32))
    place = path.read_bytes().index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    _patch(path, place, struct.pack("<I", 255))
    with pytest.raises(ModelError, match=r"token_embd\.weight has the type 255"):
        read_gguf(path)


def test_a_truncated_file_says_what_is_missing(tmp_path: Path) -> None:
    path = _one_tensor(tmp_path / "a.gguf", np.zeros((80, 64), np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(ModelError, match=r"expected at least [\d,]+ bytes because of token_embd\.weight, found"):
        read_gguf(path)
    for length in (0, 3, 10, 23, 100, 400, 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="GGUF"):
            read_gguf(path)


@pytest.mark.parametrize("count", [2**62, 10**12, 10**6])
def test_a_lying_length_costs_nothing(tmp_path: Path, count: int) -> None:
    """The package's own reader would loop over it."""
    for code in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.INT32):
        field = struct.pack("<Q1sIIQ", 1, b"a", gguf.GGUFValueType.ARRAY, code, count)
        path = tmp_path / "a.gguf"
        path.write_bytes(struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 0, 1) + field + b"x" * 100)
        with pytest.raises(ModelError, match="usable GGUF file"):
            read_header(path)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"GGML" + bytes(40), "doesn't begin with GGUF"),
        (struct.pack("<IIQQ", gguf.GGUF_MAGIC, 1, 0, 0) + bytes(40), "version 1"),
        (struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 2**60, 0) + bytes(40), "0 dimensions"),
        (struct.pack("<IIQQQ1sI", gguf.GGUF_MAGIC, 3, 0, 1, 1, b"a", 77) + bytes(40), "type 77"),
        (struct.pack("<IIQQQ1s", gguf.GGUF_MAGIC, 3, 0, 1, 1, b"\xff") + bytes(40), "isn't UTF-8"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, head: bytes, said: str) -> None:
    (tmp_path / "a.gguf").write_bytes(head)
    with pytest.raises(ModelError, match=said):
        read_header(tmp_path / "a.gguf")


def test_the_header_is_the_packages_reading(tmp_path: Path) -> None:
    path = write_gguf(oracle("llama"), tmp_path / "a.gguf", lambda writer: writer.add_array("some.list", [1.5, 2.5]))
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert ours.fields == {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    for tensor in theirs.tensors:
        place = ours.tensors[tensor.name]
        assert (place.begin, place.nbytes, place.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert place.shape == tuple(tensor.shape.tolist()[::-1])


def test_a_split_file_is_one_model(tmp_path: Path) -> None:
    """By any of its parts; what lacks a part, or has a strange one, is refused."""
    model = oracle("llama")
    whole = read_gguf(write_gguf(model, tmp_path / "whole.gguf"))
    write_gguf(model, tmp_path / "tiny.gguf", split=6)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        found = read_gguf(part)
        assert found.names == whole.names
        assert found.config() == whole.config()
        assert found.nbytes == sum(path.stat().st_size for path in parts)
        assert all(torch.equal(found.take(name), whole.take(name)) for name in found.names)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelError, match=r"one part of a split GGUF, and its name doesn't end"):
        read_header(alone)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=r"doesn't say that it is part 2 of"):
        read_header(parts[0])
    parts[1].unlink()
    with pytest.raises(ModelError, match=rf"{parts[1].name} isn't beside it"):
        read_header(parts[0])


def test_a_file_is_known_by_its_beginning(tmp_path: Path) -> None:
    blob = write_gguf(oracle("llama"), tmp_path / "sha256-2af3b81862c6")
    assert find(str(blob)).gguf == blob


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("general.architecture", "mamba", "'mamba', which is not supported as GGUF; longspec reads llama, qwen2"),
        ("general.architecture", ["llama"], "not supported as GGUF"),
        ("llama.block_count", None, r"lacks the field llama\.block_count"),
        ("llama.attention.head_count", [6, 6], r"has the value \[6, 6\] in"),
        ("llama.embedding_length", 0, "where a size was expected"),
        ("llama.block_count", 2**31, r"2,147,483,648 layers"),
        ("llama.expert_count", 8, r"lacks the field llama\.expert_used_count"),
        ("general.architecture", "dbrx", "not supported as GGUF"),
        ("llama.rope.scaling.type", "dynamic", "'dynamic'"),
        ("llama.block_count", 3, r"holds the tensor blk\.3\.\S+, which llama models don't have"),
        ("llama.attention.head_count", 5, "48 rows for 5 heads"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, field: str, value: object, said: str) -> None:
    from longspec.model.gguf.file import GgufFile

    header = read_header(write_gguf(oracle("llama"), tmp_path / "a.gguf"))
    if value is None:
        del header.fields[field]
    else:
        header.fields[field] = value
    with pytest.raises(ModelError, match=said):
        GgufFile(header)


def test_turn_ends_join_the_end_of_text(tmp_path: Path) -> None:
    path = write_gguf(oracle("llama"), tmp_path / "a.gguf", lambda writer: writer.add_eot_token_id(9))
    file = read_gguf(path)
    assert file.generation_config() == {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0}
    assert file.config()["eos_token_id"] == [2, 9]
    json.dumps(file.config())


@pytest.mark.parametrize("kind", [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED])
def test_ends_are_known_by_name_and_role_whatever_their_type(tmp_path: Path, kind: gguf.TokenType) -> None:
    ends = ["<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]

    def change(writer: gguf.GGUFWriter) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        kinds = writer.kv_data[0]["tokenizer.ggml.token_type"].value
        for i, name in enumerate(ends, len(tokens) - len(ends)):
            tokens[0] = "[OTHER]"
            tokens[i], kinds[i] = name, kind
        writer.add_uint32("tokenizer.ggml.fim_sep_token_id", 5)

    opened = open_model(str(write_gguf(oracle("llama"), tmp_path / "a.gguf", change)))
    ids = [opened.vocabulary.tokenizer.token_to_id(name) for name in ends]
    found = end_tokens(opened.config, opened.checkpoint.generation_config(), opened.vocabulary)
    assert set(found) == {2, 5, *ids}
    assert [opened.vocabulary.piece(token, first=False) for token in ids if token is not None] == [None] * len(ends)
    assert opened.vocabulary.encode("".join(ends), add_special=False) == ids


@pytest.mark.parametrize("said", [True, False, None])
def test_a_chat_begins_as_the_file_says(tmp_path: Path, said: bool | None) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
        if said is not None:
            writer.add_add_bos_token(said)

    vocabulary = open_model(str(write_gguf(oracle("llama"), tmp_path / "a.gguf", change))).vocabulary
    assert encode(vocabulary, "abc").count(1) == bool(said)
    assert encode(vocabulary, "abc", raw=True).count(1) == bool(said)


def _one_tensor(path: Path, data: Any, kind: gguf.GGMLQuantizationType | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, 80)
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    finish(writer)
    return path


def _patch(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)
