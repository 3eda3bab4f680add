r"""What `--accept semantic` does to answers and to speed, on problems in words (GSM8K's test set).

    python docs/benchmarks/semantic.py prompts --data train_prompts.jsonl --output build/problems.jsonl
    longspec train semantic -m TARGET --draft-model DRAFT --prompts build/problems.jsonl --tokens 12k -o build/probe
    python docs/benchmarks/semantic.py run --target TARGET --draft DRAFT --probe build/probe \
        --data gsm8k_test_200.jsonl --work build/semantic --output docs/benchmarks/semantic.json

    alone      the target alone: --drafter none
    small      the draft model alone, for its accuracy
    exact      exact speculation with the same pair: --drafter auto, which is model+ngram and recycle+ngram
    steps      exact speculation with whole steps: what semantic does where its probe accepts nothing
    semantic   --accept semantic

Answers are greedy, and right if their last number is the problem's. Accuracy is of many problems, sixteen side by side;
exact speculation's is the target's own, whose texts it writes. Speeds are of some problems, one at a time, all ways in
turns, by the process's own time, which leaves other processes out, and by the wall clock. Work is kept after each
problem, so that --seconds makes a long run of several short ones.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspec.engine.engine import Engine
from longspec.machine.files import replaced
from longspec.model.load import Model, open_model
from longspec.semantic.meaning import numbers
from longspec.semantic.probe import load_probe
from longspec.semantic.steps import STEP_TOKENS

FORM = "{}\nReason step by step, one short step a line. End with a line that says: Answer: NUMBER"
TOKENS, SIDE_BY_SIDE = 256, 16
WAYS = ("alone", "exact", "steps", "semantic")


def problems(path: Path) -> Iterator[tuple[str, float]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        yield said["question"], float(said["answer"].split("####")[1].replace(",", ""))


def loaded(name: str, dtype: str) -> Model:
    opened = open_model(name, dtype=dtype, device="cpu")
    opened.set_threads(1)
    return opened.load()


def engines(target: Model, draft: Model, probe: str) -> dict[str, Engine]:
    steps: dict[str, Any] = {
        "options": {"draft": draft, "steps": True},
        "draft_tokens": STEP_TOKENS,
        "control": "fixed",
    }
    return {
        "alone": Engine(target, drafter="none"),
        "small": Engine(draft, drafter="none"),
        "exact": Engine(target, drafter="auto", options={"draft": draft}),
        "steps": Engine(target, drafter="model+ngram", **steps),
        "semantic": Engine(target, drafter="model+ngram", judge=load_probe(probe, target, draft), **steps),
    }


def answer_of(text: str) -> float | None:
    found = numbers(re.sub(r"(?<=\d) (?=\d{3}\b)", "", text))
    return found[-1] if found else None


class Work:
    """What was measured, in one file of lines."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.until = folder / "work.jsonl", time.monotonic() + seconds
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **what: Any) -> bool:
        return any(what.items() <= row.items() for row in self.rows)

    def keep(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.until


def write(work: Work, made: dict[str, Engine], tasks: list[tuple[str, float]], timed: int) -> None:
    """All that is lacking, as far as the time goes: speeds first."""
    for number, (question, gold) in enumerate(tasks[:timed]):
        ways = [way for way in WAYS if not work.has(kind="speed", way=way, problem=number)]
        for way in ways[number % 4 :] + ways[: number % 4]:
            if work.is_late:
                return
            speed(work, made[way], way, number, question, gold)
    for first in range(0, len(tasks), SIDE_BY_SIDE):
        group = tasks[first : first + SIDE_BY_SIDE]
        for way in ("semantic", "alone", "small"):
            if work.is_late:
                return
            if work.has(kind="answer", way=way, problem=first):
                continue
            asked = [FORM.format(question) for question, _ in group]
            done = dict(made[way].generate_many(asked, width=SIDE_BY_SIDE, temperature=0, max_new_tokens=TOKENS))
            for at, answer in sorted(done.items(), reverse=True):  # the first one last: it says that all are there
                right = answer_of(answer.text) == group[at][1]  # type: ignore[union-attr]
                said = answer.speculation  # type: ignore[union-attr]
                work.keep(
                    kind="answer", way=way, problem=first + at, right=right, tokens=len(answer.tokens),  # type: ignore[union-attr]
                    steps=said["steps"], drafted=said["drafted"], meant=said.get("meant", 0), text=answer.text,  # type: ignore[union-attr]
                )  # fmt: skip


def speed(work: Work, engine: Engine, way: str, number: int, question: str, gold: float) -> None:
    session = engine.open(FORM.format(question), temperature=0, max_new_tokens=TOKENS)
    for _ in engine.prefill(session):
        pass
    began, wall = time.process_time(), time.perf_counter()
    for _ in engine.write(session):
        pass
    own, wall = time.process_time() - began, time.perf_counter() - wall
    stats = session.stats
    work.keep(
        kind="speed", way=way, problem=number, tokens=len(session.answer), seconds=own, wall=wall, steps=stats.steps,
        drafted=stats.drafted, accepted=stats.accepted, meant=session.meant, drafting=session.drafting,
        verifying=session.verifying, right=answer_of(session.said) == gold, text=session.said,
    )  # fmt: skip


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [round(middle - half, 4), round(middle + half, 4)]


def interval(values: list[Any], of: Any) -> list[float]:
    """The 95 % interval of a statistic of paired values, by 2,000 bootstrap draws."""
    chance = random.Random(0)
    drawn = sorted(of(chance.choices(values, k=len(values))) for _ in range(2000))
    return [round(drawn[50], 4), round(drawn[1949], 4)]


def accuracy(rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = {way: {row["problem"]: row["right"] for row in rows if row["kind"] == "answer" and row["way"] == way}
             for way in ("alone", "semantic", "small")}  # fmt: skip
    both = sorted(right["alone"].keys() & right["semantic"].keys())
    pairs = [(right["semantic"][at], right["alone"][at]) for at in both]
    said: dict[str, Any] = {"problems": len(both)}
    for way, found in right.items():
        mine = [found[at] for at in both if at in found]
        if mine:
            said[way] = {"problems": len(mine), "accuracy": round(sum(mine) / len(mine), 4),
                         "interval": wilson(sum(mine), len(mine))}  # fmt: skip
    if pairs:
        points = lambda some: 100 * sum(a - b for a, b in some) / len(some)  # noqa: E731
        texts = {(row["way"], row["problem"]): row["text"] for row in rows if row["kind"] == "answer"}
        said["points_of_semantic_over_alone"] = round(points(pairs), 2)
        said["points_interval"] = interval(pairs, points)
        said["other_texts"] = sum(texts["alone", at] != texts["semantic", at] for at in both)
    return said


def speeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = {(row["way"], row["problem"]): row for row in rows if row["kind"] == "speed"}
    whole = [at for at in sorted({at for _, at in table}) if all((way, at) in table for way in WAYS)]
    said: dict[str, Any] = {"problems": len(whole)}
    for way in WAYS if whole else ():
        mine = [table[way, at] for at in whole]
        total = {name: sum(row[name] for row in mine) for name in mine[0] if isinstance(mine[0][name], int | float)}
        said[way] = {
            "tokens": total["tokens"],
            "tokens_per_second": round(total["tokens"] / total["seconds"], 3),
            "tokens_per_wall_second": round(total["tokens"] / total["wall"], 3),
            "tokens_per_pass": round(total["tokens"] / total["steps"], 3),
            "drafted_per_token": round(total["drafted"] / total["tokens"], 3),
            "meant_per_token": round(total["meant"] / total["tokens"], 3),
            "drafting_share": round(total["drafting"] / total["wall"], 3),
            "right": total["right"],
        }
        if way != "semantic":
            pairs = [(table["semantic", at], table[way, at]) for at in whole]
            said[way]["semantic_over_this"] = round(ratio(pairs), 3)
            said[way]["semantic_over_this_interval"] = interval(pairs, ratio)
    return said


def ratio(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Tokens per second of the first ones over that of the second ones."""
    rates = [
        sum(row["tokens"] for row in some) / sum(row["seconds"] for row in some) for some in zip(*pairs, strict=True)
    ]
    return rates[0] / rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["prompts", "run"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--target", default="")
    parser.add_argument("--draft", default="")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--probe", default="")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--timed", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1e9)
    asked = parser.parse_args()
    if asked.act == "prompts":
        lines = (json.loads(line) for line in asked.data.read_text(encoding="utf-8").splitlines())
        said = [json.dumps({"prompt": FORM.format(one["prompt"])}) for one in lines if one["source"] == "gsm8k"]
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text("\n".join(said) + "\n")
        return
    target = loaded(asked.target, asked.dtype)
    draft = loaded(asked.draft, target.dtype)
    made, work = engines(target, draft, asked.probe), Work(asked.work, asked.seconds)
    write(work, made, list(problems(asked.data))[: asked.problems], asked.timed)
    judge: Any = made["semantic"].judge
    result = {
        "what": "--accept semantic, greedy, on the first problems of GSM8K's test set; one thread",
        "target": target.name,
        "draft": draft.name,
        "dtype": target.dtype,
        "max_new_tokens": TOKENS,
        "probe": dict(judge.report),
        "accuracy": accuracy(work.rows),
        "speed": speeds(work.rows),
    }
    replaced(asked.output, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
