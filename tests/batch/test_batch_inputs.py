"""What a batch reads: every format, every bad line, with each line's outcome; and the set of ids that it keeps."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from longspec.batch.inputs import open_input
from longspec.batch.lines import Line, names, read_lines
from longspec.batch.marks import Marks, fresh, mark_id, mark_index
from longspec.batch.records import past
from longspec.batch.requests import Fault, Item, over, request
from longspec.batch.template import Template
from longspec.errors import UsageError
from longspec.requests.openai import CHAT, COMPLETIONS


def read(path: Path, data: bytes | str, **options: Any) -> list[Item | Fault]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return given(str(path), **options)


def given(*names: str, **options: Any) -> list[Item | Fault]:
    with open_input(names, **options) as source:
        return list(source.records)


def items(records: list[Item | Fault]) -> list[tuple[Any, ...]]:
    assert all(isinstance(record, Item) for record in records), records
    return [(each.index, each.id, each.prompt) for each in records if isinstance(each, Item)]


def faults(records: list[Item | Fault]) -> list[str]:
    return [record.reason for record in records if isinstance(record, Fault)]


# --- lines


def test_lines_are_bounded_and_counted() -> None:
    data = b"\xef\xbb\xbfone\r\n" + b"x" * 20 + b"\n" + b"y" * 10 + b"\n\xff\n\n" + b"z" * 11 + b"\nlast"
    lines = list(read_lines(BytesIO(data), most=10))
    assert [line.number for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line.text for line in lines] == ["one", "", "y" * 10, "\ufffd", "", "", "last"]
    assert [line.fault is None for line in lines] == [True, False, True, False, True, False, True]
    assert lines[4].is_blank
    assert not lines[1].is_blank
    assert "byte 0 is 0xff" in str(lines[3].fault)


def test_a_line_of_any_length_takes_little_memory() -> None:
    class Endless(BytesIO):
        left = 3000

        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size <= 1 << 24
            self.left -= 1
            return b"x" * min(size, 1 << 16) if self.left > 0 else b"\n" if self.left == 0 else b""

    [line] = read_lines(Endless(), most=1000)
    assert "more than 1,000 bytes" in str(line.fault)


def test_a_nul_is_no_text() -> None:
    [line] = read_lines(BytesIO(b"a\0b\n"))
    assert "character 1 is NUL" in str(line.fault)


@pytest.mark.parametrize(("end", "data"), [(b"\0", b"a\nb\0\0c"), (b"\n", b"a b\n\nc\n")])
def test_names_end_as_they_are_said_to(end: bytes, data: bytes) -> None:
    assert list(names(BytesIO(data), end)) == [each for each in data.split(end) if each]
    with pytest.raises(ValueError, match="more than 65,536 bytes"):
        list(names(BytesIO(b"x" * 200_000), end))


# --- formats


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "temperature": 1, "stop": "x", "seed": 3, "extra": 1},
        {"id": "b", "messages": [{"role": "user", "content": "hi"}], "max_new_tokens": 5, "top_p": None},
        {"id": 0, "prompt": "two", "raw": True},
    ]
    text = "\ufeff" + "\n  \n".join(json.dumps(line) for line in lines)
    records = read(tmp_path / "in.jsonl", text)
    assert items(records) == [(0, 1, "one"), (1, "b", [{"role": "user", "content": "hi"}]), (2, 0, "two")]
    first, second, third = (record for record in records if isinstance(record, Item))
    assert first.options == {"temperature": 1.0, "stop": ["x"], "seed": 3}
    assert first.unknown == ("extra",)
    assert second.options == {"max_new_tokens": 5}
    assert third.options == {"raw": True}
    assert read(tmp_path / "anything", text) == records  # told by its first line
    with open_input([str(tmp_path / "in.jsonl")]) as source:
        assert source.count == 5


BAD_LINES = [
    (b"nonsense", "isn't JSON"),
    (b"[1]", "it is [1]; it must be an object"),
    (b"{}", "either 'prompt' or 'messages'"),
    (b'{"prompt": "a", "messages": ["b"]}', "either 'prompt' or 'messages'"),
    (b'{"prompt": " "}', "'prompt' is empty"),
    (b'{"prompt": 5}', "prompt is 5; it must be a text"),
    (b'{"messages": "hi"}', 'messages is "hi"; it must be a list'),
    (b'{"messages": []}', "messages is empty"),
    (b'{"messages": [{"role": "user"}]}', "messages[0].content is null"),
    (b'{"messages": [{"content": "x"}]}', "messages[0].role is missing"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a list of parts of type text"),
    (b'{"prompt": "a", "id": 1.5}', "'id' is a number; it must be a text or a whole number"),
    (b'{"prompt": "a", "id": [1]}', "'id' is a list"),
    (b'{"prompt": "a", "id": true}', "'id' is true or false"),
    (b'{"prompt": "a", "id": "' + b"x" * 1001 + b'"}', "more than 1,000 characters"),
    (b'{"prompt": "a", "id": "\\ud800"}', "lone surrogate"),
    (b'{"prompt": "a", "max_new_tokens": "5"}', 'max_new_tokens is "5"; it must be a whole number'),
    (b'{"prompt": "a", "max_new_tokens": 5.5}', "max_new_tokens is 5.5; it must be a whole number"),
    (b'{"prompt": "a", "temperature": true}', "temperature is true; it must be a number"),
    (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "it must be a number"),
    (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "isn't JSON"),
    (b'{"prompt": "a", "stop": [1]}', "stop is [1]; it must be a text, or a list of texts"),
    (b'{"prompt": "a", "system": 1}', "system is 1"),
    (b'{"prompt": "a", "raw": 1}', "raw is 1; it must be true or false"),
    (b'{"prompt": "a", "raw": true, "system": "b"}', "'system' contradicts 'raw'"),
    (b'{"messages": [{"role": "user", "content": "a"}], "raw": true}', "'raw' sends a text without roles"),
    (b'{"messages": [{"role": "system", "content": "a"}], "system": "b"}', "'system' contradicts"),
    (b'{"prompt": "\xff"}', "isn't UTF-8: byte 12"),
    (b'{"prompt": "\0"}', "is NUL"),
    (b"[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_a_bad_line_is_a_fault_and_the_next_one_is_read(tmp_path: Path, line: bytes, said: str) -> None:
    records = read(tmp_path / "in.jsonl", line + b'\n{"prompt": "good"}\n')
    assert len(records) == 2
    assert said in faults(records)[0]
    assert records[1] == Item(1, 2, "good", {})


def test_a_long_line_is_a_fault(tmp_path: Path) -> None:
    records = read(tmp_path / "in.jsonl", b'{"prompt": "' + b"x" * 10_000_000 + b'"}\n{"prompt": "good"}')
    assert "more than 10,000,000 bytes" in faults(records)[0]
    assert records[1] == Item(1, 2, "good", {})


def test_tables(tmp_path: Path) -> None:
    table = 'id,text,label\na,"one, ""two""\nthree",x\n\n,four,y\nshort\n"bad"quote,a,b\nlast,\xff,z\ne,five,y\n'
    records = read(tmp_path / "in.csv", table.encode("latin-1"), template="Say {text} {{{label}}}")
    assert records[0] == Item(0, "a", 'Say one, "two"\nthree {x}', {})
    assert records[1] == Item(1, 2, "Say four {y}", {})
    assert [record.index for record in records] == [0, 1, 2, 3, 4, 5]
    assert records[5] == Item(5, "e", "Say five {y}", {})
    said = faults(records)
    assert "row 3 has 1 fields, and the header has 3" in said[0]
    assert "expected" in said[1]
    assert "isn't UTF-8" in said[2]
    assert items(read(tmp_path / "in.tsv", "prompt\tid\na, b\t7\n")) == [(0, "7", "a, b")]
    with pytest.raises(UsageError, match="has no 'body'; it has: label, text"):
        read(tmp_path / "in.csv", "text,label\n", template="{body}")
    with pytest.raises(UsageError, match="has no 'prompt'"):
        read(tmp_path / "in.csv", "text,label\n")
    with pytest.raises(UsageError, match="has no 'prompt'; it has: nothing"):
        read(tmp_path / "in.csv", "")


def test_an_open_quote_costs_no_more_than_its_table(tmp_path: Path) -> None:
    records = read(tmp_path / "in.csv", 'prompt\n"open\n' + "row\n" * 10)
    assert len(records) == 1


def test_lines_and_files(tmp_path: Path) -> None:
    assert items(read(tmp_path / "in.txt", "one\r\n\n two \n")) == [(0, 1, "one"), (1, 3, " two ")]
    records = read(tmp_path / "in.txt", "one\n\xff", template="<{text}>")
    assert items(records) == [(0, 1, "<one>"), (1, 2, "<ÿ>")]
    (tmp_path / "a.md").write_text("alpha\n\n")
    (tmp_path / "b.md").write_bytes(b"\xff")
    paths = [str(tmp_path / name) for name in ("a.md", "b.md", "none.md", ".")]
    records = given(*paths, template="{path}: {text}")
    assert records[0] == Item(0, paths[0], f"{paths[0]}: alpha", {})
    assert ["UTF-8" in faults(records)[0], "No such file" in faults(records)[1]] == [True, True]
    assert "Is a directory" in faults(records)[2]
    assert [record.id for record in records] == paths
    names = tmp_path / "list"
    names.write_text(f"{paths[0]}\n\n{paths[1]}\n")
    assert given(files_from=str(names))[0] == Item(0, paths[0], "alpha", {})
    names.write_bytes(os.fsencode(f"{paths[0]}\0{paths[1]}"))
    assert len(given(files_from=str(names), null=True)) == 2


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ([], {}, "There is no input"),
        (["none"], {}, "none can't be read: No such file"),
        (["{here}"], {}, "can't be read: Is a directory"),
        (["{here}/x.md"], {}, "say --format files or --format lines"),
        (["{here}/x.md"], {"form": "xml"}, "The format 'xml' is not known"),
        (["{here}/x.md", "b.jsonl"], {}, "join such files"),
        (["{here}/x.md", "b.md"], {"form": "lines"}, "for one input, and there are 2"),
        (["{here}/x.md"], {"files_from": "-"}, "leave IN and --format out"),
        (["{here}/x.md"], {"null": True}, "give --files-from too"),
        (["{here}/x.md"], {"form": "lines", "template": "{a"}, "can't be read"),
        (["{here}/x.md"], {"form": "lines", "template": "{}"}, "empty braces"),
        (["{here}/x.md"], {"form": "lines", "template": "{body}"}, "a line has no 'body'"),
        (["{here}/x.md"], {"form": "openai", "template": "{text}"}, "leave --template out"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path: Path, inputs: list[str], options: dict[str, Any], said: str) -> None:
    (tmp_path / "x.md").write_text("text\n")
    with pytest.raises(UsageError) as error:
        given(*(name.replace("{here}", str(tmp_path)) for name in inputs), **options)
    assert said in str(error.value)


def test_a_template_evaluates_nothing() -> None:
    assert Template("{text.__class__}: {a b} {n!r} {x:>9}").fill(
        {"text.__class__": "plain", "a b": 1, "n!r": 2.5, "x:>9": "y"}
    ) == ("plain: 1 2.5 y")
    for field in ("text.__class__", "text[0]", "text"):
        with pytest.raises(ValueError, match="is not there"):
            Template(f"{{{field}}}").fill({"other": "x"})
    with pytest.raises(ValueError, match="neither text nor number"):
        Template("{text}").fill({"text": []})


def test_a_template_over_objects(tmp_path: Path) -> None:
    records = read(tmp_path / "in.jsonl", '{"question": "why", "n": 2}\n{"id": 5}\n', template="{question}? {n}")
    assert records[0] == Item(0, 1, "why? 2", {})
    assert records[1] == Fault(1, 5, "the template names 'question', which is not there")


# --- OpenAI's format


def openai(url: str = CHAT, **body: Any) -> str:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    whole = {"model": "m", **(prompt if url == CHAT else {"prompt": "hi"}), **body}
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": whole})


def test_openai(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    asked = openai(max_tokens=7, temperature=0, top_p=1, n=1, stream=False, user="me", seed=4, stop=["x"], tools=None)
    [record] = read(path, asked)
    assert record == Item(
        0,
        "a",
        [{"role": "user", "content": "hi"}],
        {"max_new_tokens": 7, "temperature": 0.0, "seed": 4, "stop": ["x"]},
        CHAT,
    )
    assert read(path, openai(COMPLETIONS)) == [Item(0, "a", "hi", {"raw": True}, COMPLETIONS)]
    with open_input([str(path)]) as source:
        assert source.format == "openai"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (openai(n=2), "n and prompts at one"),
        (openai(stream=True), "leave stream out"),
        (openai(tools=[{}]), "tools[0].type is missing"),
        (openai(response_format={"type": "yaml"}), 'response_format.type is "yaml"'),
        (openai(verbosity="low"), "verbosity isn't supported"),
        (openai(COMPLETIONS, prompt="a", reasoning_effort="low"), "reasoning_effort isn't supported"),
        (openai(reasoning_budget="low"), 'reasoning_budget is "low"'),
        (openai(max_tokens="5"), 'max_tokens is "5"'),
        (openai("/v1/embeddings"), "'url' must be"),
        (openai(messages=[{"role": "user", "content": None}]), "is null"),
        (openai(COMPLETIONS, prompt=["a", "b"]), "n and prompts at one"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": 5}', "'body' must be an object"),
        ('{"custom_id": "a", "method": "GET", "body": {}}', "'method' must be POST"),
        ('{"body": {}}', "'custom_id' is null"),
    ],
)
def test_a_bad_request_is_a_fault(tmp_path: Path, line: str, said: str) -> None:
    records = read(tmp_path / "in.jsonl", f"{line}\n{openai()}\n", form="openai")
    assert said in faults(records)[0]
    assert isinstance(records[1], Item)


# --- a record over the command


def test_a_record_goes_before_the_command() -> None:
    def told(fields: dict[str, Any], defaults: Any) -> dict[str, Any]:
        item = request(0, 1, {"prompt": "a", **fields})
        assert isinstance(item, Item)
        return {name: value for name, value in over(defaults, item).items() if name != "key"}

    assert told({"seed": 2}, {"seed": 1, "top_p": 0.5}) == {"seed": 2, "top_p": 0.5}
    assert told({"temperature": 0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 3}) == {"temperature": 0.0}
    assert told({"raw": True}, {"system": "s"}) == {"raw": True}
    assert told({"system": "t"}, {"raw": True}) == {"system": "t"}
    item = Item(0, 5, [{"role": "system", "content": "a"}], {})
    assert over({"system": "s", "raw": True, "seed": 1}, item) == {"seed": 1, "key": "5"}


# --- ids


def test_marks_are_a_set() -> None:
    marks, numbers, generator = Marks(), set(), random.Random(5)
    for _ in range(5000):
        number = generator.randrange(1, 1 << 64) if generator.random() < 0.7 else generator.randrange(1, 2000)
        assert (number in marks) == (number in numbers)
        assert marks.add(number) == (number not in numbers)
        numbers.add(number)
    assert len(marks) == len(numbers)
    assert all(number in marks for number in numbers)
    assert sys.getsizeof(marks._slots) < 22 * len(marks) + 200


def test_what_is_finished_is_left_out_and_ids_count_once() -> None:
    def records() -> Iterator[Item | Fault]:
        yield Item(0, "a", "x", {})
        yield Fault(1, None, "broken")
        yield Item(2, 5, "x", {})
        yield Item(3, "5", "x", {})
        yield Fault(4, "a", "wrong")

    first = list(fresh(records(), Marks()))
    assert [(record.index, isinstance(record, Fault)) for record in first] == [
        (0, False),
        (1, True),
        (2, False),
        (3, True),
        (4, True),
    ]
    duplicates = [record for record in first if isinstance(record, Fault) and record.code == "duplicate_id"]
    assert [record.index for record in duplicates] == [3, 4]
    finished = Marks()
    for mark in (mark_id("a"), mark_index(1), mark_index(3)):
        finished.add(mark)
    assert [record.index for record in fresh(records(), finished)] == [2, 4]


@pytest.mark.parametrize(
    "record",
    [{}, {"id": 1}, {"id": 1, "index": "0", "text": ""}, {"id": 1.5, "index": 0, "text": ""}, {"custom_id": "a"}],
)
def test_a_foreign_line_is_known(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        past(record)


def test_a_line_has_its_number() -> None:
    assert Line(3, " ").is_blank
