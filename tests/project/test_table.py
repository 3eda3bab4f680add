"""README's measurements are those of the committed results."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "table.py"))


def test_readme_says_what_was_measured(script: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = script["table"](ROOT / "docs" / "benchmarks")
    assert script["written"](readme, made) == readme, "python docs/table.py --write puts the results into README.md"


def test_engines_have_their_rows(script: dict[str, Any], tmp_path: Path) -> None:
    def row(case: str, width: int, engine: str, rate: float) -> dict[str, Any]:
        first = {"median": 0.5} if width == 1 else None
        told = {"case": case, "width": width, "engine": engine, "prompts": 3, "peak_bytes": 300 << 20}
        return {**told, "tokens_per_second": {"median": rate}, "first_token_seconds": first}

    rows = [
        row(case, width, engine, rate)
        for case, width in (("writing", 1), ("all", 1), ("all", 8), ("2,048", 1))
        for engine, rate in (("none", 50.0), ("transformers", 20.25))
    ]
    told = {"none": {"drafter": "none", "dtype": "int8"}, "transformers": {"dtype": "bf16"}}
    (tmp_path / "engines.json").write_text(json.dumps({"engines": told, "results": rows}))
    assert script["table"](tmp_path).splitlines()[2:] == [
        "| tokens/s in 3 chats, one at a time | `none` in int8 50.0, transformers 20.2 | `engines.json` |",
        "| tokens/s in 3 chats, 8 at once | `none` in int8 50.0, transformers 20.2 | `engines.json` |",
        "| tokens/s behind 2,048 tokens, one at a time | `none` in int8 50.0, transformers 20.2 | `engines.json` |",
        "| seconds to the first token behind 2,048 tokens | `none` in int8 0.50, transformers 0.50 | `engines.json` |",
        "| peak memory of the process, MiB | `none` in int8 300, transformers 300 | `engines.json` |",
    ]
