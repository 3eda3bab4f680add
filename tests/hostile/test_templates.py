"""Chat templates from strangers: each is rendered within its limits, or refused in a sentence.

`templates` is a target of test_hostile_files.py, which tries thousands.
"""

from __future__ import annotations

import random
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from support.commands import ROOT
from support.hostile import Attempt

from longspec.errors import UsageError
from longspec.text import chat_template, limits, prompt_template
from longspec.text.chat_template import ChatTemplate
from longspec.text.detokenizer import LONGEST_STOP, MOST_STOPS
from longspec.text.prompt_template import parse

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>this</b>?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is bold.", "tool_calls": [{"name": "f", "n": 1.5}]},
    {"role": "user", "content": " And that? "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
DOUBLING = "{{% set ns = namespace(x={}) %}}{{% for i in range(99) %}}{{% set ns.x = {} %}}{{% endfor %}}{{{{ ns.x }}}}"

BOMBS = {
    "power": "{{ 10**10000000 }}",
    "product": "{{ 'a'*5000000000 }}",
    "product of a float": "{{ 'a'*5e9 }}",
    "list": "{{ messages*1000000000 }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "indent": "{{ 'a'|indent(5000000000, true) }}",
    "indent of JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "center": "{{ 'a'|center(5000000000) }}",
    "method": "{{ 'a'.ljust(5000000000) }}",
    "format": "{{ '{:>5000000000}'.format(1) }}",
    "format of a long text": "{{ '{' ~ ':' * 3000000 }}{{ ('{' ~ ':' * 3000000).format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 5000000000) }}",
    "percent": "{{ '%5000000000d' % 1 }}",
    "filter format": "{{ '%*d'|format(1000000000, 1) }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "replace": "{{ ('a'*100000)|replace('a', 'a'*100000) }}",
    "method replace": "{{ ('a'*100000).replace('a', 'a'*100000) }}",
    "join": "{{ ('a'*100000).join(['']*100000) }}",
    "round": "{{ 1.5|round(100000000, 'ceil') }}",
    "bytes": "{{ (1).to_bytes(100000000000, 'big') }}",
    "doubled": DOUBLING.format("'a'", "ns.x ~ ns.x"),
    "added": DOUBLING.format("'a'", "ns.x + ns.x"),
    "nested": DOUBLING.format("[1]", "[ns.x, ns.x]"),
    "nested tables": DOUBLING.format("[1]", "{'a': ns.x, 'b': ns.x}"),
    "nested calls": DOUBLING.format("[1]", "dict(a=ns.x, b=ns.x)"),
    "block": "{% set x %}{% for i in range(99999) %}{{ 'a'*100000 }}{% endfor %}{% endset %}{{ x }}",
    "output": "{% for i in range(99999) %}{{ 'a'*100000 }}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "sum": "{{ 1" + "+1" * 5000 + " }}",
    "namespace": "{% set a = namespace() %}{% set a.a = a %}{{ [a] }}",
    "source": "x" * (limits.MOST_SOURCE + 1),
}
SLOW = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "copies": "{% for i in range(99999) %}{{ (range(99999)|list)[0] }}{% endfor %}",
    "arguments": "{% macro f(a) %}{{ varargs }}{{ f(varargs, varargs, varargs) }}{% endmacro %}{{ f(1, 2, 3) }}",
    "filtered": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_what_wants_too_much_is_refused_at_once(source: str) -> None:
    began = perf_counter()
    with pytest.raises(UsageError, match="chat template failed") as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert perf_counter() - began < limits.MOST_SECONDS + 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("source", [pytest.param(each, id=name) for name, each in SLOW.items()])
def test_what_takes_too_long_is_left(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.3)
    with pytest.raises(limits.TemplateLimitError, match=r"0\.3 seconds|steps"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_work_that_comes_back_late_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    monkeypatch.setattr(limits, "MOST_SECONDS", -0.9)
    with pytest.raises(limits.TemplateLimitError, match="more than"):
        limits.limited(lambda: Event().wait(2), 0)


def test_long_conversations_are_within_the_limits() -> None:
    for content in ("word " * 400, "<" * 2000):
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i in range(1000)]
        for source in SEEDS:
            assert len(ChatTemplate(source, {}).render(messages, tools=TOOLS)) > 1_900_000


def test_messages_as_deep_as_json_may_be_are_refused() -> None:
    deep: Any = "a"
    for _ in range(900):
        deep = [deep]
    with pytest.raises(UsageError, match="nested more than"):
        ChatTemplate("{{ messages }}", {}).render([{"role": "user", "content": "a", "more": deep}])


def test_the_page_says_the_numbers_of_the_code() -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "limits.md").read_text(encoding="utf-8"))
    for words in (
        f"has at most {limits.MOST_SOURCE >> 10} Ki letters",
        f"{limits.MOST_SECONDS:g} seconds",
        f"{limits.MOST_STEPS:,} steps",
        f"{limits.MOST_LETTERS >> 20} Mi letters and {limits.LETTERS_PER_LETTER} times what it was given",
        f"{limits.MOST_ELEMENTS:,} elements",
        f"nested {chat_template._MOST_DEPTH} deep",
        f"(a prompt template {prompt_template._MOST_TEMPLATE_NBYTES >> 10} KiB)",
        f"{MOST_STOPS} stop strings, each of at most {LONGEST_STOP:,} letters",
    ):
        assert words in page


