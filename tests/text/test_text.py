"""Text against its oracles: the tokenizer's own decoder, transformers' templates, a scan by character."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from itertools import groupby
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from longspec.errors import ModelError, UsageError
from longspec.text.detokenizer import LONGEST_STOP, MOST_STOPS, StopFinder, TextStream, Transcript
from longspec.text.detokenizer import decode as text_of
from longspec.text.tokenizer import Vocabulary

_TEXT = ["the théâtre of wörds", "你好 世界 😀😀 and a  double   space", "\tdef f(x):\n    return x<1 � �"] * 3
_WORDS = ["▁", "▁▁", "▁the", "▁a", "th", "the", "a", "é", "世", "�", "\n", "<0x", "x", "▁word", "s"]
_CHATML = (
    "{{ bos_token }}{% for message in messages %}\n  {% if message.role == 'system' %}{% continue %}{% endif %}"
    "<|{{ message.role }}|>{% generation %}{{ message.content }}{% endgeneration %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{{ opening }}{% endif %}"
)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens(["<think>", "an added word"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _byte_fallback(decoder: Any = None) -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {word: 259 + i for i, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoder or decoders.Sequence(chain)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


_BYTE_LEVEL = Vocabulary(_byte_level(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, _CHATML)
_FALLBACK = Vocabulary(_byte_fallback(), {"bos_token": "<s>"})
_METASPACE = Vocabulary(_byte_fallback(decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])))
_SIZE = 3 + max(each.tokenizer.get_vocab_size() for each in (_BYTE_LEVEL, _FALLBACK))  # unknown tokens are silent
_TOKENS = st.lists(st.integers(0, _SIZE - 1), max_size=40)


def _pushes(vocabulary: Vocabulary, tokens: list[int]) -> str:
    stream = TextStream(vocabulary)
    return "".join(stream.push(token) for token in tokens)


def _id(vocabulary: Vocabulary, name: str) -> int:
    token = vocabulary.tokenizer.token_to_id(name)
    assert token is not None
    return token


def _mended(tokens: list[int]) -> list[int]:
    """The tokens with each run of byte tokens spelling valid UTF-8: what is broken in it is a U+FFFD."""
    mended: list[int] = []
    audible = [token for token in tokens if 2 < token < 259 + len(_WORDS)]
    for is_byte, group in groupby(audible, lambda token: token < 259):
        run = list(group)
        text = bytes(token - 3 for token in run).decode(errors="replace") if is_byte else ""
        mended += [3 + byte for byte in text.encode()] if is_byte else run
    return mended


@settings(deadline=None)
@given(_TOKENS)
@example(_BYTE_LEVEL.encode("a<think>an added word", add_special=True))
def test_byte_level_stream_is_the_tokenizers_own_text(tokens: list[int]) -> None:
    decode = _BYTE_LEVEL.tokenizer.decode
    for end in range(len(tokens) + 1):
        shown = _pushes(_BYTE_LEVEL, tokens[:end])
        assert decode(tokens[:end]) in (shown, shown + "�")
    ascii_end = [*tokens, *_BYTE_LEVEL.encode("a", add_special=False)]
    assert _pushes(_BYTE_LEVEL, ascii_end) == decode(ascii_end) == text_of(_BYTE_LEVEL, ascii_end)


@settings(deadline=None)
@given(st.lists(st.integers(0x80, 0xFF) | st.integers(0, 0x7F), max_size=30))
@example([0xED, 0xA0, 0x80])
@example([0xF4, 0x90, 0xF0, 0x80, 0xE0, 0x80, 0xC0, 0xC2])
def test_any_bytes_decode_as_the_tokenizer_decodes_them(data: list[int]) -> None:
    spelled = [_id(_BYTE_LEVEL, letter) for letter in _letters(data)]
    for end in range(len(data) + 1):
        shown = _pushes(_BYTE_LEVEL, spelled[:end])
        assert _BYTE_LEVEL.tokenizer.decode(spelled[:end]) in (shown, shown + "�")
    assert _pushes(_BYTE_LEVEL, [*spelled, 65]) == _BYTE_LEVEL.tokenizer.decode([*spelled, 65])


def _letters(data: list[int]) -> list[str]:
    """GPT-2's letters of bytes, by asking the pre-tokenizer with text that holds them."""
    table: dict[int, str] = {}
    for start in (*range(0, 0x800, 16), *range(0x800, 0x110000, 0x800)):
        letters = "".join(chr(i) for i in range(start, start + 16) if not 0xD800 <= i < 0xE000)
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(letters)
        table |= dict(zip(letters.encode(), "".join(part for part, _ in split), strict=True))
    return [table.get(byte, chr(byte)) for byte in data]  # C0, C1 and F5 to FF stand in no text


