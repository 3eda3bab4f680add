"""Thoughts and words: told apart, held to a budget and an effort, with every drafter the same."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import engine, every_drafter, finish, tiny
from support.thoughts import LEVELLED, ONE_TOKEN, OPENS, vocabulary

from longspec.engine.conversation import Conversation
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.model.load import Model
from longspec.text.detokenizer import Transcript
from longspec.text.reasoning import Reader, Section
from longspec.text.reasoning_effort import variables
from longspec.text.think_tags import Markers

# Of Qwen 3: the model opens it, and a switch closes it at once.
SWITCHED = """{% for m in messages %}{{ m.role[0] + m.content.split('</think>')[-1] }}{% endfor %}\
{% if add_generation_prompt %}a{% if enable_thinking is defined and enable_thinking is false %}\
{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
# Of SmolLM3: a switch with a default, which the template sets itself where nobody does.
DEFAULTED = """{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}\
{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}a\
{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}"""
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def thinking(model: Model, template: str = OPENS, added: tuple[str, ...] = ONE_TOKEN) -> Model:
    return replace(model, vocabulary=vocabulary(template, added))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("tiny"))


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "seed": 5},
    "penalised": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 1},
}
ASKED = ["What?", "Where!Where!Where!Where!", "Who and why?".replace(" ", "_") * 5]


def opened(made: Engine, budgets: tuple[int | None, ...] = (0, 9, 30), new: int = 50, **options: Any) -> list[Session]:
    """Sessions side by side, with a budget each."""
    return [
        made.open(text, key=str(i), max_new_tokens=new, reasoning_budget=budget, **options)
        for i, (text, budget) in enumerate(zip(ASKED, budgets, strict=True))
    ]


@pytest.mark.parametrize(
    ("way", "added"),
    [("greedy", ONE_TOKEN), ("sampled", ()), ("penalised", ONE_TOKEN)],
    ids=["greedy", "sampled, of several tokens", "penalised"],
)
def test_bets_do_not_change_what_a_budget_ends(bare: Model, way: str, added: tuple[str, ...]) -> None:
    model = thinking(bare, added=added)
    plain = opened(engine(model), **WAYS[way])
    wanted = finish(engine(model), plain)
    for session, budget in zip(plain, (0, 9, 30), strict=True):
        assert "</think>" in session.text or session.answer[-1] == 2
        assert engine(model).answer(session).usage["reasoning_tokens"] <= budget
    texts = {str(i): tokens for i, tokens in enumerate(wanted)}
    for name, drafter in every_drafter(texts, "llama").items():
        made = engine(model, drafter())
        sessions = opened(made, **WAYS[way])
        assert finish(made, sessions) == wanted, name
        assert [session.reasoning for session in sessions] == [session.reasoning for session in plain], name
        assert [session.said for session in sessions] == [session.said for session in plain], name


def test_a_batch_writes_what_each_text_alone_has(bare: Model) -> None:
    made = engine(thinking(bare), "ngram")
    asked: list[Any] = [(text, {"reasoning_budget": 4 * i}) for i, text in enumerate(ASKED)]
    for number, answer in made.generate_many(asked, max_new_tokens=30, temperature=1.0, stop_loops=True):
        alone = made.generate(
            ASKED[number],
            max_new_tokens=30,
            temperature=1.0,
            key=str(number),
            reasoning_budget=4 * number,
        )
        assert not isinstance(answer, Exception)
        assert (answer.tokens, answer.reasoning, answer.text) == (alone.tokens, alone.reasoning, alone.text)


def test_a_budget_is_kept_to_the_token(bare: Model) -> None:
    made = engine(thinking(bare), "ngram")
    free = made.generate("What?", max_new_tokens=40)
    assert free.reasoning is not None
    for budget in (0, 1, 7):
        answer = made.generate("What?", max_new_tokens=40, reasoning_budget=budget)
        assert answer.usage["reasoning_tokens"] == budget
        assert answer.tokens[:budget] == free.tokens[:budget]
        assert answer.tokens[budget] == 4  # </think>
        assert answer.reasoning is not None
        assert free.reasoning.startswith(answer.reasoning)
        assert len(answer.text) > 20


def test_what_a_budget_forces_costs_no_drafter_and_no_step(bare: Model) -> None:
    model = thinking(bare, added=())
    made = engine(model, "ngram")
    one = made.open("What?", max_new_tokens=30, reasoning_budget=0)
    finish(made, [one])
    assert one.text.startswith("</think>")
    assert one.stats.steps <= 30 - 7
    two = engine(model).open("What?", max_new_tokens=30, reasoning_budget=0)
    finish(engine(model), [two])
    assert two.tokens == one.tokens
    assert two.stats.drafted == 0


