"""The tokenizer of a GGUF file's fields, as a `tokenizers.Tokenizer`.

Takes the fields; knows no file and no model. There are two kinds: `gpt2`, byte-level BPE, with a pre-tokenizer
pattern that the file only names, and `llama`, sentencepiece's BPE, whose merges follow from the tokens' scores; in a
`gemma4` file it has the merges. An
unknown pattern is refused: another one would give other tokens without an error.

transformers has builders too; they are internal, moved between 5.17 and 5.23, and don't know `smollm` (the default
model's pattern, which splits digits), so that 12345 would become one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from longspec.errors import ModelError
from longspec.machine.schema import shown

__all__ = ["build_tokenizer", "tokenizer_config_of"]

_MOST_CUTS, _MOST_MERGES = 1 << 28, 1 << 21  # Gemma's 262,000 tokens have 2 * 10^7 and 5 * 10^5
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's for sentencepiece, where the file has none
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class _Split:
    """The pre-tokenizer of a byte-level tokenizer."""

    pattern: str | None = None  # None: GPT-2's
    digits: bool = False  # split digits, before the pattern
    composed: bool = False  # normalize to NFC first
    whole_words: bool = False  # a piece that is a token isn't merged from characters
    begins: bool = False  # default for prepending the bos token, where the file doesn't say


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_SPLITS = {
    "gpt-2": _Split(),
    "olmo": _Split(),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "refact": _Split(digits=True),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _Split(_LLAMA3, whole_words=True, begins=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Split(_LLAMA3)),  # Phi-4 and OLMo 2 among others
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _Split(_QWEN2, composed=True)),
    "qwen35": _Split(_QWEN35, composed=True),
    "tekken": _Split(rf"{_CASED % ('', '')}|\p{{N}}|{_REST}", whole_words=True, begins=True),
    "gpt-4o": _Split(rf"{_CASED % (_SUFFIX, _SUFFIX)}|\p{{N}}{{1,3}}|{_REST}"),
}
"""By `tokenizer.ggml.pre`. The patterns are those of the models' own tokenizer.json."""


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer. Raises ModelError where the kind or the pre-tokenizer isn't known, or the fields are
    inconsistent.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or not tokens:
        raise ModelError("The GGUF file holds no list of tokens, so it can't be used for text.")
    kinds = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"The GGUF file has {len(tokens):,} tokens, and not as many token types.")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise ModelError(
            f"The GGUF file's tokenizer kind {shown(kind)} is not supported; known are {', '.join(builders)}."
        )
    pairs = list(zip(tokens, kinds, strict=True))
    try:
        tokenizer = builders[kind](fields, tokens, kinds)
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, k in pairs if k == _CONTROL])
        named = [token for token, k in pairs if k == _USER_DEFINED and token]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in named])
        _add_ends(tokenizer, fields)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"No tokenizer can be built from the GGUF file's fields: {error}.") from error
    return tokenizer


def tokenizer_config_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json. The class is the one that takes tokenizer.json unchanged."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(fields, "bos"),
        "add_eos_token": _adds(fields, "eos"),
    }
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := _token(fields, field)) is not None:
            config[f"{name}_token"] = token
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _byte_level(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    split = _split(fields)
    tokenizer = Tokenizer(models.BPE(_vocabulary(tokens), _pairs(fields), ignore_merges=split.whole_words))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pairs(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges that a file lists."""
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or any(merge.count(" ") != 1 for merge in merges):
        raise ModelError("The GGUF file holds no list of merges of two tokens each, and its tokenizer needs one.")
    return [(left, right) for left, right in (merge.split(" ") for merge in merges)]


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    vocabulary, scores = _vocabulary(tokens), fields.get("tokenizer.ggml.scores")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    if fields.get("tokenizer.ggml.model") == "gemma4":
        merges = _pairs(fields)
    elif isinstance(scores, list) and len(scores) == len(tokens):
        merges = _merges(vocabulary, tokens, scores, kinds)
    else:
        raise ModelError("The GGUF file holds no score for each of its tokens, and its tokenizer needs them.")
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(prefixed))
    return tokenizer


def _merges(
    vocabulary: dict[str, int], tokens: list[str], scores: list[float], kinds: list[int]
) -> list[tuple[str, str]]:
    """The merges of a sentencepiece vocabulary: every pair of tokens that joins to a token, the best tokens first.

    Raises:
        ModelError: the tokens are so long, or so alike, that it would take minutes and gigabytes.
    """
    cuts = sum(len(token) ** 2 for token in tokens)  # letters of all halves
    merges: list[tuple[str, str]] = []
    ranked = sorted((i for i, kind in enumerate(kinds) if kind == _NORMAL), key=lambda i: -scores[i])
    for token in (tokens[i] for i in ranked):
        if cuts > _MOST_CUTS or len(merges) > _MOST_MERGES:
            raise ModelError("The GGUF file's tokens are too long, or join in too many ways, for a tokenizer's.")
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError("The GGUF file lists a token twice, so its tokenizer can't be rebuilt.")
    return vocabulary


def _split(fields: Mapping[str, Any]) -> _Split:
    name = fields.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _SPLITS:
        raise ModelError(
            f"The GGUF file splits text by {shown(name)} (tokenizer.ggml.pre), not by one of {', '.join(_SPLITS)}: "
            "use the model's Hugging Face folder, which has a tokenizer.json."
        )
    return _SPLITS[name]


def _adds(fields: Mapping[str, Any], which: str) -> bool:
    """Whether the bos or eos token is added; llama.cpp's defaults where the file doesn't say."""
    said = fields.get(f"tokenizer.ggml.add_{which}_token")
    if said is None and which == "bos":
        return fields.get("tokenizer.ggml.model") in ("llama", "gemma4") or _split(fields).begins
    return bool(said)


def _add_ends(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    ends = {which: _token(fields, which) for which in ("bos", "eos") if _adds(fields, which)}
    used = {which: token for which, token in ends.items() if token is not None}
    if used:
        single = [token for token in (used.get("bos"), "$A", used.get("eos")) if token is not None]
        identified = [(token, _index(fields, which)) for which, token in used.items()]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=identified)


def _index(fields: Mapping[str, Any], which: str) -> Any:
    """The id of a token by its role, as the file or llama.cpp has it; None where neither does."""
    index = fields.get(f"tokenizer.ggml.{which}_token_id")
    if index is None and fields.get("tokenizer.ggml.model") == "llama":
        index = _DEFAULT_IDS.get(which)
        return None if index is None or index >= len(fields.get("tokenizer.ggml.tokens") or ()) else index
    return index


def _token(fields: Mapping[str, Any], which: str) -> str | None:
    index, tokens = _index(fields, which), fields.get("tokenizer.ggml.tokens")
    if index is None:
        return None
    if type(index) is not int or not isinstance(tokens, list) or not 0 <= index < len(tokens):
        count = len(tokens) if isinstance(tokens, list) else 0
        raise ModelError(f"The GGUF file's {which} token is number {shown(index)} of {count:,}.")
    return str(tokens[index])
