"""The page of methods, made of longspec/methods.

    python docs/methods.py            # writes docs/methods.md

It is committed, so that other pages can lead to it; tests/project/test_methods.py holds that it is what this makes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from longspec.methods import GROUPS, Method  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
HEAD = """\
# Methods

What the literature of speculative decoding knows, and what longspec does of it. A row has the option that asks for
the method, or the reason why it isn't here; *planned* is what is meant to come. `longspec doctor` prints those that
are here.

The columns come from two surveys. *Drafter* ([2401.07851](https://arxiv.org/abs/2401.07851)): independent is what
stands beside the target, self what the target's own weights, hidden states or logits bring. *Centre*
([2411.13157](https://arxiv.org/abs/2411.13157)): model-centric methods change what drafts, draft-centric ones which
drafts there are. Where neither survey has a method, its place is ours. Numbers are arXiv's.
"""


def to_markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for title, rows in GROUPS.items() for line in _section(title, rows))])


def _section(title: str, rows: Sequence[Method]) -> Iterator[str]:
    yield from (f"## {title}", "", "| method | paper | drafter | centre | here |", "| --- | --- | --- | --- | --- |")
    for method in rows:
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        yield f"| {' | '.join((method.name, paper, method.drafter, method.centre, _here(method)))} |"
    yield ""


def _here(method: Method) -> str:
    if method.option:
        return f"`{method.option}`: {method.note}"
    return f"{'planned; ' if method.planned else ''}not here, because {method.note}"


if __name__ == "__main__":
    PAGE.write_text(to_markdown(), encoding="utf-8")
