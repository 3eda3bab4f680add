"""Trained heads beside each other: their size, how often they are right, and what they bring.

Takes heads in folders, one loaded target by dtype, and prompts; gives one row per head. Accuracy is by depth, behind
the true tokens of plain decoding's greedy answers. Tokens per step are counted with so many tokens drafted in every
step, of greedy and of sampled answers, each with a 95 % interval: that of the prompts drawn anew. Seconds are compared
with plain decoding's in turns, under the control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from longspec.bench.harness import Column, Progress, Row, Table, Took, Turns
from longspec.bench.plot import draw_heads
from longspec.bench.side_by_side import write_all
from longspec.drafters import drafter_of
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.heads.accuracy import accuracies, judged
from longspec.heads.format import Trained, load_head
from longspec.heads.seen import Seen, see
from longspec.model.load import Model

__all__ = ["DRAFTED", "HeadWorkload", "interval"]

DRAFTED = {"chain": 4, "tree": 15}
"""Tokens that are drafted in every step: what pays where rows are dear, and what fills a tile."""

TEMPERATURE = 0.8
WIDTHS = (1, 8)
SIDE_BY_SIDE = 8  # where only steps are counted
DRAWN = 2000  # times that the prompts are drawn anew for an interval


class HeadWorkload:
    """models: the target by dtype; accuracies and steps are those of the first one. rounds: 0 times nothing."""

    what = "trained heads: size, accuracy by depth, tokens per step, and speed beside plain decoding"
    table = Table(
        Column("head", -14, "{head}"),
        Column("M", 6, lambda row: f"{row['parameters'] / 1e6:.2f}"),
        Column("MB/draft", 8, lambda row: f"{row['bytes_read'] / 1e6:.1f}"),
        Column("right", -24, lambda row: " ".join(f"{share:.2f}" for share in row["accuracy"][:5])),
        Column("4", 5, "{tokens_per_step[chain]:.2f}"),
        Column("15", 5, "{tokens_per_step[tree]:.2f}"),
        Column("95 %", -10, lambda row: "{:.2f}-{:.2f}".format(*row["tokens_per_step_95"]["tree"])),
        Column("15, .8", 6, "{sampled_tokens_per_step[tree]:.2f}"),
        Column("ratios", -30, lambda row: " ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())),
    )

    def __init__(
        self, models: Mapping[str, Model], folders: Sequence[Path], prompts: Sequence[str], new_tokens: int, rounds: int
    ) -> None:
        self._models, self._prompts, self._new, self._rounds = models, prompts, new_tokens, rounds
        self._first = next(iter(models.values()))
        self._heads = {folder.name: (folder, load_head(folder, self._first)) for folder in folders}

    def rows(self, progress: Progress) -> Iterator[Row]:
        progress("plain", 0, len(self._heads))
        texts = self._texts()
        for done, (name, (folder, head)) in enumerate(self._heads.items()):
            progress(name, done, len(self._heads))
            weights, read = head.module.cost()
            rows, told = head.rows(self._first), judged(self._first, head, texts)
            steps, intervals = self.steps(head, 0.0)
            sampled, of_sampled = self.steps(head, TEMPERATURE)
            yield {
                "head": name,
                "kind": head.kind,
                "depth": head.depth,
                "reads": list(head.reads(self._first)),
                "draft_vocabulary": len(rows),
                "parameters": sum(value.numel() for value in head.module.parameters()),
                "bytes_read": 2 * (weights + read * rows.numel()),
                "accuracy": accuracies(told),
                "accuracy_among_3": accuracies(told, among=3),
                "tokens_per_step": steps,
                "tokens_per_step_95": intervals,
                "sampled_tokens_per_step": sampled,
                "sampled_tokens_per_step_95": of_sampled,
                "ratio": self.ratios(folder),
            }

    def about(self) -> Row:
        return {
            "model": self._first.name,
            "dtypes": list(self._models),
            "prompts": len(self._prompts),
            "max_new_tokens": self._new,
            "rounds": self._rounds,
            "temperature": TEMPERATURE,
            "drafted": DRAFTED,
        }

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_heads(rows, path)

    def _texts(self) -> list[Seen]:
        """Plain decoding's greedy answers behind their prompts, with what any of the heads reads."""
        layers = {layer for _, head in self._heads.values() for layer in head.reads(self._first)}
        sessions, _ = self._written(Engine(self._first, drafter="none"), SIDE_BY_SIDE, self._prompts)
        return [see(self._first, session.tokens, session.prompt_length, sorted(layers)) for session in sessions]

    def steps(self, head: Trained, temperature: float) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Tokens per step by the tokens that are drafted in each, and their intervals."""
        found, intervals = {}, {}
        for name, count in DRAFTED.items():
            drafter = drafter_of(self._first, head)
            engine = Engine(self._first, drafter=drafter, control="fixed", draft_tokens=count)
            sessions, _ = self._written(engine, SIDE_BY_SIDE, self._prompts, temperature)
            tokens, steps = [len(one.answer) for one in sessions], [one.stats.steps for one in sessions]
            found[name], intervals[name] = sum(tokens) / sum(steps), interval(tokens, steps)
        return found, intervals

    def ratios(self, folder: Path) -> dict[str, float]:
        """By dtype and texts side by side: tokens per second over plain decoding's, the median over the rounds."""
        return {
            f"{dtype}, {width}": self._ratio(model, folder, width)
            for dtype, model in self._models.items()
            if self._rounds
            for width in WIDTHS
        }

    def _ratio(self, model: Model, folder: Path, width: int) -> float:
        engines = {"none": Engine(model, drafter="none"), "head": Engine(model, drafter=str(folder.resolve()))}
        writers = {name: partial(self._write, engine, width) for name, engine in engines.items()}
        turns, some = Turns(), [self._prompts[at : at + width] for at in range(0, len(self._prompts), width)]
        turns.write(writers, some[0], lambda _: None)  # warm-up
        found = []
        for _ in range(self._rounds):
            took = [turns.write(writers, each, lambda _: None) for each in some]
            head, none = (sum((each[name] for each in took), Took()).rate for name in ("head", "none"))
            found.append(head / max(none, 1e-9))
        return median(found)

    def _write(self, engine: Engine, width: int, prompts: Sequence[str]) -> Took:
        sessions, seconds = self._written(engine, width, prompts)
        return Took(
            prompts=len(sessions),
            tokens=sum(len(session.answer) for session in sessions),
            seconds=seconds,
            steps=sum(session.stats.steps for session in sessions),
        )

    def _written(
        self, engine: Engine, width: int, prompts: Sequence[str], temperature: float = 0.0
    ) -> tuple[list[Session], float]:
        """The finished texts, and the seconds of their writing."""
        sessions = [
            engine.open(prompt, max_new_tokens=self._new, temperature=temperature, seed=0, key=str(i))
            for i, prompt in enumerate(prompts)
        ]
        return sessions, write_all(engine, sessions, width)


def interval(tokens: Sequence[int], steps: Sequence[int]) -> list[float]:
    """The 95 % interval of all tokens over all steps, by prompt: of so many drawn with replacement, the same ones each
    time (bootstrap).
    """
    drawn = torch.randint(len(tokens), (DRAWN, len(tokens)), generator=torch.Generator().manual_seed(0))
    summed = (torch.tensor(values, dtype=torch.float64)[drawn].sum(1) for values in (tokens, steps))
    ratios = next(summed) / next(summed)
    return [round(float(edge), 4) for edge in ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))]
