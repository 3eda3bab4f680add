"""Forty calls of ten tools: all parse, all are valid, and they are the same with drafts and without.

    python docs/benchmarks/tools.py --model ~/models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf \
      --output docs/benchmarks/tools.json

Each request offers two tools and asks for one of them; `tool_choice` is `required`, so that a text can't come. Calls
are checked by jsonschema. `as_asked` counts those of the tool that the question means: the model's part, and not the
grammar's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import jsonschema

from longspec.engine.answer import Answer
from longspec.engine.engine import Engine

TEXT: dict[str, Any] = {"type": "string", "maxLength": 60}
DAY: dict[str, Any] = {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"}


def whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def among(*names: str) -> dict[str, Any]:
    return {"type": "string", "enum": [*names]}


def tool(name: str, said: str, optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    needed = [each for each in properties if each not in optional]
    schema = {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": said, "parameters": schema}}


PERSON = {
    "type": "object",
    "properties": {"name": TEXT, "age": whole(0, 130)},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    tool("get_weather", "The weather of a city", ("unit",), city=TEXT, unit=among("celsius", "fahrenheit")),
    tool("convert_money", "Convert an amount", amount={"type": "number"}, source=TEXT, target=TEXT),
    tool("add_event", "Put an event into the calendar", title=TEXT, day=DAY, minutes=whole(5, 600)),
    tool("send_mail", "Send a mail", to=TEXT, subject=TEXT, urgent={"type": "boolean"}),
    tool("search_files", "Find files", ("folder",), pattern=TEXT, folder=TEXT, most=whole(1, 100)),
    tool("set_light", "Switch a lamp", room=among("kitchen", "bath", "hall"), level=whole(0, 100)),
    tool("add_person", "Store a person", person=PERSON),
    tool("play_music", "Play songs", songs={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4}),
    tool("book_train", "Book a train", start=TEXT, end=TEXT, day=DAY, seats=whole(1, 9)),
    tool("make_note", "Keep a note", text=TEXT, colour=among("red", "green", "blue", "yellow")),
]
QUESTIONS = {
    "get_weather": ("Is it raining in Oslo?", "How warm is Madrid in celsius?", "Weather in Lima?", "Is Kyiv cold?"),
    "convert_money": ("100 dollars in euros?", "What are 5 pounds in yen?", "20 francs to dollars", "3.5 euros in won"),
    "add_event": (
        "Dentist on 2026-03-04, half an hour", "Lunch on 2026-05-01 for 60 minutes", "Review on 2026-07-09, 2 hours",
        "Call Ann on 2026-08-30 for 15 minutes",
    ),
    "send_mail": (
        "Mail bob@example.org that the tests pass", "Write to ann@example.org about lunch, not urgent",
        "Urgent mail to ops@example.org: disk full", "Tell eve@example.org about the meeting by mail",
    ),
    "search_files": ("Find all *.py, at most 5", "Find TODO.md in docs", "Where is a.json?", "Find logs in /var"),
    "set_light": ("Kitchen to half", "Bath off", "Hall at full brightness", "Dim the kitchen to 10 percent"),
    "add_person": ("Store Ann, who is 31", "Add Bob, 45", "New person: Eve, 7 years old", "Remember Kim, aged 88"),
    "play_music": ("Play Yesterday", "Play Help and then Let It Be", "Let me hear Waterloo", "Play Imagine, then Hurt"),
    "book_train": (
        "Two seats from Bonn to Berlin on 2026-02-01", "Oslo to Bergen on 2026-06-12, one seat",
        "Paris to Lyon on 2026-04-04 for 4", "A seat from Rome to Milan on 2026-09-10",
    ),
    "make_note": ("Note in red: buy milk", "A green note: water the plants", "Note that the key is at Ann's, blue",
                  "Yellow note: pay the rent"),
}  # fmt: skip


def requests(new: int) -> list[tuple[list[dict[str, str]], dict[str, Any]]]:
    asked: list[tuple[list[dict[str, str]], dict[str, Any]]] = []
    for first in range(0, len(TOOLS), 2):
        pair = TOOLS[first : first + 2]
        for question in [one for each in pair for one in QUESTIONS[each["function"]["name"]]]:
            options = {"tools": pair, "tool_choice": "required", "parallel_calls": False, "max_new_tokens": new}
            asked.append(([{"role": "user", "content": question}], options))
    return asked


def written(engine: Engine, drafter: str | None, new: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds that they took; those of the same tools share what their prompts begin with."""
    asked: list[Any] = [
        (prompt, {**options, "drafter": drafter} if drafter else options) for prompt, options in requests(new)
    ]
    began = perf_counter()
    told = dict(engine.generate_many(asked, width=4, temperature=0))
    answers = [told[number] for number in range(len(asked))]
    return [answer for answer in answers if isinstance(answer, Answer)], perf_counter() - began


def judged(answers: list[Answer]) -> dict[str, Any]:
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
    meant = [name for name, questions in QUESTIONS.items() for _ in questions]
    parse = valid = right = 0
    for answer, name in zip(answers, meant, strict=True):
        for call in answer.calls:
            try:
                arguments = json.loads(call.arguments)
                parse += 1
                jsonschema.validate(arguments, schemas[call.name])
                valid += 1
                right += call.name == name
            except (ValueError, jsonschema.ValidationError) as error:
                print(call, error)
    return {
        "answers": len(answers),
        "calls": sum(len(answer.calls) for answer in answers),
        "parse": parse,
        "valid": valid,
        "as_asked": right,
        "texts": sum(bool(answer.text) for answer in answers),
        "cut": sum(answer.finish_reason == "length" for answer in answers),
        "tokens": sum(len(answer.tokens) for answer in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    engine = Engine.load(options.model, threads=options.threads)
    drafted, seconds = written(engine, None, options.new)
    plain, plainly = written(engine, "none", options.new)
    steps = sum(answer.speculation["steps"] for answer in drafted)
    report = {
        "model": Path(options.model).name,
        "drafter": engine.drafter_name,
        **judged(drafted),
        "same_tokens_without_drafts": [each.tokens for each in drafted] == [each.tokens for each in plain],
        "tokens_per_step": round(sum(len(answer.tokens) for answer in drafted) / steps, 2),
        "seconds": round(seconds, 1),
        "seconds_without_drafts": round(plainly, 1),
        "first_calls": [[call.name, call.arguments] for answer in drafted[::4] for call in answer.calls],
    }
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
