"""Drafters against plain decoding on a suite of prompts: tokens per step, acceptance, time, and the speed-up over
`none`.

Takes engines that share one loaded model and a suite of prompts by category; gives one row per category and drafter.
A rate is new tokens over the seconds from the end of the prefill to the last token: the first step counts, since a
draft can bring several tokens in it. An engine's control goes on learning from prompt to prompt, as it does in a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from longspec.bench.harness import Column, Progress, Row, Suite, Table, Took, Turns, setup_of
from longspec.bench.plot import draw_drafters
from longspec.bench.process import Worker, single
from longspec.engine.engine import Engine

__all__ = ["DrafterWorkload"]


class DrafterWorkload:
    """Engines by drafter, `none` among them, and peers in processes of their own; answers are greedy."""

    what = "drafters on first turns, one prompt at a time, greedy, in turns"
    table = Table(
        Column("category", -17, "{category}"),
        Column("drafter", -20, "{drafter}"),
        Column("tokens/step", 11, "{tokens_per_step:.2f}"),
        Column("acceptance", 10, "{acceptance:.2f}"),
        Column("draft s", 7, "{draft_seconds:.1f}"),
        Column("verify s", 8, "{verify_seconds:.1f}"),
        Column("tokens/s", 8, "{tokens_per_second:.1f}"),
        Column("ratio", 5, "{ratio:.2f}"),
    )

    def __init__(
        self, engines: Mapping[str, Engine], suite: Suite, new_tokens: int, peers: Mapping[str, Worker]
    ) -> None:
        self._plain = engines["none"]
        self._suite = suite
        self._new = new_tokens
        self._texts: dict[str, list[int]] = {}  # each drafter's last answer
        self._writers: dict[str, Callable[[str], Took]] = {
            **{name: self._writer(name, engine) for name, engine in engines.items()},
            **{name: partial(self._ask, worker) for name, worker in peers.items()},
        }

    def rows(self, progress: Progress) -> Iterator[Row]:
        for writer in self._writers.values():
            writer("Say hello.")  # warm-up
        totals, turns, done = dict.fromkeys(self._writers, Took()), Turns(), 0
        total = sum(map(len, self._suite.values()))
        for category, prompts in self._suite.items():
            sums = dict.fromkeys(self._writers, Took())
            for prompt in prompts:
                self._texts.clear()
                took = turns.write(self._writers, prompt, lambda name, done=done: progress(name, done, total))  # type: ignore[misc]
                done += 1
                for name, one in took.items():
                    other = self._texts.get(name, self._texts["none"]) != self._texts["none"]
                    sums[name] += replace(one, different=int(other), firsts=())
            for name, each in sums.items():
                totals[name] += each
            yield from _rows(category, sums)
        yield from _rows("all", totals)

    def about(self) -> Row:
        return setup_of(self._plain, self._new)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_drafters(rows, path)

    def _writer(self, name: str, engine: Engine) -> Callable[[str], Took]:
        def write(prompt: str) -> Took:
            session = engine.open(prompt, max_new_tokens=self._new, temperature=0)
            for _ in engine.write(session):
                pass
            assert session.prefilled is not None
            assert session.last_token is not None
            self._texts[name] = session.answer
            stats = session.stats
            return Took(
                prompts=1,
                tokens=len(session.answer),
                seconds=session.last_token - session.prefilled,
                steps=stats.steps,
                steps_without_a_bet=stats.steps_without_a_bet,
                drafted=stats.drafted,
                accepted=stats.accepted,
                draft_seconds=session.drafting,
                verify_seconds=session.verifying,
            )

        return write

    def _ask(self, worker: Worker, prompt: str) -> Took:
        return worker.write(*single(self._plain.model, prompt, self._new))


def _rows(category: str, sums: Mapping[str, Took]) -> Iterator[Row]:
    for name, took in sums.items():
        counts = {key: value for key, value in asdict(took).items() if key != "firsts"}
        yield {
            "category": category,
            "drafter": name,
            **counts,
            "tokens_per_second": took.rate,
            "ratio": took.rate / max(sums["none"].rate, 1e-9),
            "tokens_per_step": took.tokens / took.steps if took.steps else None,
            "acceptance": took.accepted / took.drafted if took.drafted else None,
        }
