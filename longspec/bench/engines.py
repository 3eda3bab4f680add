"""longspec beside transformers' generate and llama.cpp: tokens per second, time to the first token, peak of memory.

Takes what each engine is (`Contender`) and cases; gives one frozen `Result` per case and engine. Each engine is a
process of its own (`longspec.bench.worker`), which waits on its input while another one works: peaks are its own, and
nobody's threads disturb another's. Every prompt is written by all of them in turns, the order rotated from turn to
turn, round after round; a ratio is that of one round's rates. All get the same tokens, greedy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from longspec.bench.contenders import Contender
from longspec.errors import LongspecError, UsageError
from longspec.text.detokenizer import decode
from longspec.text.prompt import encode
from longspec.text.tokenizer import Vocabulary

__all__ = [
    "CONTEXTS",
    "Case",
    "Result",
    "Spread",
    "Worker",
    "chats",
    "contexts",
    "measure",
    "opened",
]

CONTEXTS = (512, 2048, 7000)

_PLACES = ("assistant", "file", "folder")

BATCHED = 2048
"""Tokens of context up to which texts are written side by side too: eight of 7,000 take minutes to read."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Case:
    """What is written: prompts as the worker takes them, one by one or `width` at a time."""

    name: str
    prompts: Sequence[Mapping[str, Any]]
    new: int
    width: int = 1
    ends: Sequence[int] = ()
    chat: bool = False  # a category's prompts, one by one

    @property
    def turns(self) -> list[list[Mapping[str, Any]]]:
        """What is asked at once."""
        return [[prompt] for prompt in self.prompts] if self.width == 1 else [list(self.prompts)]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """One engine on one case; spreads are over rounds."""

    case: str
    engine: str
    width: int
    prompts: int
    prompt_tokens: float  # mean
    tokens: int  # of one round's rate
    tokens_per_second: Spread
    ratio: Spread  # to the base, round by round
    first_token_seconds: Spread | None  # the median prompt's
    peak_bytes: int  # of its process so far, everything included


@dataclass(slots=True)
class _Sum:
    """A round's turns of one engine."""

    tokens: int = 0
    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def add(self, took: Mapping[str, Any]) -> None:
        self.tokens += took["tokens"]
        self.seconds += took["seconds"]
        self.firsts += [] if took["first"] is None else [took["first"]]


class Worker:
    """A contender's process, ready to write."""

    def __init__(self, contender: Contender) -> None:
        """Raises LongspecError where it can't be loaded, with its own words."""
        self.contender = contender
        own = [sys.executable, "-m", "longspec.bench.worker"]
        script = [contender.python or sys.executable, str(Path(__file__).with_name("worker.py"))]
        command = script if contender.kind == "llama.cpp" else own
        environment = dict(os.environ)
        if "OMP_WAIT_POLICY" not in environment:  # as the command itself: threads that wait sleep soon
            environment.setdefault("GOMP_SPINCOUNT", "10000")
        self._heard = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [*command, contender.kind, json.dumps(dict(contender.settings))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._heard, text=True, encoding="utf-8",
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._heard.close()
            raise LongspecError(f"{command[0]} can't be run for {contender.name}: {error.strerror}.") from error
        try:
            self.told = self._answer()
        except BaseException:
            self.close()
            raise
        self.peak = 0

    def write(self, case: Case, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What these prompts took. Raises LongspecError where the process has ended, or couldn't."""
        asked = {"prompts": prompts, "new": case.new, "width": case.width, "ends": case.ends}
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: what it left says why
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        took = self._answer()
        self.peak = took["peak_bytes"]
        return took

    def report(self) -> dict[str, Any]:
        """What it is: its settings but for where its files lie, and what it told of itself."""
        return {name: value for name, value in self.contender.settings.items() if name not in _PLACES} | self.told

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._heard):
            if stream is not None:
                with suppress(OSError):  # what it didn't take any more
                    stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in told:
            raise LongspecError(f"{self.contender.name} can't be measured: {told['error'].strip().rstrip('.')}.")
        return told

    def _last_words(self) -> str:
        code = self._process.wait()
        self._heard.seek(0)
        lines = self._heard.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"its process ended with code {code}")


def chats(
    vocabulary: Vocabulary, suite: Mapping[str, Sequence[str]], new: int, width: int, ends: Sequence[int]
) -> list[Case]:
    """A case for each category, one prompt at a time, and one of all prompts side by side. Answers end where the
    model ends them.
    """
    made = {
        category: [{"text": one, "raw": False, "tokens": encode(vocabulary, one)} for one in prompts]
        for category, prompts in suite.items()
    }
    cases = [Case(category, prompts, new, 1, ends, chat=True) for category, prompts in made.items()]
    every = [prompt for prompts in made.values() for prompt in prompts]
    return [*cases, *([Case("all", every, new, width, ends)] if width > 1 and len(every) > 1 else [])]


