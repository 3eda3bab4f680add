"""Draft lengths against batch sizes: tokens per second of so many texts side by side with so many drafted tokens.

Takes makers of engines by draft length that share one loaded model, and prompts; gives one row per batch size, with the
best length and how near the control comes to it. Su et al. (2310.18813) look lengths up in such a table: the larger the
batch, the shorter the best draft. All engines write all prompts in turn, greedily; a text that ends makes room for the
next one. Each turn has an engine of its own: drafters that have seen an answer draft it better than those that have to
write it. A rate is new tokens over seconds of decoding: prompts are read before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from longspec.bench.harness import Column, Progress, Row, Table, Took, Turns
from longspec.bench.plot import draw_batches
from longspec.bench.side_by_side import write_all
from longspec.engine.engine import Engine

__all__ = ["LENGTHS", "TEXTS", "BatchWorkload"]

TEXTS = (1, 2, 4, 8, 16)
LENGTHS = (0, 1, 2, 4, 8, 15)


class BatchWorkload:
    """fixed: makers of engines by the tokens that these always draft, 0 among them. auto: of one whose control decides,
    and keeps what it learnt of the costs, if it has a file for them.
    """

    what = "draft lengths by the number of texts side by side, greedy, in turns"

    def __init__(
        self,
        fixed: Mapping[int, Callable[[], Engine]],
        auto: Callable[[], Engine],
        prompts: Sequence[str],
        texts: Sequence[int],
        new_tokens: int,
        rounds: int,
    ) -> None:
        self._makers = {**{str(length): make for length, make in sorted(fixed.items())}, "auto": auto}
        self._auto = auto()
        self._prompts, self._texts, self._new, self._rounds = prompts, texts, new_tokens, rounds
        self._answers: dict[str, list[list[int]]] = {}  # what each wrote last
        self.table = Table(
            Column("texts", 5, "{texts}"),
            *(Column(name, 7, _cell(name)) for name in self._makers),
            Column("best", 4, "{best}"),
            Column("auto/best", 9, "{auto_over_best:.2f}"),
        )

    def rows(self, progress: Progress) -> Iterator[Row]:
        turns, done, total = Turns(), 0, len(self._texts) * self._rounds * len(self._makers)
        progress("warming up", 0, 0)
        for make in self._makers.values():
            self._write(make, "", self._texts[-1], self._prompts[: self._texts[-1]])
        for width in self._texts:
            writers: dict[str, Callable[[Sequence[str]], Took]] = {
                name: partial(self._write, make, name, width) for name, make in self._makers.items()
            }
            rounds = []
            for _ in range(self._rounds):

                def tell(name: str, width: int = width) -> None:
                    nonlocal done
                    progress(f"{width} texts, {name} drafted", done, total)
                    done += 1

                rounds.append(turns.write(writers, self._prompts, tell))
            yield self._row(width, rounds)

    def about(self) -> Row:
        model = self._auto.model
        return {
            "model": model.name,
            "dtype": model.dtype,
            "drafter": [*self._auto.speculator.drafters],
            "prompts": len(self._prompts),
            "max_new_tokens": self._new,
            "rounds": self._rounds,
        }

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_batches(rows, path)

    def _row(self, width: int, rounds: Sequence[Mapping[str, Took]]) -> Row:
        """One batch size: by name the medians over the rounds. A ratio is that of one round's rates."""
        last = rounds[-1]
        rates = {name: median(took[name].rate for took in rounds) for name in last}
        best = max((name for name in rates if name != "auto"), key=rates.__getitem__)
        return {
            "texts": width,
            "tokens": {name: took.tokens for name, took in last.items()},
            "seconds": {name: median(took[name].seconds for took in rounds) for name in last},
            "tokens_per_second": rates,
            "tokens_per_step": {name: took.tokens / took.steps for name, took in last.items() if took.steps},
            "different": {
                name: sum(one != other for one, other in zip(texts, self._answers["0"], strict=True))
                for name, texts in self._answers.items()
            },
            "best": int(best),
            "auto_over_best": median(took["auto"].rate / max(took[best].rate, 1e-9) for took in rounds),
        }

    def _write(self, make: Callable[[], Engine], name: str, width: int, prompts: Sequence[str]) -> Took:
        """All prompts' answers, `width` at a time."""
        engine = make()
        sessions = [
            engine.open(prompt, max_new_tokens=self._new, temperature=0, key=str(i)) for i, prompt in enumerate(prompts)
        ]
        seconds = write_all(engine, sessions, width)
        engine.keep_costs()
        if name:
            self._answers[name] = [session.answer for session in sessions]
        return Took(
            prompts=len(sessions),
            tokens=sum(len(session.answer) for session in sessions),
            seconds=seconds,
            steps=sum(session.stats.steps for session in sessions),
        )


def _cell(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['tokens_per_second'][name]:.1f}"