def test_a_marker_that_was_begun_is_finished(bare: Model) -> None:
    words = vocabulary(OPENS, ())
    reader = Reader(words, Markers("<think>", "</think>"))
    place = reader.begun(words.encode("a<think>\n", add_special=False))
    assert place.phase == "inside"
    for letter in "abc</th":
        place = reader.after(place, words.encode(letter, add_special=False)[0])
    assert reader.ends(place) == 4
    for letter in "ink>":
        place = reader.after(place, words.encode(letter, add_special=False)[0])
    assert place.phase == "after"


def split(text: str, template: str = OPENS, prompt: str = "a<think>\n", **options: Any) -> tuple[str, str, str, int]:
    """Thoughts and words as they came, all of the text, and how many tokens were thought."""
    words = vocabulary(template, **options)
    markers = words.markers
    assert markers is not None
    reader = Reader(words, markers)
    section = Section(reader, markers, reader.begun(words.encode(prompt, add_special=False)))
    transcript, whole, thought, said = Transcript(words), "", "", ""
    for token in words.encode(text, add_special=False):
        whole += transcript.push(token)
        section.take(token, transcript.begins[-1])
        first, second = section.parts(whole, over=False)
        assert not (first and second) or said == ""
        thought, said = thought + first, said + second
    whole += transcript.close()
    first, second = section.parts(whole, over=True)
    return thought + first, said + second, whole, section.tokens


@pytest.mark.parametrize("added", [ONE_TOKEN, ()], ids=["one token", "several"])
def test_thoughts_and_words_are_told_apart(added: tuple[str, ...]) -> None:
    whole = "\nI\nsee.\n</think>\n\nYes.\n"
    assert split(whole, added=added) == ("I\nsee.", "Yes.\n", whole, 8)
    assert split("No</think>a</think>b", added=added)[:2] == ("No", "a</think>b")
    assert split("I</thi", added=added)[:2] == ("I</thi", "")
    assert split("</think>A", added=added) == ("", "A", "</think>A", 0)
    assert split("I\n\n", added=added)[:2] == ("I", "")
    # The model opens it.
    assert split("\n<think>I.</think>\nA", prompt="a", added=added)[:2] == ("I.", "A")
    assert split("\nA<think>I.</think>", prompt="a", added=added)[:2] == ("", "\nA<think>I.</think>")
    assert split("<thin", prompt="a", added=added)[:2] == ("", "<thin")
    assert split("<think>I", prompt="a<think>\n\n</think>\n\n", added=added)[:2] == ("I", "")
    assert split("A", prompt="a<think>\n\n</think>\n\n", added=added)[:2] == ("", "A")


def test_markers_that_are_special_are_shown() -> None:
    template = PLAIN + "[THINK][/THINK]"
    parts = split("[THINK]I.[/THINK]A", template, "a", added=("[THINK]", "[/THINK]"), special=True)
    assert parts == ("I.", "A", "[THINK]I.[/THINK]A", 2)


@pytest.mark.parametrize(
    ("template", "added", "wanted"),
    [
        (OPENS, (), Markers("<think>", "</think>")),
        (PLAIN, ONE_TOKEN, Markers("<think>", "</think>")),
        (PLAIN, (), None),
        (PLAIN + "<think>", (), None),
        (PLAIN + "[THINK]x[/THINK]", ONE_TOKEN, Markers("[THINK]", "[/THINK]")),
        ("{{ '<|begin_of_thought|>' }}{{ x.split('<|end_of_thought|>') }}", (), ("<|begin_of_thought|>", None)),
        (PLAIN, ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|START_THINKING|>", None)),
        (PLAIN + "<seed:think></seed:think>", (), ("<seed:think>", None)),
        ("{% if m[thinking] < reasons and a > b %}{{ x['thought'] }}{% endif %}", (), None),
    ],
)
def test_markers_are_the_templates_own(template: str, added: tuple[str, ...], wanted: Any) -> None:
    found = vocabulary(template, added).markers
    if isinstance(wanted, tuple):
        assert found is not None
        assert found.begin == wanted[0]
        assert re.sub("(?i)begin|start", "", found.begin) == re.sub("(?i)end|/", "", found.end)
    else:
        assert found == wanted


def test_an_effort_is_what_the_template_knows() -> None:
    assert variables(vocabulary(LEVELLED), "low") == {"reasoning_effort": "low"}
    assert variables(vocabulary(SWITCHED), "none") == {"enable_thinking": False}
    assert variables(vocabulary(DEFAULTED), "high") == {"enable_thinking": True}
    assert variables(vocabulary(PLAIN), None) == {}
    with pytest.raises(UsageError, match="only turn thinking on and off"):
        variables(vocabulary(SWITCHED), "medium")
    with pytest.raises(UsageError, match="knows the efforts low, medium and high"):
        variables(vocabulary(LEVELLED), "none")
    with pytest.raises(UsageError, match="knows no effort"):
        variables(vocabulary(OPENS), "low")
    with pytest.raises(UsageError, match="one of: none, low, medium, high"):
        variables(vocabulary(LEVELLED), "lots")


def test_an_effort_reaches_the_prompt(bare: Model) -> None:
    made = engine(thinking(bare, SWITCHED))
    closed = made.open("What?", effort="none")
    assert closed.tokens == [*made.open("What?", effort="high").tokens, 3, 5, 5, 4, 5, 5]
    assert not closed.section.is_open  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="--raw"):
        made.open("What?", raw=True, effort="none")


