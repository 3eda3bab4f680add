"""The head of CONTRIBUTING.md: one file and one line, and everything of heads knows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.engines import engine, tiny
from support.heads import brought

from longspec.heads import KINDS
from longspec.training.course import start
from longspec.training.train import Recipe

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
PROMPTS = ["".join(chr(48 + (7 * i + 3 * j * j + j) % 40) for j in range(12 + i % 5)) for i in range(30)]
SAMPLED: dict[str, Any] = {"temperature": 0.3, "seed": 3, "raw": True}


def test_it_is_trained_kept_and_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    monkeypatch.setitem(KINDS, "probes", names["Probes"])
    model = tiny(tmp_path / "target", end_tokens=(), num_hidden_layers=1)
    recipe = Recipe(kind="probes", steps=20, tokens=6000, depth=3, window=96, validations=2)
    said = start(model, recipe, tmp_path / "head", PROMPTS, SAMPLED).run(lambda *_: None)
    assert said is not None
    untrained, begun, _ = brought(model, tmp_path / "head", recipe, SAMPLED)
    assert begun > untrained + 0.1
    texts = []
    for drafter in ("none", str(tmp_path / "head")):
        made = engine(model, drafter)
        session = made.open(PROMPTS[0], max_new_tokens=40, raw=True)
        for _ in made.write(session):
            pass
        texts.append(session.answer)
    assert texts[0] == texts[1]
    assert session.stats.accepted > 0