# --- mutants

SEEDS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{%- set ns = namespace(last=messages|length - 1, many=false) %}{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.many and message.role == 'user' %}"
    "{%- set ns.many = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- if tools %}{%- for tool in tools %}{{ tool | tojson(indent=2) }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' and "
    "'</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}{%- endfor %}",
    "{% macro show(items, depth=0) %}{% for name, value in items | dictsort %}{{ name | upper }}: {{ value | string | "
    "replace('\n', ' ') | indent(2) }}{% if not loop.last %}, {% endif %}{% endfor %}{% endmacro %}"
    "{% for message in messages %}{{ show(message) }}{{ '%s|%d' | format(message.role, loop.index) }}"
    "{{ [message.role, loop.index ** 2] | join('-') }}{% endfor %}{{ strftime_now('%d %b %Y') }}",
)
WORDS = """
    {{ }} {% %} {# #} | ~ * ** + % ( ) [ ] { } ' " , . 999999999 -1 0 1e308 5e9 '' 'a' none true messages tools
    loop self caller range(99999) namespace(a=1) dict(a=1) cycler(1,2) joiner() varargs kwargs m.content
    |indent(99999) |tojson |list |join |replace('a','aa') |sum |map('upper') |sort |batch(9) |format(9)
    |round(99) |int |float |string |length |groupby('role') .format(1) .join('ab') {{f(1)}} \x00 \ud800
"""
PIECES = [
    *WORDS.split(),
    *("{% for i in range(99999) %}", "{% endfor %}", "{% if 1 %}", "{% endif %}", "{% set x = x ~ x %}", "{% break %}"),
    *("{% set x = 'a' %}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}", "{% set x %}", "{% endset %}", " recursive "),
    *("{% set ns.x = [ns.x, ns.x] %}", "{% call f() %}", "{% endcall %}", "{% raw %}", "{% include 'a' %}"),
]


GRAMMAR = """
    1 0 -1 2.5 99999999 'a' '%9d' '{:9}' none true x ns.x messages message.content tools range(99999) loop f
    + - * / // % ** ~ == != < in and or is
    |list |string |join('a') |replace('a','aa') |tojson(indent=9) |indent(99) |length |sort |sum |map('upper')
    .split('a') .replace('','aa') .join(messages) .format(x) .items() .x [0] [::-1] (x) (1)
"""
LEAVES, OPERATORS, FILTERS, CALLS = (line.split() for line in GRAMMAR.strip().splitlines())


def expression(draw: random.Random, depth: int = 0) -> str:
    if depth > 3 or draw.random() < 0.3:
        return draw.choice(LEAVES)
    one, other = (expression(draw, depth + 1) for _ in range(2))
    return draw.choice(
        (
            f"({one} {draw.choice(OPERATORS)} {other})",
            f"({one}){draw.choice(FILTERS)}",
            f"({one}){draw.choice(CALLS)}",
            f"[{one}, {other}]",
            f"{{'a': {one}, 'b': {other}}}",
            f"dict(a={one}, b={other})",
            f"({one} if {other} else {one})",
        )
    )


