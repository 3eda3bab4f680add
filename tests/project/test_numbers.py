"""What pages and help say in numbers is what the code does: a limit that is changed is changed in both."""

from __future__ import annotations

import re

import pytest
from support.commands import ROOT

from longspec.batch.job import AHEAD
from longspec.batch.lines import LINE_NBYTES
from longspec.calls import toolbox
from longspec.cli.commands import serve
from longspec.cli.io import prompt_input
from longspec.constraints.grammar import MOST_BYTES
from longspec.drafters import DRAFT_TOKENS
from longspec.engine.memory_guard import STEPS
from longspec.engine.scheduler import WIDTH
from longspec.requests import shapes
from longspec.requests.openai import MOST_STOPS
from longspec.server import asks, bodies, connection, listen, worker
from longspec.text import prompt_template, repetition

KIB, MIB = 1 << 10, 1 << 20
NUMBERS = {2: "two", 10: "ten"}
SAID = {
    "docs/reasoning.md": [
        f"at least {repetition.REPEATS} times ({repetition.FEWER} times if it has {repetition.LONG} tokens or more) "
        f"and {repetition.LEAST} tokens in all",
        f"fewer than {repetition.PLAIN} different tokens",
        f"must fill {repetition.LEAST_PLAIN} tokens",
        f"Runs of up to {repetition.FAR:,} tokens are seen",
    ],
    "docs/memory.md": [f"is looked at every {STEPS} steps"],
    "docs/drafters.md": [f"(1 to 64) are drafted in a step, {DRAFT_TOKENS} if left out"],
    "docs/batch.md": [
        f"writes N texts side by side ({WIDTH})",
        f"{LINE_NBYTES:,} bytes",
        f"at most {('one', 'two', 'three', 'four', 'five')[AHEAD - 1]} times the batch size of answers wait",
    ],
    "docs/constrained.md": [f"more than {MOST_BYTES / MIB:.0f} MiB of either"],
    "docs/prompts.md": [
        f"may have {prompt_template._MOST_TEMPLATE_NBYTES / KIB:.0f} KiB, "
        f"what it makes {prompt_template._MOST_PROMPT_LETTERS / MIB:.0f} Mi letters"
    ],
    "docs/serve.md": [
        f"may have {bodies.MOST_NBYTES / MIB:.0f} MiB and {bodies.BODY_SECONDS:.0f} seconds to arrive",
        f"{bodies.MOST_VALUES:,} commas and opening brackets, {bodies.MOST_NAMES:,} names of fields",
        f"and at {bodies.VALUE_RATE:,} commas, brackets and names a second",
        f"{bodies.ALL_NBYTES / MIB:.0f} MiB together; bodies of {bodies.SMALL_NBYTES / KIB:.0f} KiB are always taken",
        f"behind {bodies.SMALL_NBYTES / KIB:.0f} KiB of a body is taken at {bodies.RATE / MIB:.0f} MiB a second",
        f"{connection.HEAD_SECONDS:.0f} seconds for its head to arrive, {connection.HEAD_NBYTES / KIB:.0f} KiB",
        f"{connection.MOST_CONNECTIONS} connections at each socket",
        f"{MOST_STOPS} stop strings",
        f"{shapes.MOST_MESSAGES:,} messages",
        f"{shapes.MOST_BIASES:,} tokens",
        f"{toolbox.MOST_TOOLS}, with {toolbox.MOST_NBYTES / KIB:.0f} KiB together",
        f"{toolbox.MOST_CALLS} calls in an answer",
        f"up to `--prefix-cache` MiB ({serve.Serving.prefix_cache})",
        f"running answers get {serve._GRACE_SECONDS:.0f} seconds",
        f"over {serve._GRACE_SECONDS + listen.LAST_SECONDS + serve._PASS_SECONDS:.0f} seconds after the signal",
        f"{asks._COMPLETION_TOKENS} tokens unless `max_tokens` says more",
        f"up to {NUMBERS[worker.SHELF_TIMES]} times as much",
        f"as far as {NUMBERS[int(worker.SHELF_SECONDS)]} seconds allow",
        f"unloaded when nobody has used it for `--idle` seconds ({serve._IDLE_SECONDS:.0f})",
    ],
    "docs/limits.md": ["(serve.md#limits)"],
    "docs/man/longspec-batch.1": [f"Write N texts side by side; {WIDTH} if left out."],
    "docs/man/longspec-run.1": [f"drafted in a step: 1 to 64, {DRAFT_TOKENS} if left out."],
    "docs/cli.md": [f"each part may have {prompt_input._MOST_NBYTES / MIB:.0f} MiB"],
}


@pytest.mark.parametrize("page", SAID)
def test_a_page_says_the_numbers_of_the_code(page: str) -> None:
    text = re.sub(r"\s+", " ", (ROOT / page).read_text(encoding="utf-8"))
    for words in SAID[page]:
        assert words in text
