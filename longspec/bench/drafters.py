"""Drafters against plain decoding on a suite of prompts: tokens per step, acceptance, time, and the ratio to `none`.

Takes engines that share one loaded model and a suite of prompts by category; gives one frozen `Result` per category and
drafter. Every prompt is written by all of them in turns, the order rotated from prompt to prompt, so that what else the
machine does meets them alike. A rate is new tokens over the seconds from the end of the prefill to the last token: the
first step counts, since a draft can bring several tokens in it.

An engine's controller goes on learning from prompt to prompt, as it does in a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from longspec.engine.engine import Engine
from longspec.errors import UsageError

__all__ = ["Result", "measure", "prompt_lookup", "read_suite", "sample"]

Suite = Mapping[str, Sequence[str]]
"""Prompts by category."""


@dataclass(frozen=True, slots=True)
class Result:
    """One drafter on one category; seconds and counts are sums over its prompts."""

    category: str
    drafter: str
    prompts: int
    tokens: int
    seconds: float  # from the end of the prefill to the last token
    steps: int
    steps_without_a_bet: int
    drafted: int
    accepted: int
    draft_seconds: float
    verify_seconds: float
    different: int  # prompts whose text is not that of `none`: in bf16 a near-tie may fall otherwise

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: Result) -> Result:
        counted = [name for name in Result.__slots__ if name not in ("category", "drafter")]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in counted})


def read_suite(path: Path) -> dict[str, list[str]]:
    """The first turns of a Spec-Bench file, by category in the file's order.

    Raises:
        UsageError: a line is not an object with `category` and `turns`.
    """
    suite: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                said = json.loads(line)
                if not (isinstance(said, dict) and isinstance(said.get("category"), str) and said.get("turns")):
                    raise UsageError(f"{path}:{number} has no category and turns; a suite has one such object a line.")
                suite.setdefault(said["category"], []).append(str(said["turns"][0]))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} can't be read as a suite: {why}.") from error
    return suite


def sample(suite: Suite, count: int) -> dict[str, list[str]]:
    """At most `count` prompts of each category, evenly spread."""
    return {
        category: [prompts[i * len(prompts) // min(count, len(prompts))] for i in range(min(count, len(prompts)))]
        for category, prompts in suite.items()
    }


Write = Callable[[str], Result]


def measure(
    engines: Mapping[str, Engine], suite: Suite, new_tokens: int, peers: Mapping[str, Write] | None = None
) -> Iterator[Result]:
    """Results as categories end. engines: by drafter, `none` among them. peers: others that write a prompt."""
    writers: dict[str, Callable[[str], tuple[Result, tuple[int, ...]]]] = {
        name: _writer(name, engine, new_tokens) for name, engine in engines.items()
    }
    for name, peer in (peers or {}).items():
        writers[name] = lambda prompt, peer=peer: (peer(prompt), ())  # type: ignore[misc]
    names, turn = list(writers), 0
    for writer in writers.values():
        writer("Say hello.")  # warms up
    for category, prompts in suite.items():
        sums: dict[str, Result] = {}
        for prompt in prompts:
            written = {name: writers[name](prompt) for name in names[turn:] + names[:turn]}
            turn = (turn + 1) % len(names)
            plain = written["none"][1]
            for name in names:
                one, tokens = written[name]
                one = replace(one, category=category, drafter=name, different=int(bool(tokens) and tokens != plain))
                sums[name] = sums[name] + one if name in sums else one
        yield from sums.values()


def _writer(name: str, engine: Engine, new_tokens: int) -> Callable[[str], tuple[Result, tuple[int, ...]]]:
    def write(prompt: str) -> tuple[Result, tuple[int, ...]]:
        session = engine.open(prompt, max_new_tokens=new_tokens, temperature=0)
        for _ in engine.write(session):
            pass
        assert session.prefilled is not None
        assert session.last_token is not None
        stats = session.stats
        return Result(
            "",
            name,
            1,
            len(session.answer),
            session.last_token - session.prefilled,
            stats.steps,
            stats.steps_without_a_bet,
            stats.drafted,
            stats.accepted,
            session.drafting,
            session.verifying,
            0,
        ), tuple(session.answer)

    return write


def prompt_lookup(folder: Path, engine: Engine, new_tokens: int) -> Write:
    """Transformers' generate with its prompt lookup, on the same prompts and dtype."""
    import torch
    import transformers
    from transformers.generation.streamers import BaseStreamer

    from longspec.model.load import DTYPES

    dtype = DTYPES[engine.model.dtype]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.puts: list[tuple[float, int]] = []  # when, and how many tokens

        def put(self, value: Any) -> None:
            self.puts.append((perf_counter(), value.numel()))

        def end(self) -> None:
            pass

    def write(prompt: str) -> Result:
        given, clock = torch.tensor([engine.open(prompt).tokens]), Clock()
        model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new_tokens,
            do_sample=False,
            prompt_lookup_num_tokens=10,
            eos_token_id=list(engine.model.end_tokens),
            pad_token_id=engine.model.end_tokens[0],
            streamer=clock,
        )
        _, (first, _), *rest = clock.puts  # the prompt, then the tokens of each step
        seconds = rest[-1][0] - first if rest else 0.0
        return Result("", "", 1, sum(count for _, count in rest), seconds, 1 + len(rest), 0, 0, 0, 0.0, 0.0, 0)

    return write
