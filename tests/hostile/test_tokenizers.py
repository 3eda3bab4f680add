"""Parts of a tokenizer.json that fail, hang or grow: a sentence and the documented exit code, wherever they show it."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from support.commands import ROOT, inside, write_tiny

from longspec.errors import ModelError
from longspec.model.files.tokenizer_files import read_tokenizer
from longspec.text import tokenizer
from longspec.text.limits import MOST_SECONDS
from longspec.text.tokenizer import Vocabulary

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, " ": 3}, "merges": ["a b"]}
TABLE = base64.b64encode(struct.pack("<I", 64) + bytes(range(64)) + b"abc\0").decode()
LONG = base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"a" * 1000 + b"\0").decode()
THOUSAND = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
UNKNOWN = {"SpecialToken": {"id": "x", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(single: list[Any], ids: list[int]) -> dict[str, Any]:
    special = {"x": {"id": "x", "ids": ids, "tokens": ["a"] * len(ids)}} if ids else {}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


GROW: dict[str, dict[str, Any]] = {
    "three times a thousand": {"normalizer": {"type": "Sequence", "normalizers": [THOUSAND] * 3}},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [THOUSAND]}]}},
    "between any two letters": {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "a" * 99}},
    "by nothing": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 99}},
    "by a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG}},
    "in front": {"normalizer": {"type": "Prepend", "prepend": "a" * 99}},
    "bytes of bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}] * 9,
        }
    },
    "a token's text": {"decoder": {"type": "Sequence", "decoders": [THOUSAND] * 3}},
    "tokens": {"post_processor": template([UNKNOWN] * 40 + [TEXT], [0] * 40)},
}
FAIL: dict[str, dict[str, Any]] = {
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a table of elsewhere": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": TABLE}},
    "an endless expression": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False
        },
    },
    "pieces of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a token that isn't there": {"post_processor": template([UNKNOWN, TEXT], [])},
    "a second text": {"post_processor": template([UNKNOWN, {"Sequence": {"id": "B", "type_id": 0}}], [0])},
    "more than there is": {"decoder": {"type": "Strip", "content": "a", "start": 100, "stop": 100}},
    "no unknown word": {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}},
    "no unknown piece": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}},
    "a prefix longer than a token": {"model": BPE | {"continuing_subword_prefix": "aaaa"}},
}  # fmt: skip


def folder_of(folder: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": BPE, **changes}))
    return folder


@pytest.mark.parametrize("changes", GROW.values(), ids=GROW)
def test_what_grows_is_refused_before_it_reads_a_text(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(may make [\d,]+ letters of one|puts [\d,]+ tokens around)"):
        read_tokenizer(folder_of(tmp_path, changes), {})


@pytest.mark.parametrize("changes", FAIL.values(), ids=FAIL)
def test_what_fails_is_a_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    def use() -> None:
        made = Vocabulary(read_tokenizer(folder_of(tmp_path, changes), {}))
        made.encode("aab " + "a" * 40 + "b \u00e9", add_special=True)
        for token in range(3):
            made.piece(token, first=True)

    with pytest.raises(ModelError, match=r"tokenizer(\.json isn't a usable| can't be used: it fails)") as failed:
        use()
    assert "\n" not in str(failed.value)


def test_the_command_says_it_too(home: Path, tmp_path: Path) -> None:
    made = write_tiny(tmp_path / "tiny")
    for name in ("a table of elsewhere", "no unknown word", "pieces of nothing"):
        folder_of(made, FAIL[name])
        done = inside(["run", "--no-stdin", "-m", str(made), "--raw", "--max-new-tokens", "2", "a \u00e9"], home)
        assert (done.code, done.out) == (3, b""), done.err
        assert "The model's tokenizer can't be used: it fails" in done.err
        assert "Traceback" not in done.err


def test_a_tokenizer_that_never_comes_back_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place takes as many steps as the library lets it, and fails at none."""
    monkeypatch.setattr(tokenizer, "MOST_SECONDS", 0.1)
    slow = {"type": "Split", "pattern": {"Regex": r"(?:.|.|.|.){9}\d"}, "behavior": "Isolated", "invert": False}
    made = Vocabulary(read_tokenizer(folder_of(tmp_path, {"pre_tokenizer": slow}), {}))
    began = perf_counter()
    with pytest.raises(ModelError, match=r"takes more than \d+ seconds for 100 letters"):
        made.encode("ab" * 50, add_special=False)
    assert perf_counter() - began < MOST_SECONDS


def test_the_page_says_how_long() -> None:
    page = " ".join((ROOT / "docs" / "limits.md").read_text(encoding="utf-8").split())
    assert f"at most {MOST_SECONDS:g} seconds, and one more for each {tokenizer.LETTERS_PER_SECOND:,} letters" in page