def test_a_budget_needs_a_section(bare: Model) -> None:
    with pytest.raises(UsageError, match="know no section"):
        engine(bare).open("What?", reasoning_budget=5)
    with pytest.raises(UsageError, match="raw prompt"):
        engine(thinking(bare)).open("What?", raw=True, reasoning_budget=5)
    with pytest.raises(UsageError, match="must be 0 or more"):
        engine(thinking(bare)).open("What?", reasoning_budget=-1)


def test_a_raw_text_is_all_words(bare: Model) -> None:
    made = engine(thinking(bare))
    answer = made.generate("a<think>\n", raw=True, max_new_tokens=5)
    assert (answer.reasoning, len(answer.text)) == (None, 5)


def test_a_grammar_holds_the_words_alone(bare: Model) -> None:
    model, pattern = thinking(bare), "[a-c]{4}(quod|erat)_demonstrandum"
    for way in (WAYS["greedy"], WAYS["sampled"]):
        plain = opened(engine(model), regex=pattern, new=60, **way)
        wanted = finish(engine(model), plain)
        for session in plain:
            assert session.finish_reason == "stop"
            assert re.fullmatch(pattern, session.said)
        texts = {str(i): tokens for i, tokens in enumerate(wanted)}
        for name, drafter in every_drafter(texts, "llama").items():
            made = engine(model, drafter())
            assert finish(made, opened(made, regex=pattern, new=60, **way)) == wanted, name
    # A text can't end in its thoughts.
    ended = []
    for seed in range(6):
        options: Any = {"temperature": 2.0, "seed": seed, "reasoning_budget": 20 if seed % 2 else None}
        answer = engine(model, "ngram").generate("What?", regex=pattern, max_new_tokens=300, **options)
        if answer.finish_reason == "stop":
            ended.append(answer.text)
    assert ended
    assert [text for text in ended if not re.fullmatch(pattern, text)] == []
    # Where nothing has opened a section, the grammar begins with the answer.
    answer = engine(thinking(bare, SWITCHED), "ngram").generate("What?", regex=pattern, reasoning_budget=5)
    assert (answer.reasoning, bool(re.fullmatch(pattern, answer.text))) == (None, True)


def test_a_stop_string_and_an_interrupt_give_what_there_is(bare: Model) -> None:
    made = engine(thinking(bare), "ngram")
    whole = made.generate("What?", max_new_tokens=40, reasoning_budget=10)
    letter = whole.text[12:15]
    cut = made.generate("What?", max_new_tokens=40, reasoning_budget=10, stop=letter)
    assert cut.finish_reason == "stop"
    assert (cut.reasoning, cut.text) == (whole.reasoning, whole.text[: whole.text.index(letter)])
    session = made.open("What?", max_new_tokens=40, reasoning_budget=10)
    thought = said = ""
    for commit in made.write(session):
        thought, said = thought + commit.thought, said + commit.said
        if len(session.answer) > 15:
            rest = session.interrupt()
            thought, said = thought + rest.thought, said + rest.said
            break
    assert (thought, said) == (session.reasoning, session.said)
    assert thought == whole.reasoning


def test_a_conversation_goes_on_without_its_thoughts(bare: Model) -> None:
    made = engine(thinking(bare))
    conversation = Conversation(made, max_new_tokens=30, reasoning_budget=6, stop_loops=True)
    first = "".join(conversation.stream("What?"))
    assert "</think>" in first
    session = conversation.ask("And?")
    words = made.model.vocabulary
    said = first.split("</think>")[-1]
    assert session.tokens == words.encode(f"uWhat?a{said}uAnd?a<think>\n", add_special=False)


def test_rows_that_may_not_end_are_left_alone(bare: Model) -> None:
    made = engine(thinking(bare))
    session = made.open("What?", reasoning_budget=20)
    assert session.constraint is not None
    logits = torch.randn(3, 96)
    assert session.constraint.mask(logits, [[], [50], [50, 51]]) is logits
    late = session.constraint.mask(logits, [[], [50] * 19, [50] * 20])
    assert torch.equal(late[:2], logits[:2])
    assert [i for i in range(96) if late[2, i] > float("-inf")] == [4]
