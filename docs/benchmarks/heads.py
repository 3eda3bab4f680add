"""Every kind of head, trained under one budget from one folder of features, and evaluated alike: a row for each.

Takes a folder that `longspec train features` wrote, and a file of prompts like Spec-Bench. A kind has so many minutes
of one thread, as the process's own time counts them, so that other work on the machine takes nothing away: its start by
least squares, as many steps as a measured one says, and validations. Then it is counted and timed as `longspec bench
heads` does, beside its own start and the heads that come along for the model. What is done is kept in the results: the
same command goes on.

    python docs/benchmarks/heads.py --features DIR --suite FILE --work DIR --output docs/benchmarks/heads.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import torch

from longspec.bench.harness import Row, read_suite, report, sample
from longspec.bench.heads import HeadWorkload
from longspec.bench.plot import draw_heads
from longspec.heads import KINDS
from longspec.heads.accuracy import judged, worth
from longspec.heads.format import Trained, load_head, new_head, save_head, shipped
from longspec.heads.seen import halves
from longspec.model.load import Model, load_model
from longspec.training.course import start
from longspec.training.features import Features
from longspec.training.lanes import Lanes
from longspec.training.ridge import begin
from longspec.training.train import Recipe, frequent, ready, seconds_of_a_step

NEW_TOKENS = 96
VALIDATIONS = 4
ALONG = "comes along"


class Bench:
    what = "heads of all kinds, trained for as long from the same features, beside their starts and what comes along"

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.models = {dtype: load_model(given.model, dtype=dtype) for dtype in given.dtype or ("int8", "bf16")}
        self.model = self.models[max(self.models, key=("int8", "bf16", "fp32").index)]
        suite = read_suite(given.suite)
        self.counted, self.timed = (
            [prompt for some in sample(suite, count).values() for prompt in some]
            for count in (given.prompts, given.timed)
        )
        features = Features.open(given.features, self.model, "clover2")
        self.features = {**features.about, "texts": len(features), "rows": features.rows}
        self.rows: list[Row] = []
        if given.output.exists():
            self.rows = json.loads(given.output.read_text())["results"]

    def row(self, name: str) -> Row:
        """That of a head, made where there is none."""
        for row in self.rows:
            if row["head"] == name:
                return row
        self.rows.append({"head": name})
        return self.rows[-1]

    def keep(self, row: Row, **found: Any) -> None:
        row.update(found)
        print(json.dumps({"head": row["head"], **found}), flush=True)
        report(self, self.rows, self.given.output)

    def about(self) -> Row:
        given = self.given
        return {
            "features": self.features,
            "minutes_of_one_thread": given.minutes,
            "rate": given.rate,
            "products": "bf16" if halves(self.model) else "fp32",
            **self.counting().about(),
            "timed_prompts": len(self.timed),
            "rounds": given.rounds,
        }

    def counting(self, *folders: Path) -> HeadWorkload:
        return HeadWorkload(self.models, folders, self.counted, NEW_TOKENS, rounds=0)

    def train(self, kind: str) -> Row:
        """Train a kind in its folder; its start is kept in another one. What it took, and what its validations say."""
        model, given, began = self.model, self.given, process_time()
        features = Features.open(given.features, model, kind)
        recipe = Recipe(kind, draft_vocab=8192, rate=given.rate, validations=VALIDATIONS)
        opened = process_time()
        head = begun(model, features, recipe)
        save_head(given.work / "starts" / kind, ready(model, head), model)
        seconds_of_start = process_time() - opened
        held, opened = features.held(head.reads(model)), process_time()
        judged(model, head, held)
        judging = process_time() - opened
        with Lanes() as lanes:
            step = seconds_of_a_step(model, head, features, recipe, lanes, 20, clock=process_time)
        left = given.minutes * 60 - seconds_of_start - (VALIDATIONS + 1) * judging
        recipe = replace(recipe, steps=max(1, int(left / step / VALIDATIONS)) * VALIDATIONS)
        measured = process_time() - began
        course = start(model, recipe, given.work / kind, [], {}, features=given.features)
        began = process_time()
        found = course.run(lambda stage, done, total: None) or {}
        return {
            "steps": recipe.steps,
            "rows": round(recipe.steps * recipe.texts * features.rows / len(features)),
            "cpu_s": round(process_time() - began, 1),
            "measuring_cpu_s": round(measured, 1),
            "validated": {name: found[f"{name}tokens_per_step"] for name in ("untrained_", "begun_", "")},
            "validated_accuracy": found["accuracy"],
            "history": found["history"],
        }

    def validated(self, head: Trained) -> float:
        """Tokens per step of a validation's tree, as of the heads that are trained."""
        held = Features.open(self.given.features, self.model, head.kind).held(head.reads(self.model))
        return round(worth(head.module, judged(self.model, head, held)), 4)

    def run(self) -> None:
        alone = {f"{path.name}, as it {ALONG}": path for path in shipped(self.model).values()}
        folders = {**alone, **{kind: self.given.work / kind for kind in self.given.kind or KINDS}}
        for name, folder in folders.items():
            row = self.row(name)
            if name in KINDS and "training" not in row:
                self.keep(row, training=self.train(name))
            elif name not in KINDS and "validated" not in row:
                self.keep(row, validated=self.validated(load_head(folder, self.model)))
            if "tokens_per_step" not in row:
                (found,) = self.counting(folder).rows(lambda stage, done, total: None)
                self.keep(row, **{key: value for key, value in found.items() if key not in ("head", "ratio")})
        timing = HeadWorkload(self.models, [], self.timed, NEW_TOKENS, self.given.rounds)
        for name, folder in folders.items():
            row = self.row(name)
            if self.timed and "ratio" not in row:
                self.keep(row, ratio=timing.ratios(folder))
        for name in folders:
            row = self.row(name)
            if name in KINDS and "start" not in row:
                head = load_head(self.given.work / "starts" / name, self.model)
                steps, intervals = self.counting().steps(head, 0.0)
                self.keep(row, start={"tokens_per_step": steps, "tokens_per_step_95": intervals})


def begun(model: Model, features: Features, recipe: Recipe) -> Trained:
    """A head as least squares begin it."""
    tokens = frequent(features.texts(), recipe.draft_vocab, model.decoder.config.vocabulary, model.end_tokens)
    head = new_head(recipe.kind, model, depth=recipe.depth, window=recipe.window, tokens=tokens)
    with Lanes() as lanes:
        begin(model, head, features, lanes)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="the heads, and the work on them")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", action="append", help="int8 and bf16, if left out; one for training is needed")
    parser.add_argument("--kind", action="append", help="of these alone; may be repeated")
    parser.add_argument("--minutes", type=float, default=40, help="of one thread, for each kind")
    parser.add_argument("--rate", type=float, default=Recipe().rate)
    parser.add_argument("--prompts", type=int, default=5, help="of each category, that are counted on")
    parser.add_argument("--timed", type=int, default=1, help="of each category; 0: none are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given)
    bench.run()
    draw_heads([row for row in bench.rows if "tokens_per_step" in row], given.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
