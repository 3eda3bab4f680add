"""What `make demo` shows: a question, its answer as it is drafted and verified, and the same by plain decoding.

    python docs/demo.py

Both write with the same model, in this process. That their texts are the same is checked, and the speeds are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

from longspec.cli.io.colour import can_colour, coloured
from longspec.engine.engine import Engine
from longspec.model.load import open_model
from longspec.text.prompt_template import read

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 200


def write(engine: Engine, question: str) -> tuple[str, float, float]:
    """Write the answer while it comes, what was drafted in colour: its text, tokens per second, tokens per step."""
    session = engine.open(question, max_new_tokens=TOKENS, temperature=0, stop="\n```")
    drafted = list[bool]()
    for commit in engine.write(session):
        drafted += [i < commit.accepted for i in range(len(commit.tokens))]
        begins, text = len(session.text) - len(commit.text), commit.text
        print(coloured(text, begins, session.begins, drafted) if can_colour() else text, end="", flush=True)
    print("\n")
    answer = engine.answer(session)
    return answer.text, answer.timing["tokens_per_second"] or 0.0, answer.speculation["tokens_per_step"]


def main() -> int:
    opened = open_model("smollm2")
    opened.set_threads()
    model = opened.load()
    question = read(ROOT / "prompts" / "demo.md").render("").strip()
    drafting, plain = Engine(model), Engine(model, drafter="none")
    for engine in (drafting, plain):  # pages and kernels are touched, and passes' costs learned, as by an earlier run
        engine.generate("Write a Python function that adds two numbers, and call it twice.", max_new_tokens=64)
    print(f"\033[1m{question}\033[0m\n" if sys.stdout.isatty() else f"{question}\n")
    text, rate, per_step = write(drafting, question)
    shown = "in colour was drafted" if can_colour() else "that was drafted"
    print(f"--- {shown}: {per_step:.1f} tokens per forward pass, {rate:.0f} a second. The same, one by one:\n")
    other, slower, _ = write(plain, question)
    if text != other:
        print("--- the texts differ, which must not be: please report it.")
        return 1
    print(f"--- same text, {rate / slower:.1f} times as fast ({rate:.0f} and {slower:.0f} tokens a second)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
