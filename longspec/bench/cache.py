"""Cache kinds against dense: bytes, perplexity, a needle test, tokens per second, and the share of the rows that steps
read from a store that were there before.

Takes a loaded engine and a text; gives one row per kind and context. All passes use the kinds' own stages: a position
attends in a prefill chunk to the same columns as in plain decoding, so a perplexity by chunks is that of decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch

from longspec.bench.harness import Column, Progress, Row, Table, spread
from longspec.bench.plot import draw_caches
from longspec.cache import CACHES
from longspec.cache.stage import BLOCK, Cache
from longspec.engine.engine import Engine
from longspec.errors import UsageError
from longspec.model.decoder import Rows, Span
from longspec.text.detokenizer import decode

__all__ = ["KINDS", "CacheWorkload"]

KINDS = [kind for kind in CACHES if " " not in kind]

_CHUNK = 8 * BLOCK
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NEEDLE = "The number of the old lighthouse is {number}. Remember it."
_QUESTION = "What is the number of the old lighthouse?"


class CacheWorkload:
    """Cache kinds on a text, at several contexts. Rates are medians; bytes are allocated bytes per committed row.

    Raises UsageError where the text is too short.
    """

    what = "kinds of cache: allocated bytes per committed row, perplexity, needles found, plain steps"
    table = Table(
        Column("cache", -7, "{kind}"),
        Column("context", 7, "{context:,}"),
        Column("bytes/token", 11, "{bytes_per_token:,.0f}"),
        Column("perplexity", 10, "{perplexity:.3f}"),
        Column("needles", 7, lambda row: f"{sum(row['needles'])} of {len(row['needles'])}"),
        Column("tokens/s", 8, "{tokens_per_second:.1f}"),
        Column("there early", 11, "{there_early:.0%}"),
    )

    def __init__(
        self, engine: Engine, text: str, contexts: Sequence[int], kinds: Sequence[str], *, needles: bool = True
    ) -> None:
        self._needles = _DEPTHS if needles else ()
        self._engine = engine
        self._text = text
        self._tokens = engine.model.vocabulary.encode(text, add_special=False)
        self._contexts = contexts
        self._kinds = kinds

    def rows(self, progress: Progress) -> Iterator[Row]:
        for context in self._contexts:
            if len(self._tokens) < context:
                raise UsageError(
                    f"The text has {len(self._tokens):,} tokens, and {context:,} are needed; give a longer one, or "
                    "--context."
                )
            for kind in self._kinds:
                progress(f"measuring {kind}", 0, 0)
                yield self._row(kind, context)

    def _row(self, kind: str, context: int) -> Row:
        cache = CACHES[kind](self._engine.model.decoder.shape)
        perplexity = _perplexity(self._engine, cache, self._tokens[: context - 32])
        before = _fetched(cache)
        times = spread(_step_times(self._engine, cache, self._tokens[context - 32 : context]))
        asked, missed = (now - then for now, then in zip(_fetched(cache), before, strict=True))
        return {
            "kind": kind,
            "context": context,
            "bytes_per_token": cache.nbytes / cache.length,
            "perplexity": perplexity,
            "needles": [_finds(self._engine, kind, self._text, context, depth) for depth in self._needles],
            "tokens_per_second": 1.0 / times["median"],
            "milliseconds": [1e3 * times[name] for name in ("least", "median", "most")],  # per step of one token
            "there_early": 1 - missed / asked if asked else None,  # of a store's rows, those that no step waited for
        }

    def about(self) -> Row:
        return {"model": self._engine.model.name, "dtype": self._engine.model.dtype}

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_caches(rows, path)


@torch.inference_mode()
def _feed(engine: Engine, cache: Cache, tokens: Sequence[int]) -> torch.Tensor:
    """Prefill these tokens; hidden states [r, width]."""
    stage = cache.open()
    rows = stage.add(range(-1, len(tokens) - 1))
    positions = torch.arange(cache.length, cache.length + len(tokens))
    long = torch.zeros(len(tokens), dtype=torch.bool)
    spans = [Span(stage, rows, slice(0, len(tokens)))]
    hidden = engine.model.decoder.forward(Rows(torch.tensor(tokens), positions, long, spans))
    cache.commit(stage, range(len(tokens)))
    return hidden


@torch.inference_mode()
def _perplexity(engine: Engine, cache: Cache, tokens: Sequence[int]) -> float:
    """The perplexity of all tokens but the first, each given those before it."""
    total = 0.0
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        hidden = _feed(engine, cache, chunk)
        following = torch.tensor(tokens[start + 1 : start + len(chunk) + 1])
        logits = engine.model.decoder.logits(hidden[: len(following)]).float()
        total -= torch.log_softmax(logits, -1).gather(1, following[:, None]).double().sum().item()
    return math.exp(total / (len(tokens) - 1))


@torch.inference_mode()
def _step_times(engine: Engine, cache: Cache, tokens: Sequence[int]) -> list[float]:
    """Seconds of plain steps, with head and sampling; the first two are warm-up."""
    times = []
    for token in tokens:
        began = perf_counter()
        engine.model.decoder.logits(_feed(engine, cache, [token])).argmax(-1).tolist()
        times.append(perf_counter() - began)
    return times[2:]


def _fetched(cache: Cache) -> tuple[int, int]:
    """The store's rows that passes chose, and those that they waited for; 0 without a store."""
    fetched = getattr(cache, "fetched", None)
    return (0, 0) if fetched is None else (fetched.asked, fetched.missed)


def _finds(engine: Engine, kind: str, text: str, context: int, depth: float) -> bool:
    """Whether the answer names a number placed at `depth` (0 to 1) of a haystack of about `context` tokens."""
    vocabulary = engine.model.vocabulary
    number = str(4000 + int(depth * 977))
    needle = _NEEDLE.format(number=number)
    hay = vocabulary.encode(text, add_special=False)[: context - 160]
    at = int(len(hay) * depth)
    story = f"{decode(vocabulary, hay[:at])}\n\n{needle}\n\n{decode(vocabulary, hay[at:])}\n\n{_QUESTION}"
    prompt = vocabulary.encode(vocabulary.chat([{"role": "user", "content": story}]), add_special=False)
    cache = CACHES[kind](engine.model.decoder.shape)
    for start in range(0, len(prompt), _CHUNK):
        hidden = _feed(engine, cache, prompt[start : start + _CHUNK])
    answer: list[int] = []
    for _ in range(24):
        answer += engine.model.decoder.logits(hidden[-1:]).argmax(-1).tolist()
        if answer[-1] in engine.model.end_tokens:
            break
        hidden = _feed(engine, cache, answer[-1:])
    return number in decode(vocabulary, answer)
