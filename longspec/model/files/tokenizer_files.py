"""A folder's tokenizer: its tokenizer.json, or the older formats, and the tokens that its config adds.

Takes a folder; gives a `tokenizers.Tokenizer` with truncation and padding switched off. What stands in the file isn't
trusted: the library builds whatever it says, and three replacements of a letter by a thousand make a word 10^9 letters.
So what the parts of a tokenizer can make of a text is bounded here, as far as the parts themselves say it.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from longspec.errors import ModelError
from longspec.machine.files import read_bytes
from longspec.machine.schema import TABLE, check, mapped
from longspec.text.tokenizer import unusable

__all__ = ["MOST_ADDED", "MOST_GROWTH", "read_tokenizer"]

_MOST_TOKENIZER_NBYTES = 64 << 20  # Gemma 3's, of 262,000 tokens, has 33 MB
MOST_GROWTH = 64
"""Letters that a tokenizer may make of one, or of the text of a token: T5's table makes 18 of one."""
MOST_ADDED = 1024
"""Tokens that it may put around a text."""
_OLDER = ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_ADDED = {"added_tokens_decoder": mapped(TABLE)}


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder. config: the content of its tokenizer_config.json.

    Raises:
        ModelError: there is none, it can't be built, or it may make too much of a text.
    """
    path = folder / "tokenizer.json"
    tokenizer = _tokenizer(path) if path.is_file() else _through_transformers(folder)
    _check_growth(tokenizer, folder)
    _add_tokens(tokenizer, config)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_growth(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ModelError where its parts make too much of a text: see MOST_GROWTH and MOST_ADDED."""
    before, between, after, behind = (
        list(_parts(part)) for part in (
            tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder, tokenizer.post_processor
        )
    )  # fmt: skip
    grown = max(prod(map(_growth, parts)) for parts in ([*before, *between], after))
    if grown > MOST_GROWTH:
        raise ModelError(f"The tokenizer in {folder} may make {grown:,} letters of one; {MOST_GROWTH} are the most.")
    added = sum(_added(part) for part in behind)
    if added > MOST_ADDED:
        raise ModelError(f"The tokenizer in {folder} puts {added:,} tokens around a text; {MOST_ADDED:,} are the most.")
    if any(part["type"] == "Replace" and "Regex" in part["pattern"] for part in after):
        raise ModelError(f"The tokenizer in {folder} decodes by a regular expression, which isn't supported.")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, or those that a sequence of them has, as in the file."""
    if part is None:
        return
    rest = [json.loads(part.__getstate__())]
    while rest:
        one = rest.pop()
        if one["type"] == "Sequence":
            rest += next(value for value in one.values() if isinstance(value, list))
        else:
            yield one


def _growth(part: Mapping[str, Any]) -> int:
    """The most letters that a part makes of one, where it says so itself: Unicode's own forms do it once, at most."""
    match part["type"]:
        case "Replace":
            plain = part["pattern"].get("String")
            return max(1, -(-len(part["content"]) // len(plain))) if plain else 1 + len(part["content"])
        case "Prepend":
            return 1 + len(part["prepend"])
        case "Precompiled":
            blob = base64.b64decode(part["precompiled_charsmap"])
            (size,) = struct.unpack_from("<I", blob)
            return max(map(len, blob[4 + size :].decode(errors="replace").split("\0")))
        case "ByteLevel" | "BPEDecoder" | "WordPiece" | "CTC":  # a letter for a byte, or one between any two
            return 2
    return 1


def _added(part: Mapping[str, Any]) -> int:
    """The tokens that a post-processor puts around a text."""
    if part["type"] != "TemplateProcessing":
        return 2
    known = {name: len(each["ids"]) for name, each in part["special_tokens"].items()}
    return sum(known.get(piece["SpecialToken"]["id"], 0) for piece in part["single"] if "SpecialToken" in piece)


def _tokenizer(path: Path) -> Tokenizer:
    data = read_bytes(path, _MOST_TOKENIZER_NBYTES, "The model's file", error=ModelError)
    try:
        return Tokenizer.from_buffer(data)
    except BaseException as error:  # noqa: BLE001  passed on unless it is the library's
        unusable(error, f"{path} isn't a usable tokenizer")


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks, as transformers does.

    Raises:
        ModelError: one isn't a token with its content, or its number is another's.
    """
    check("The model's tokenizer_config.json", config, _ADDED, ModelError)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    numbered = {int(name): token for name, token in listed.items() if name.isdecimal() and len(name) < 10}
    behind, added = tokenizer.get_vocab_size(), dict[str, AddedToken]()
    for at, said in sorted(numbered.items()):
        text = said.get("content")
        if not isinstance(text, str) or not text:
            raise ModelError(f"The model's tokenizer_config.json names no content for its token {at}.")
        if text in known:
            continue
        found = tokenizer.token_to_id(text)
        if text in added or (behind if found is None else found) != at:
            raise ModelError(
                f"The model's tokenizer_config.json has {text!r} as token {at}, which tokenizer.json lacks and has "
                "no place for: fetch both again."
            )
        how = {name: bool(said.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added[text] = AddedToken(text, **how)
        behind += found is None
    tokenizer.add_tokens([*added.values()])  # at once: each call reads all of them again


def _through_transformers(folder: Path) -> Tokenizer:
    """The tokenizer converted by transformers from the older formats (vocab.json and merges.txt, tokenizer.model)."""
    from transformers import AutoTokenizer

    for name in _OLDER:
        if (path := folder / name).exists():  # transformers reads them whole
            read_bytes(path, _MOST_TOKENIZER_NBYTES, "The model's file", error=ModelError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend: Tokenizer = tokenizer.backend_tokenizer
    except Exception as error:  # foreign files can raise anything
        raise ModelError(f"{folder} holds no usable tokenizer: add its tokenizer.json ({error}).") from error
    return backend
