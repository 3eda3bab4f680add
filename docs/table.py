"""README's table of measurements, made of the results in docs/benchmarks.

    python docs/table.py            print it
    python docs/table.py --write    put it into README.md

A row is there when its file is. A test holds that README has what this makes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("docs/benchmarks")
BEGIN, END = "<!-- made by docs/table.py -->\n", "<!-- to here -->\n"


def table(results: Path) -> str:
    """The lines of the table."""
    rows = []
    for name, make in MAKERS.items():
        path = results / name
        if path.exists():
            rows += [(what, said, name) for what, said in make(json.loads(path.read_text(encoding="utf-8")))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [
        ("what", "result", "file"), ("---",) * 3, *((what, said, f"`{name}`") for what, said, name in rows)
    ])  # fmt: skip


def plain(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    length = max(report["prompt_tokens"])
    where = "short prompts" if length < 100 else f"{length:,} tokens"
    said = f"{report['ratio']['median']:.2f} times"
    if length < 100:
        yield f"plain decoding in {report['dtype']}, {where}", f"{said} transformers' `generate`"
    else:
        yield f"the same at {where}", said


def drafters(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    ratios = {row["category"]: row["ratio"] for row in report["results"] if row["drafter"] == "auto"}
    whole = {row["drafter"]: row for row in report["results"] if row["category"] == "all"}
    overall = ratios.pop("all")
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    yield (
        f"`--drafter auto` in {report['dtype']}, {whole['auto']['prompts']} first turns of Spec-Bench, against `none`",
        f"{overall:.2f} times; by category {ratios[least]:.2f} ({least}) to {ratios[most]:.2f} ({most})",
    )
    if (peer := whole.get("transformers prompt lookup")) is not None:
        times = whole["auto"]["tokens_per_second"] / peer["tokens_per_second"]
        yield "the same against transformers' prompt lookup", f"{times:.2f} times"


def passes(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    dtypes = list(dict.fromkeys(row["dtype"] for row in report["results"]))

    def listed(texts: list[int], rows: list[int]) -> str:
        ms = {(row["dtype"], row["texts"], row["rows"]): row["ms"] for row in report["results"]}
        places = [(each, row) for each in texts for row in rows]
        return "; ".join(f"{dtype} {', '.join(f'{ms[dtype, *place]:.1f}' for place in places)}" for dtype in dtypes)

    yield "ms of a pass over 1, 9, 16 and 64 tokens of a text", listed([1], [1, 9, 16, 64])
    yield "ms of a pass of 1, 8 and 16 texts", listed([1, 8, 16], [1])
    worse = 100 * (report["perplexity"]["int8"] / report["perplexity"]["bf16"] - 1)
    yield f"perplexity of int8 over bf16's, {report['tokens']:,} tokens of `{report['text']}`", f"{worse:+.1f} %"


def batch(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    ratios = report["ratios"]
    yield (
        f"{report['prompts']} chats 16 at once in {report['dtype']}, against one at a time",
        f"{ratios['16 over one at a time, both none']:.2f} times, with `auto` in both "
        f"{ratios['16 over one at a time, both auto']:.2f}",
    )
    yield (
        f"the same with `auto` against transformers' batches of 8 in {report['dtype of transformers']}",
        f"{ratios['16 with auto over transformers']:.2f} times",
    )


def caches(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    context = max(row["context"] for row in report["results"])
    by = {row["kind"]: row for row in report["results"] if row["context"] == context}

    def over(kind: str, name: str) -> float:
        return float(by[kind][name] / by["dense"][name])

    worse = [100 * (over(kind, "perplexity") - 1) for kind in ("int8", "int4")]
    nbytes, speed = (
        [over(kind, name) for kind in ("int8", "int4")] for name in ("bytes_per_token", "tokens_per_second")
    )
    yield (
        f"`--cache int8`, `int4` at {round(context, -3):,} tokens, against `dense`",
        f"{nbytes[0]:.2f} and {nbytes[1]:.2f} of the bytes, perplexity {worse[0]:+.1f} and {worse[1]:+.1f} %, "
        f"{speed[0]:.2f} and {speed[1]:.2f} of the speed",
    )


def engines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rows = report["results"]
    names = list(report["engines"])
    for case, width in dict.fromkeys((row["case"], row["width"]) for row in rows):
        mine = {row["engine"]: row for row in rows if (row["case"], row["width"]) == (case, width)}
        length = case.replace(",", "").isdigit()
        if not length and case != "all":
            continue
        what = f"tokens/s behind {case} tokens" if length else f"tokens/s in {mine[names[0]]['prompts']} chats"
        what += ", one at a time" if width == 1 else f", {width} at once"
        yield what, _listed(report, {name: f"{row['tokens_per_second']['median']:.1f}" for name, row in mine.items()})
        if length and width == 1:
            firsts = {name: f"{row['first_token_seconds']['median']:.2f}" for name, row in mine.items()}
            yield f"seconds to the first token behind {case} tokens", _listed(report, firsts)
    peaks = {name: max(row["peak_bytes"] for row in rows if row["engine"] == name) for name in names}
    yield "peak memory of the process, MiB", _listed(report, {name: f"{peaks[name] / 2**20:,.0f}" for name in names})


def _listed(report: dict[str, Any], values: dict[str, str]) -> str:
    """Each engine with its value; our settings as options."""
    said = []
    for name, value in values.items():
        told = report["engines"][name]
        own = "drafter" in told
        said.append(f"`{name.partition('/')[0]}` in {told['dtype']} {value}" if own else f"{name} {value}")
    return ", ".join(said)


MAKERS = {
    "engines.json": engines,
    "passes.json": passes,
    "plain.json": plain,
    "plain_7000.json": plain,
    "drafters.json": drafters,
    "drafters_bf16.json": drafters,
    "batch.json": batch,
    "cache.json": caches,
}


def written(readme: str, made: str) -> str:
    """README with this table in it."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(
            f"README.md lacks the lines {BEGIN.strip()} and {END.strip()}, between which the table stands."
        )
    return head + begin + made + end + tail


if __name__ == "__main__":
    made = table(ROOT / RESULTS)
    if "--write" in sys.argv[1:]:
        path = ROOT / "README.md"
        path.write_text(written(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made, end="")