@pytest.mark.parametrize("vocabulary", [_FALLBACK, _METASPACE], ids=["strip", "metaspace"])
@settings(deadline=None)
@given(tokens=_TOKENS)
@example(tokens=[3 + ord(" "), 3 + ord(" "), 3 + ord("a")])
def test_byte_fallback_stream_is_the_tokenizers_own_text(vocabulary: Vocabulary, tokens: list[int]) -> None:
    whole = [*tokens, _id(vocabulary, "s")]
    assert _pushes(vocabulary, whole) == vocabulary.tokenizer.decode(_mended(whole))
    shown = _pushes(vocabulary, tokens)
    assert vocabulary.tokenizer.decode(_mended(tokens)) in (shown, shown + "�")


@settings(deadline=None)
@given(_TOKENS)
def test_a_token_begins_at_the_character_that_holds_its_first_byte(tokens: list[int]) -> None:
    for vocabulary in (_BYTE_LEVEL, _FALLBACK):
        stream, data = TextStream(vocabulary), b""
        for i, token in enumerate(tokens):
            heard = [t for t in tokens[:i] if vocabulary.piece(t, first=True) is not None]
            piece = vocabulary.piece(token, first=not heard)
            stream.push(token)
            if piece:
                assert stream.begins[i] == len((data + piece[:1]).decode(errors="replace")) - 1
                data += piece
        assert len(stream.begins) == len(tokens)
        assert stream.begins == sorted(stream.begins)


def test_parts_of_one_character_begin_where_it_does() -> None:
    stream = TextStream(_FALLBACK)
    tokens = [3 + byte for byte in "é😀".encode()] + [_id(_FALLBACK, "x")]
    assert [stream.push(token) for token in tokens] == ["", "é", "", "", "", "😀", "x"]
    assert stream.begins == [0, 0, 1, 1, 1, 1, 2]
    stream = TextStream(_FALLBACK)
    assert [stream.push(token) for token in (3 + 0xF0, tokens[-1])] == ["", "�x"]
    assert stream.begins == [0, 1]


def test_a_model_that_writes_the_replacement_character_does_not_stall() -> None:
    for vocabulary in (_BYTE_LEVEL, _FALLBACK):
        tokens = vocabulary.tokenizer.encode("�" * 3, add_special_tokens=False).ids
        stream = TextStream(vocabulary)
        assert "".join(stream.push(token) for token in tokens).strip() == "�" * 3
    stream = TextStream(_FALLBACK)
    assert "".join(stream.push(3 + 0x80) for _ in range(100)) == "�" * 100


def test_word_boundaries_are_kept_and_the_first_space_is_not_a_word_boundary() -> None:
    the, word, special = (_id(_FALLBACK, name) for name in ("▁the", "▁word", "<s>"))
    assert _pushes(_FALLBACK, [the, word, special, word]) == "the word word"
    assert _pushes(_FALLBACK, [special, the, special, word]) == "the word"


def test_a_push_costs_the_same_in_a_long_text() -> None:
    sizes = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(_FALLBACK.tokenizer, name)

        def decode(self, tokens: list[int]) -> str:
            sizes.append(len(tokens))
            return _FALLBACK.tokenizer.decode(tokens)

    vocabulary = Vocabulary(cast(Tokenizer, Counting()))
    draw = random.Random(0)
    stream = TextStream(vocabulary)
    for _ in range(2000):
        stream.push(draw.randrange(_SIZE))
    assert max(sizes) <= 2
    assert len(sizes) <= 2000 + 300


