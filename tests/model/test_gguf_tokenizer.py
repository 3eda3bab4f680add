"""Tokenizers out of GGUF fields: how text is split, what is merged first, which tokens stay whole."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import oracle
from support.ggufs import write_gguf

from longspec.errors import ModelError
from longspec.model.files.convert import write_texts
from longspec.model.gguf.file import read_gguf
from longspec.model.gguf.tokenizer import build_tokenizer, tokenizer_config_of

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'.,Ġ"


def byte_level(pre: str | None, **fields: Any) -> dict[str, Any]:
    tokens = ["<s>", "<tool call>", *LETTERS, "th", "the"]
    kinds = [3, 4] + [1] * (len(tokens) - 2)
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 0,
        **named,
    }


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "In 2023, x12", ["In", "Ġ", "2", "0", "2", "3", ",", "Ġx", "1", "2"]),
        ("gpt-2", "I'LL we'll 12345  x", ["I", "'", "LL", "Ġwe", "'ll", "Ġ12345", "Ġ", "Ġx"]),
        ("llama-bpe", "I'LL 12345  x", ["I", "'LL", "Ġ", "123", "45", "Ġ", "Ġx"]),
        ("dbrx", "a12345.\n\n b", ["a", "123", "45", ".ĊĊ", "Ġb"]),
        ("qwen2", "I'LL 123  x", ["I", "'LL", "Ġ", "1", "2", "3", "Ġ", "Ġx"]),
        ("tekken", "camelCase don't 12", ["camel", "Case", "Ġdon", "'t", "Ġ", "1", "2"]),
        ("gpt-4o", "camelCase don't 1234/\n", ["camel", "Case", "Ġdon't", "Ġ", "123", "4", "/Ċ"]),
    ],
)
def test_each_pattern_splits_as_its_models_do(pre: str, text: str, pieces: list[str]) -> None:
    split = build_tokenizer(byte_level(pre)).pre_tokenizer
    assert split is not None
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("pre", ["made-up", "default", None])
def test_an_unknown_pattern_is_refused_by_name(pre: str | None) -> None:
    with pytest.raises(ModelError, match=rf"splits text by {pre!r} .* gpt-2, olmo, smollm"):
        build_tokenizer(byte_level(pre))


def test_named_tokens_stay_whole_and_come_back() -> None:
    tokenizer = build_tokenizer(byte_level("smollm"))
    encoded = tokenizer.encode("a<s>the<tool call>b")
    assert encoded.tokens == ["a", "<s>", "the", "<tool call>", "b"]
    assert tokenizer.decode(encoded.ids) == "athe<tool call>b"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "a<s>the<tool call>b"
    assert tokenizer.get_vocab_size() == len(byte_level("smollm")["tokenizer.ggml.tokens"])


def test_qwen_composes_letters() -> None:
    normalizer = build_tokenizer(byte_level("qwen2")).normalizer
    assert normalizer is not None
    assert normalizer.normalize_str("e\u0301") == "\u00e9"


@pytest.mark.parametrize(
    ("pre", "said", "begins"),
    [("smollm", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", True, True)],
)
def test_texts_begin_as_the_file_says(pre: str, said: bool | None, begins: bool) -> None:
    fields = byte_level(pre) if said is None else byte_level(pre, add_bos_token=said)
    tokenizer = build_tokenizer(fields)
    assert tokenizer.encode("the").tokens == (["<s>", "the"] if begins else ["the"])
    assert tokenizer.encode("the", add_special_tokens=False).tokens == ["the"]
    assert tokenizer_config_of(fields)["add_bos_token"] is begins


def test_the_config_names_its_tokens() -> None:
    fields = byte_level("smollm", eos_token_id=2, padding_token_id=0) | {"tokenizer.chat_template": "{{ x }}"}
    assert tokenizer_config_of(fields) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "a",
        "pad_token": "<s>",
        "chat_template": "{{ x }}",
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.model": ["gpt2"]}, r"\['gpt2'\]"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, r"\['gpt-2'\]"),
        ({"tokenizer.ggml.tokens": None}, "no list of tokens"),
        ({"tokenizer.ggml.tokens": []}, "no list of tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
        ({"tokenizer.ggml.token_type": [1]}, "not as many token types"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "two tokens each"),
        ({"tokenizer.ggml.merges": None}, "no list of merges"),
        ({"tokenizer.ggml.merges": ["é x"]}, "can't|No tokenizer"),
        ({"tokenizer.ggml.token_type": [{}] * 300}, "not as many|No tokenizer"),
        ({"tokenizer.ggml.bos_token_id": 10_000, "tokenizer.ggml.add_bos_token": True}, "number 10000"),
        ({"tokenizer.ggml.model": "llama"}, "no score"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        build_tokenizer(byte_level("smollm") | fields)


def sentencepiece(pieces: dict[str, float], **fields: Any) -> dict[str, Any]:
    control = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*control, *fallback, *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(pieces)) + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }


def naive(text: str, pieces: dict[str, float]) -> list[str]:
    """Sentencepiece's algorithm as it is told: join the neighbours that make the best piece, until none do."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(pieces[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]
        if not joins:
            return symbols
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.mark.parametrize("seed", range(20))
def test_sentencepiece_joins_the_best_piece_first(seed: int) -> None:
    chance = random.Random(seed)
    pieces = {letter: -1000.0 - i for i, letter in enumerate("▁abc")}
    while len(pieces) < 60:
        longer = "".join(chance.choices(list(pieces), k=2))
        if len(longer) < 8:
            pieces.setdefault(longer, -chance.random())
    tokenizer = build_tokenizer(sentencepiece(pieces))
    for _ in range(20):
        text = "".join(chance.choices("aabbc ", k=25))
        assert tokenizer.encode(text, add_special_tokens=False).tokens == naive(text, pieces)


def test_sentencepiece_spells_out_what_it_does_not_know() -> None:
    pieces = {"▁": -3.0, "a": -4.0, "▁a": -1.0}
    tokenizer = build_tokenizer(sentencepiece(pieces))
    encoded = tokenizer.encode("a é")
    assert encoded.tokens == ["<s>", "▁a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "a é"
    unprefixed = build_tokenizer(sentencepiece(pieces, add_space_prefix=False, add_bos_token=False))
    assert unprefixed.encode("a a").tokens == ["a", "▁a"]
    assert unprefixed.decode(unprefixed.encode(" a").ids) == " a"


@pytest.mark.parametrize("begins", [False, True])
def test_transformers_reads_the_same_from_a_folder(tmp_path: Path, begins: bool) -> None:
    from transformers import AutoTokenizer

    path = write_gguf(oracle("llama"), tmp_path / "a.gguf", lambda writer: writer.add_add_bos_token(begins))
    file = read_gguf(path)
    write_texts(file, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), file.tokenizer()
    for text in ("In 2023, 12345 than the cats", "a<|im_end|>b", "  two  spaces"):
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, add_special_tokens=False).ids
    assert theirs.eos_token == "<|im_end|>"
