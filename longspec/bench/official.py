"""Spec-Bench in the way of its own scripts: every turn of each record, the earlier answers in the chat, up to 1,024
tokens each, greedily. What is computed of the answers is `longspec.bench.spec_bench`'s.

Takes engines that share one loaded model, `none` among them, peers in processes of their own, and records by task;
gives a row per task and drafter, and of all records. Every turn reads its whole chat anew, as it does there. The
drafters go in turns, record by record, and each one's chat has its own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from longspec.bench.harness import Column, Progress, Row, Table, rotated, setup_of
from longspec.bench.plot import draw_drafters
from longspec.bench.process import Worker, single
from longspec.bench.spec_bench import Answers, Record, Turn, rows_of
from longspec.engine.engine import Engine
from longspec.errors import UsageError
from longspec.text.detokenizer import decode
from longspec.text.prompt import encode

__all__ = ["DRAFTERS", "NEW_TOKENS", "OfficialWorkload"]

NEW_TOKENS = 1024
"""Of each turn at most, as in the scripts."""

DRAFTERS = ("none", "ngram", "recycle+ngram", "auto")
"""What is measured, if nothing is named."""

Write = Callable[[list[dict[str, Any]], int], Turn]
"""The answer to a chat, of so many tokens at most."""


class OfficialWorkload:
    """Engines by drafter, `none` among them, and peers; answers are greedy."""

    what = "Spec-Bench: all turns, seconds with the prompt's, means as its scripts compute them"
    table = Table(
        Column("task", -17, "{task}"),
        Column("drafter", -26, "{drafter}"),
        Column("records", 7, "{records}"),
        Column("mean accepted", 13, "{mean_accepted_tokens:.2f}"),
        Column("tokens/s", 8, "{tokens_per_second:.1f}"),
        Column("speed-up", 8, "{speedup:.2f}"),
        Column("different", 9, "{different}"),
    )

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tasks: Mapping[str, Sequence[Record]],
        new_tokens: int,
        peers: Mapping[str, Worker],
        path: Path | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """path: a file that keeps the answers, for a run that goes on where this one ends. asked: what is told of the
        setup beside the model.
        """
        self._plain = engines["none"]
        self._tasks = tasks
        self._new = new_tokens
        self._asked = dict(asked or {})
        self._writers: dict[str, Write] = {
            **{name: _by_engine(engine) for name, engine in engines.items()},
            **{name: partial(self._by_peer, worker) for name, worker in peers.items()},
        }
        self._answers = Answers(path, self._setup())

    def rows(self, progress: Progress) -> Iterator[Row]:
        for write in self._writers.values():
            write([{"role": "user", "content": "Say hello."}], 16)  # warm-up
        done, total = 0, sum(map(len, self._tasks.values()))
        for task, records in self._tasks.items():
            for record in records:
                self._write(record, done, progress, done, total)
                done += 1
            yield from self._rows(task, records)
        yield from self._rows("overall", [record for records in self._tasks.values() for record in records])

    def about(self) -> Row:
        return {**self._setup(), "runs": self._answers.runs}

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_drafters([{**row, "category": row["task"], "ratio": row["speedup"]} for row in rows], path)

    def _setup(self) -> Row:
        """What answers of several runs must have in common."""
        return {**setup_of(self._plain, self._new), **self._asked}

    def _write(self, record: Record, turn: int, progress: Progress, done: int, total: int) -> None:
        """The record by each drafter that has no answer to it yet, the first one rotating."""
        for name in rotated(list(self._writers), turn):
            if self._answers.get(name, record) is None:
                progress(name, done, total)
                self._answers.add(name, record, self._conversation(self._writers[name], record))

    def _conversation(self, write: Write, record: Record) -> list[Turn]:
        messages: list[dict[str, Any]] = []
        turns = []
        for question in record.turns:
            messages.append({"role": "user", "content": question})
            room = self._plain.context - len(encode(self._plain.model.vocabulary, messages))
            if room < 1:
                raise UsageError(
                    f"Question {record.question} takes more than the model's context of {self._plain.context:,} "
                    "tokens; leave it out of the suite."
                )
            turns.append(write(messages, min(self._new, room)))
            messages.append({"role": "assistant", "content": turns[-1].text})
        return turns

    def _rows(self, task: str, records: Sequence[Record]) -> Iterator[Row]:
        vocabulary = self._plain.model.vocabulary
        return rows_of(
            task,
            records,
            self._answers,
            list(self._writers),
            lambda text: len(vocabulary.encode(text, add_special=False)),
        )

    def _by_peer(self, worker: Worker, messages: list[dict[str, Any]], new: int) -> Turn:
        told = worker.ask(*single(self._plain.model, messages, new))
        text = decode(self._plain.model.vocabulary, told["answer"]).strip()
        return Turn(text, len(told["answer"]), told["first"] + told["seconds"], told["lengths"])


def _by_engine(engine: Engine) -> Write:
    def write(messages: list[dict[str, Any]], new: int) -> Turn:
        prepared = engine.prepare(messages, max_new_tokens=new, temperature=0, repetition_penalty=1.0)
        began = perf_counter()  # the scripts' clock begins behind the tokenizer
        session = engine.begin(prepared)
        lengths = [len(commit.tokens) for commit in engine.write(session)]
        seconds = perf_counter() - began
        return Turn(session.said.strip(), len(session.answer), seconds, lengths)

    return write