def contexts(vocabulary: Vocabulary, text: str, lengths: Sequence[int], new: int, width: int) -> list[Case]:
    """A case for each length, which goes on from that many tokens of the text, and `width` of them side by side, from
    evenly spread places. All engines write `new` tokens.

    Raises:
        UsageError: the text is too short.
    """
    tokens = vocabulary.encode(text, add_special=False)
    cases = []
    for length in lengths:
        if len(tokens) < length:
            raise UsageError(
                f"The text has {len(tokens):,} tokens, and {length:,} are needed; give a longer one, or --context."
            )
        cases.append(Case(f"{length:,}", [_cut(vocabulary, tokens, 0, length)], new))
        if width > 1 and length <= BATCHED:
            starts = [i * (len(tokens) - length) // (width - 1) for i in range(width)]
            cases.append(Case(f"{length:,}", [_cut(vocabulary, tokens, start, length) for start in starts], new, width))
    return cases


def _cut(vocabulary: Vocabulary, tokens: Sequence[int], start: int, length: int) -> dict[str, Any]:
    text = decode(vocabulary, tokens[start : start + length])
    return {"text": text, "raw": True, "tokens": encode(vocabulary, text, raw=True)}


def measure(
    workers: Mapping[str, Worker], cases: Sequence[Case], rounds: int, base: str, report: Report
) -> Iterator[list[Result]]:
    """Results of each case as it ends; behind the last category, those of all categories."""
    report("warming up", 0, 0)
    shortest = min((case.prompts[0] for case in cases), key=lambda one: len(one["tokens"]))
    warm = Case("", [shortest], cases[0].new)  # a whole answer: what steps cost here has to be learned
    for worker in workers.values():
        worker.write(warm, warm.prompts)
    done, total, turn = 0, rounds * sum(len(case.turns) * len(_able(workers, case)) for case in cases), 0
    categories: list[tuple[Case, dict[str, list[_Sum]]]] = []
    wanted = sum(case.chat for case in cases)
    for case in cases:
        names = _able(workers, case)
        sums: dict[str, list[_Sum]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                sums[name].append(_Sum())
            for prompts in case.turns:
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    report(f"{case.name}: {name}", done, total)
                    sums[name][-1].add(workers[name].write(case, prompts))
                    done += 1
                turn += 1
        yield _results(case, sums, base, workers)
        if case.chat:
            categories.append((case, sums))
            if 1 < wanted == len(categories):
                yield _together(categories, base, workers)


def _able(workers: Mapping[str, Worker], case: Case) -> list[str]:
    return [name for name, worker in workers.items() if case.width == 1 or worker.contender.batches]


def _together(
    categories: Sequence[tuple[Case, Mapping[str, Sequence[_Sum]]]], base: str, workers: Mapping[str, Worker]
) -> list[Result]:
    """All categories' turns as one case."""
    first, _ = categories[0]
    sums: dict[str, list[_Sum]] = {}
    for name, rounds in categories[0][1].items():
        sums[name] = [_Sum() for _ in rounds]
        for _, others in categories:
            for mine, other in zip(sums[name], others[name], strict=True):
                mine.tokens, mine.seconds = mine.tokens + other.tokens, mine.seconds + other.seconds
                mine.firsts += other.firsts
    every = [prompt for case, _ in categories for prompt in case.prompts]
    return _results(Case("all", every, first.new, 1, first.ends), sums, base, workers)


def _results(case: Case, sums: Mapping[str, Sequence[_Sum]], base: str, workers: Mapping[str, Worker]) -> list[Result]:
    against = sums[base if base in sums else next(iter(sums))]
    return [
        Result(
            case.name,
            name,
            case.width,
            len(case.prompts),
            sum(len(prompt["tokens"]) for prompt in case.prompts) / len(case.prompts),
            rounds[-1].tokens,
            Spread.of([one.rate for one in rounds]),
            Spread.of([one.rate / max(other.rate, 1e-9) for one, other in zip(rounds, against, strict=True)]),
            Spread.of([median(one.firsts) for one in rounds]) if rounds[0].firsts else None,
            workers[name].peak,
        )
        for name, rounds in sums.items()
    ]


def opened(contenders: Sequence[Contender | str], held: ExitStack, report: Report) -> Iterator[Worker | LongspecError]:
    """Their workers, or why there is none, in their order; `held` ends them."""
    for done, contender in enumerate(contenders):
        if isinstance(contender, str):
            yield UsageError(f"{contender}.")
            continue
        report(f"loading {contender.name}", done, len(contenders))
        try:
            worker = _started(contender)
        except LongspecError as error:
            yield error
        else:
            held.callback(worker.close)
            yield worker


def _started(contender: Contender) -> Worker:
    """Its worker; llama.cpp's a second time with weights as they lie in the file, where its kernels for tiles end it
    by a segmentation fault (llama.cpp's issue 20824).
    """
    try:
        return Worker(contender)
    except LongspecError as error:
        if not (contender.settings.get("repacked") and "ended with code -" in str(error)):
            raise
        worker = Worker(replace(contender, settings={**contender.settings, "repacked": False}))
        worker.told["note"] = f"With weights laid out for this processor {error}"
        return worker