def statement(draw: random.Random, depth: int = 0) -> str:
    value, inner = expression(draw), "" if depth > 3 else statement(draw, depth + 1)
    return draw.choice(
        (
            f"{{{{ {value} }}}}",
            f"{{% set x = {value} %}}",
            f"{{% set x %}}{inner}{{% endset %}}",
            f"{{% for i in range({draw.choice((3, 99999))}) %}}{{% set ns.x = {value} %}}{inner}{{% endfor %}}",
            f"{{% for x in {value} recursive %}}{inner}{{{{ loop({value}) }}}}{{% endfor %}}",
            f"{{% macro f(x) %}}{{{{ {value} }}}}{inner}{{% endmacro %}}{{{{ f({value}) }}}}",
        )
    )


def grown(draw: random.Random, seeds: Sequence[str] = SEEDS) -> str:
    """A seed with whole statements put in between its own."""
    seed = draw.choice(seeds)
    for _ in range(draw.randint(1, 3)):
        at = draw.choice([0, *(found.end() for found in re.finditer("[%}]}", seed))])
        seed = seed[:at] + statement(draw) + seed[at:]
    return "{% set ns = namespace(x='a') %}{% set x = 'a' %}" + seed


def mutant(draw: random.Random, seeds: Sequence[str] = SEEDS) -> str:
    """A seed with some places changed: pieces put in, spans taken out, repeated, moved, nested."""
    source = draw.choice(seeds)
    for _ in range(draw.randint(1, 3)):
        start, end = sorted(draw.randint(0, len(source)) for _ in range(2))
        end = min(end, start + draw.choice((1, 5, 30, 200)))
        span = source[start:end]
        change = draw.choice(("in", "in", "out", "again", "other", "letter", "nested"))
        match change:
            case "in":
                span += draw.choice(PIECES)
            case "out":
                span = ""
            case "again":
                span *= draw.choice((2, 3, 50))
            case "other":
                span = draw.choice(seeds)[start:end]
            case "letter":
                span = span[:-1] + chr(draw.randrange(32, 0x500))
            case "nested":
                depth = draw.choice((2, 60))
                span = "{% for i in range(99999) %}" * depth + span + "{% endfor %}" * depth
        source = (source[:start] + span + source[end:])[: limits.MOST_SOURCE]
    return source


OWN = tuple(path.read_text(encoding="utf-8") for path in sorted((ROOT / "prompts").glob("*.md")))


def rendered(draw: random.Random) -> None:
    """Render a mutant of a chat template."""
    ChatTemplate(draw.choice((mutant, grown))(draw), {"bos_token": "<s>"}).render(MESSAGES, tools=TOOLS)


def rendered_own(draw: random.Random) -> None:
    """Render a mutant of a prompt template."""
    made = parse("own", draw.choice((mutant, grown))(draw, OWN))
    made.options(named := dict.fromkeys(made.parameters, "a, b"))
    made.render("x" * 100 if made.takes_input else None, named)


def templates(folder: Path) -> Attempt:
    """Both kinds, within all limits but the seconds, of which many mutants take all there are."""
    limits.MOST_SECONDS = 0.5  # for this process, which is the survey's
    return lambda draw: draw.choice((rendered, rendered_own))(draw)


@pytest.mark.parametrize(("render", "kinds"), [(rendered, 20), (rendered_own, 10)])
def test_mutants_are_rendered_or_refused(
    render: Attempt, kinds: int, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(limits, "MOST_STEPS", 20_000)
    draw = random.Random(f"{pytestconfig.option.seed}:0")
    sentences = set[str]()
    for _ in range(100):
        began = perf_counter()
        try:
            render(draw)
        except UsageError as error:
            sentences.add(str(error))
        assert perf_counter() - began < 10
    assert not [sentence for sentence in sentences if "\n" in sentence]
    assert len(sentences) > kinds  # they differ in what is wrong with them
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20