def _scan(text: str, stops: list[str]) -> int | None:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_finder_is_a_scan_after_every_character(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    for cut in (pieces, list(text), [text]):
        finder, shown, given_so_far = StopFinder(stops), "", 0
        for piece in cut:
            shown += finder.push(piece)
            given_so_far += len(piece)
            held = text[len(shown) : given_so_far]
            if finder.found is None:  # no more is held back than some stop string could still need
                assert not held or any(stop.startswith(held) for stop in stops)
        found = _scan(text, stops)
        assert finder.found == found
        assert shown + finder.close() == text[:found]


def test_the_stop_string_that_ends_first_wins_and_the_longest_of_those() -> None:
    for stops, end in ((["abcd", "bc"], 1), (["bcd", "abcd"], 0), (["cd", "abcde"], 2)):
        finder = StopFinder(stops)
        assert finder.push("abcde") == "abcde"[:end]
        assert finder.found == end
    with pytest.raises(UsageError, match="empty"):
        StopFinder(["a", ""])


def test_stop_strings_cost_what_they_are_long() -> None:
    text = "ab" * (LONGEST_STOP // 2)
    tracemalloc.start()
    finder = StopFinder([f"{i}{text}"[:LONGEST_STOP] for i in range(MOST_STOPS)])
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < 20 * MOST_STOPS * LONGEST_STOP
    assert finder.push("x" * 100_000 + "7" + text) == "x" * 100_000
    for stops in (["a" * 60_000], [f"{i:03}" for i in range(MOST_STOPS + 1)]):
        with pytest.raises(UsageError, match=f"{MOST_STOPS} of {LONGEST_STOP:,} are the most"):
            StopFinder(stops)


@settings(deadline=None)
@given(_TOKENS, st.lists(st.text("aeht 世<", min_size=1, max_size=3), max_size=2))
def test_transcript_keeps_the_tokens_that_begin_before_the_stop(tokens: list[int], stops: list[str]) -> None:
    for vocabulary in (_BYTE_LEVEL, _FALLBACK):
        stream = TextStream(vocabulary)
        whole = "".join(stream.push(token) for token in tokens)
        found = _scan(whole, stops)
        transcript = Transcript(vocabulary, stops)
        text = "".join(transcript.push(token) for token in tokens)
        assert transcript.stopped == (found is not None)
        assert text + transcript.close() == whole[:found]
        if found is None:
            assert transcript.kept == len(tokens)
        else:
            assert transcript.kept == sum(begin < found for begin in stream.begins)
            assert text_of(vocabulary, tokens[: transcript.kept]).startswith(whole[: max(found - 1, 0)])


def test_encode_adds_the_first_token_to_plain_text_only() -> None:
    chat = _BYTE_LEVEL.chat([{"role": "user", "content": "a"}])
    assert _BYTE_LEVEL.encode("the", add_special=True)[0] == 0
    assert _BYTE_LEVEL.encode(chat, add_special=False).count(0) == 1
    assert _BYTE_LEVEL.id_of("eos_token") == 1
    assert _BYTE_LEVEL.id_of("pad_token") is None
    with pytest.raises(UsageError, match="Character 1 "):
        _BYTE_LEVEL.encode("a\ud800", add_special=False)


def test_special_tokens_of_the_configuration_are_silent_and_add_no_rows() -> None:
    tokenizer = _byte_fallback()
    size = tokenizer.get_vocab_size()
    tokenizer.enable_truncation(2)
    vocabulary = Vocabulary(tokenizer, {"eos_token": {"content": "▁word", "lstrip": False}, "pad_token": "<new>"})
    assert tokenizer.get_vocab_size() == size
    assert text_of(vocabulary, [vocabulary.id_of("eos_token") or 0, 265]) == tokenizer.decode([265])
    assert len(vocabulary.encode("a" * 9, add_special=False)) > 2
    with pytest.raises(ModelError, match="pad_token is 5"):
        Vocabulary(tokenizer, {"pad_token": 5})


def test_chat_is_what_transformers_renders() -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = cast(Any, PreTrainedTokenizerFast)(tokenizer_object=_byte_level(), bos_token="<s>", eos_token="</s>")
    messages = [{"role": r, "content": c} for r, c in (("system", "x"), ("user", " <é> 'q' "), ("assistant", "yes"))]
    tools = [{"name": "f<é>", "parameters": {"b": 1, "a": None}}]
    for prompt in (True, False):
        ours = _BYTE_LEVEL.chat(messages, tools=tools, add_generation_prompt=prompt, opening="<think>")
        theirs = oracle.apply_chat_template(
            messages,
            chat_template=_CHATML,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            opening="<think>",
        )
        assert ours == theirs
        assert _BYTE_LEVEL.encode(ours, add_special=False) == oracle(ours, add_special_tokens=False)["input_ids"]
    for special in (True, False):
        text = "the <think> théâtre 😀"
        tokens = oracle(text, add_special_tokens=special)["input_ids"]
        assert _BYTE_LEVEL.encode(text, add_special=special) == tokens
        assert text_of(_BYTE_LEVEL, tokens) == oracle.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('Roles must alternate.\nReally.') }}", r"\(Roles must alternate\)"),
        ("{% if %}", "failed"),
        ("{{ messages[3].content }}", "has no element 3"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|safe"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str | None, said: str) -> None:
    vocabulary = Vocabulary(_BYTE_LEVEL.tokenizer, template=template)
    with pytest.raises(UsageError, match=said) as caught:
        vocabulary.chat([{"role": "user", "content": "a"}])
    assert "\n" not in str(caught.value)


def test_templates_know_the_date_and_leave_html_alone() -> None:
    def render(template: str) -> str:
        return Vocabulary(_BYTE_LEVEL.tokenizer, template=template).chat([])

    assert render("{{ strftime_now('%Y') }}").isdigit()
    assert render("{{ '<é&>' | tojson }}") == '"<é&>"'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}") == "21"


def test_text_needs_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import longspec.text.tokenizer, sys; assert 'torch' not in sys.modules"], check=True
    )
