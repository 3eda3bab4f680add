"""longspec against transformers' generate and llama.cpp: tokens per second, time to first token, peak memory.

Takes workers and cases; gives one row per case and engine. Every prompt is answered by all engines in turn, for
several rounds; a ratio is that of one round's rates. All get the same prompt tokens, and decode greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from longspec.bench.harness import Column, Progress, Row, Suite, Table, Took, Turns, spread
from longspec.bench.plot import draw_engines
from longspec.bench.process import Case, Worker
from longspec.errors import ContextError, UsageError
from longspec.text.detokenizer import decode
from longspec.text.prompt import encode
from longspec.text.tokenizer import Vocabulary

__all__ = ["EngineWorkload", "chats", "contexts", "lengths"]

CONTEXTS = (512, 2048, 7000)

BATCHED = 2048
"""Tokens of context up to which texts are written side by side too: eight of 7,000 take minutes to read."""


def lengths(asked: Sequence[int], new: int, most: int, model: str) -> list[int]:
    """The contexts to measure with `new` further tokens, given the model's maximum `most`.

    Raises:
        ContextError: a requested one is too long.
    """
    taken = sorted(asked or [length for length in CONTEXTS if length + new <= most])
    if taken and taken[-1] + new > most:
        raise ContextError(f"{taken[-1]:,} tokens and {new} more were asked for; the context of {model} is {most:,}.")
    return taken


def chats(vocabulary: Vocabulary, suite: Suite, new: int, width: int, ends: Sequence[int]) -> list[Case]:
    """A case for each category, one prompt at a time, and one of all prompts, `width` at a time. Answers end at the
    model's end-of-text tokens.
    """
    encoded = {
        category: [{"text": one, "raw": False, "tokens": encode(vocabulary, one)} for one in prompts]
        for category, prompts in suite.items()
    }
    cases = [Case(category, prompts, new, 1, ends, chat=True) for category, prompts in encoded.items()]
    every = [prompt for prompts in encoded.values() for prompt in prompts]
    return [*cases, *([Case("all", every, new, width, ends)] if width > 1 and len(every) > 1 else [])]


def contexts(vocabulary: Vocabulary, text: str, lengths: Sequence[int], new: int, width: int) -> list[Case]:
    """Two cases for each length: a prompt of that many tokens of the text, and `width` such prompts side by side,
    from evenly spaced positions. All engines decode `new` tokens.

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


class EngineWorkload:
    """Workers on cases, for several rounds. base: the contender that ratios are relative to."""

    what = "engines on the same tokens, greedy, each in a process of its own, in turns"
    table = Table(
        Column("case", -18, lambda row: row["case"] + (f", {row['width']} at once" if row["width"] > 1 else "")),
        Column("engine", -24, "{engine}"),
        Column("tokens/s", 8, "{tokens_per_second[median]:.1f}"),
        Column("least", 8, "{tokens_per_second[least]:.1f}"),
        Column("most", 8, "{tokens_per_second[most]:.1f}"),
        Column("ratio", 5, "{ratio[median]:.2f}"),
        Column("first token s", 13, "{first_token_seconds[median]:.3f}"),
        Column("peak MiB", 8, lambda row: f"{row['peak_bytes'] / 2**20:,.0f}"),
    )

    def __init__(
        self, workers: Mapping[str, Worker], cases: Sequence[Case], rounds: int, base: str | None, model: str
    ) -> None:
        if base is not None and base not in workers:
            raise UsageError(f"The base {base!r} isn't measured; use one of: {', '.join(workers)}.")
        self._workers = workers
        self._cases = cases
        self._rounds = rounds
        self._base = base or ("transformers" if "transformers" in workers else next(iter(workers)))
        self._model = model

    def rows(self, progress: Progress) -> Iterator[Row]:
        """The rows of each case when it ends; after the last category, those of all categories."""
        progress("warming up", 0, 0)
        shortest = min((case.prompts[0] for case in self._cases), key=lambda one: len(one["tokens"]))
        warm = Case("", [shortest], self._cases[0].new)  # one whole answer, so that the control has measured latencies
        for worker in self._workers.values():
            worker.write(warm, warm.prompts)
        turns, done = Turns(), 0
        total = self._rounds * sum(len(case.turns) * len(self._able(case)) for case in self._cases)
        chats: list[tuple[Case, dict[str, list[Took]]]] = []
        wanted = sum(case.chat for case in self._cases)
        for case in self._cases:
            writers: dict[str, Callable[[Any], Took]] = {
                name: partial(self._workers[name].write, case) for name in self._able(case)
            }
            rounds: dict[str, list[Took]] = {name: [] for name in writers}
            for _ in range(self._rounds):
                sums = dict.fromkeys(writers, Took())
                for prompts in case.turns:

                    def tell(name: str, case: Case = case) -> None:
                        nonlocal done
                        progress(f"{case.name}: {name}", done, total)
                        done += 1

                    for name, took in turns.write(writers, prompts, tell).items():
                        sums[name] += took
                for name, took in sums.items():
                    rounds[name].append(took)
            yield from self._case_rows(case, rounds)
            if case.chat:
                chats.append((case, rounds))
                if 1 < wanted == len(chats):
                    yield from self._together(chats)

    def about(self) -> Row:
        first = self._cases[0]
        return {
            "model": self._model,
            "rounds": self._rounds,
            "max_new_tokens": first.new,
            "base": self._base,
            "engines": {name: worker.report() for name, worker in self._workers.items()},
        }

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_engines(rows, path)

    def _able(self, case: Case) -> list[str]:
        """The contenders that can run the case: those with batching, where it needs that."""
        return [name for name, worker in self._workers.items() if case.width == 1 or worker.contender.batches]

    def _together(self, chats: Sequence[tuple[Case, Mapping[str, Sequence[Took]]]]) -> Iterator[Row]:
        """All categories' rounds as one case."""
        first, names = chats[0][0], chats[0][1]
        rounds = {
            name: [sum(same, Took()) for same in zip(*(each[name] for _, each in chats), strict=True)] for name in names
        }
        every = [prompt for case, _ in chats for prompt in case.prompts]
        return self._case_rows(Case("all", every, first.new, 1, first.ends), rounds)

    def _case_rows(self, case: Case, rounds: Mapping[str, Sequence[Took]]) -> Iterator[Row]:
        """One row for each engine; spreads are over rounds."""
        against = rounds[self._base if self._base in rounds else next(iter(rounds))]
        for name, tooks in rounds.items():
            ratios = [one.rate / max(other.rate, 1e-9) for one, other in zip(tooks, against, strict=True)]
            yield {
                "case": case.name,
                "engine": name,
                "width": case.width,
                "prompts": len(case.prompts),
                "prompt_tokens": sum(len(prompt["tokens"]) for prompt in case.prompts) / len(case.prompts),  # mean
                "tokens": tooks[-1].tokens,  # of one round
                "tokens_per_second": spread([one.rate for one in tooks]),
                "ratio": spread(ratios),
                "first_token_seconds": spread([median(one.firsts) for one in tooks]) if tooks[0].firsts else None,
                "peak_bytes": self._workers[name].peak,  # of its whole process so far
            }
