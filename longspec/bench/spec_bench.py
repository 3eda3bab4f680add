"""Spec-Bench's records and its files of answers, and what its scripts compute of them (2401.07851,
`evaluation/speed.py`).

    task                   categories of a record; the eight of MT-bench are one task
    mean accepted tokens   tokens that a step gave, the target's own among them, over all steps of a task
    tokens per second      a record's new tokens over its seconds, prompts included; the mean over records
    speed-up               that, over plain decoding's

Of plain decoding the scripts count its answer's text in tokens anew, which lacks the end of text; of the others, the
tokens that were written. `speedup` does as they do, `speedup_same_count` counts what was written of both.

Takes a suite's file and answers; gives rows. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from longspec.bench.harness import Row, entries
from longspec.errors import UsageError

__all__ = ["TASKS", "Answers", "Record", "Turn", "read_records", "rows_of"]

TASKS = dict.fromkeys(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), "mt_bench"
)
"""The categories that are part of a task; any other is a task of its own."""

Choice = dict[str, Any]
"""A record's answer as Spec-Bench's files have it: `turns`, `decoding_steps`, `new_tokens` and `wall_time` of each
turn, and `accept_lengths` of all steps."""


@dataclass(frozen=True, slots=True)
class Record:
    """The questions of one conversation."""

    question: str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        return TASKS.get(self.category, self.category)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. seconds: reading the prompt included. lengths: tokens that each step gave."""

    text: str
    tokens: int
    seconds: float
    lengths: Sequence[int]


def read_records(path: Path, count: int | None) -> dict[str, list[Record]]:
    """A suite's records by task, in the file's order; at most `count` of each, evenly spaced, or all if None."""
    tasks: dict[str, list[Record]] = {}
    for number, entry in enumerate(entries(path), 1):
        turns = tuple(map(str, entry["turns"]))
        record = Record(str(entry.get("question_id", number)), entry["category"], turns)
        tasks.setdefault(record.task, []).append(record)
    for records in tasks.values():
        taken = len(records) if count is None else min(count, len(records))
        records[:] = [records[i * len(records) // taken] for i in range(taken)]
    return tasks


class Answers:
    """Answers by drafter and question, in the shape of Spec-Bench's files. With a path, each is written when it is
    known, and those of an earlier run with the same setup are there from the start.
    """

    def __init__(self, path: Path | None, setup: Mapping[str, Any]) -> None:
        """Raises UsageError where the file holds something else, or answers of another setup."""
        self._path = path
        self._choices: dict[tuple[str, str], Choice] = {}
        self.runs = 1
        if path is None:
            return
        wanted = {"setup": dict(setup)}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
            lines = [json.loads(line) for line in whole.splitlines()]
            if text and "setup" not in lines[0]:
                raise ValueError("there is no setup")
            for line in lines:
                if "setup" not in line:
                    self._choices[line["model_id"], line["question_id"]] = line["choices"][0]
                elif line == wanted:
                    self.runs += 1
                else:
                    raise UsageError(f"{path} has answers of another setup, {line['setup']}; name another file.")
            if whole != text:
                path.write_text(whole, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(f"{path} isn't a file of answers that this benchmark wrote; name another one.") from error
        self._write(wanted)

    def get(self, drafter: str, record: Record) -> Choice | None:
        return self._choices.get((drafter, record.question))

    def add(self, drafter: str, record: Record, turns: Sequence[Turn]) -> None:
        choice: Choice = {
            "index": 0,
            "turns": [turn.text for turn in turns],
            "decoding_steps": [len(turn.lengths) for turn in turns],
            "new_tokens": [turn.tokens for turn in turns],
            "wall_time": [turn.seconds for turn in turns],
            "accept_lengths": [length for turn in turns for length in turn.lengths],
        }
        self._choices[drafter, record.question] = choice
        line = {"question_id": record.question, "category": record.category, "model_id": drafter}
        self._write({**line, "choices": [choice]})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UsageError(f"{self._path} can't be written: {error.strerror or error}.") from error


def rows_of(
    task: str, records: Sequence[Record], answers: Answers, drafters: Sequence[str], count: Callable[[str], int]
) -> Iterator[Row]:
    """A task's row of each drafter, `none` among them. count: tokens of a text, without a beginning of text."""
    choices = {name: [answers.get(name, record) or {} for record in records] for name in drafters}
    plain = choices["none"]
    counted = mean(sum(map(count, choice["turns"])) / sum(choice["wall_time"]) for choice in plain)
    written = mean(map(_rate, plain))
    for name in drafters:
        lengths = [length for choice in choices[name] for length in choice["accept_lengths"]]
        rate = mean(map(_rate, choices[name]))
        same = zip(choices[name], plain, strict=True)
        yield {
            "task": task,
            "drafter": name,
            "records": len(records),
            "turns": sum(len(record.turns) for record in records),
            "new_tokens": sum(sum(choice["new_tokens"]) for choice in choices[name]),
            "steps": len(lengths),
            "seconds": sum(sum(choice["wall_time"]) for choice in choices[name]),
            "different": sum(one["turns"] != other["turns"] for one, other in same),
            "mean_accepted_tokens": mean(lengths),
            "tokens_per_second": rate,
            "baseline_tokens_per_second": counted,
            "speedup": rate / counted if counted else None,  # plain answers may be empty texts
            "speedup_same_count": rate / written,
        }


def _rate(choice: Choice) -> float:
    return float(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
