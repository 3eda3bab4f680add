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
from statistics import median
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


def coded(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    where = {"avx2": "AVX2", "avx512": "AVX-512", "amx": "AMX", "neon": "NEON"}[report["instructions"]]
    for what, wrote, theirs, ratios in (
        ("plain decoding", "written_per_second", "llama_cpp_written_per_second", "written_ratios"),
        ("reading a prompt", "read_per_second", "llama_cpp_read_per_second", "read_ratios"),
    ):
        said = [
            f"{_short(each['file'])} {each[wrote]:.1f} and {each[theirs]:.1f} ({median(each[ratios]):.2f} times)"
            for each in report["files"]
        ]
        yield f"tokens/s of {what} with {where}, and llama.cpp's", ", ".join(said)


def _short(file: str) -> str:
    """A model of `coded.py` by its size."""
    return {"source.gguf": "135M"}.get(file) or next(part.upper() for part in file.split("-") if part.endswith("b"))


MAKERS = {"engines.json": engines, "coded_avx2.json": coded, "coded.json": coded}


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
