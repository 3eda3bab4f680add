"""Search for the sub-layers that `skip` should leave out, for one model on this machine; the best sets are measured.

Takes a loaded model, a length of context and a time budget in seconds; gives the best sets with their expected and
measured speed-ups. The target writes calibration texts; each sub-layer's latency is measured at a context of that
length; sets are evaluated on the texts, random ones first and then those that optuna's TPE proposes (Draft & Verify,
2309.08168, whose objective is measured speed; here it is the expected speed, so that a trial takes a fraction of a
second). The best few then decode other prompts, interleaved with plain decoding. The best of many trials is partly
luck (winner's curse): trust the measured speed-up.

Letters: a, c, r and g as in `longspec.drafters.common.skip_speedup`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from longspec.drafters.common.skip_speedup import MOST, Prices, agreement, gain, influence, nested, united
from longspec.drafters.layer_skip import Skipping
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import LongspecError, UsageError
from longspec.model.decoder import Chunk, Decoder, Rows, Skip
from longspec.model.load import Model
from longspec.text.prompt import encode

__all__ = [
    "CHECKS",
    "NOTES",
    "PROMPTS",
    "Tuned",
    "Tuning",
    "load_optuna",
    "prices",
    "search",
    "tune",
    "verify",
    "write",
]

Report = Callable[[str, int, int], None]

NEW = 64
"""Tokens that each text is written on for, and that a set is tried on."""

MOST_SETS = 200
"""Sets that are tried at most."""

_VERIFIED = 3  # sets that are measured
_WRITING, _SEARCHING = 0.2, 0.7  # shares of the time budget at which writing, and then searching, ends
_ROUNDS = 12  # maximum number of prompts for measured sets
_SWEEPS = 7  # measurements of each latency, of which the median counts
_RANDOM = 16  # trials before TPE's own proposals

PROMPTS = (
    "Explain in plain words how a refrigerator moves heat from the inside to the outside.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "A train leaves at 9:40 and arrives at 13:05 after two stops of ten minutes. How long did it move? Think aloud.",
    "Write a Python function that returns the longest word of a text, and explain how it works.",
    "List the steps of planting a small vegetable garden, from choosing the place to the first harvest.",
    "Summarise what a government's budget is, who decides on it, and why it matters to a citizen.",
    "Compare travelling by night train and by plane between two large cities: time, price, comfort.",
    "Write a polite letter to a landlord about a heating that has been broken for two weeks.",
)
CHECKS = (
    "Describe the water cycle to a ten-year-old, with an example of each step.",
    "Write a Python class for a bank account with deposits, withdrawals and a history.",
    "What should one think of before adopting a dog? Give reasons for each point.",
)
NOTES = (
    "Notes of the day. The market opened at seven and the first carts came from the river with fish, bread and early "
    "apples. At nine the rain began; the council met in the old hall and spoke about the bridge, whose two arches need "
    "new stone before winter. Forty workers were asked for, and twenty-six have agreed. In the evening the school "
    "showed its collection of maps, the oldest of which names every farm along the northern road.\n\n"
)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A set with its statistics."""

    skip: Skip
    share: float  # c
    agreement: float  # a, on the calibration texts
    expected: float  # speed-up over plain decoding
    measured: float | None = None  # the same, measured


@dataclass(frozen=True, slots=True)
class Tuning:
    """The result of a search. The first set is the best."""

    sets: tuple[Tuned, ...]
    tried: int
    texts: int
    prices: Prices
    tokens_per_second: float  # plain decoding


def tune(model: Model, *, context: int, seconds: float, report: Report) -> Tuning:
    """Search and measure. context: tokens of each sequence, its answer included. seconds: approximate time budget.

    Raises:
        UsageError: such a context is too short for the prompts, or optuna is missing.
        LongspecError: the model ended every text at once.
    """
    load_optuna()
    began, decoder = perf_counter(), model.decoder
    texts = list(write(model, context, began + _WRITING * seconds, report))
    report("measuring sub-layers", 0, 0)
    paid = prices(decoder, texts[-1])
    found = search(decoder, texts, paid, began + _SEARCHING * seconds, report)
    ratios, plain = verify(model, [one.skip for one in found[:_VERIFIED]], context, began + seconds, report)
    sets = [
        Tuned(one.skip, one.share, one.agreement, one.expected, ratio)
        for one, ratio in zip(found, ratios, strict=False)
    ]
    sets.sort(key=lambda one: -(one.measured or 0.0))
    return Tuning(tuple(sets), len(found), len(texts), paid, plain)


def write(model: Model, context: int, until: float, report: Report) -> Iterator[Session]:
    """The target's greedy answers to the built-in prompts: one at least, more until `until`."""
    engine, some = Engine(model, drafter="none", cache="dense"), False
    for done, prompt in enumerate(PROMPTS):
        report("writing calibration texts", done, len(PROMPTS))
        if some and perf_counter() >= until:
            break
        session = _opened(engine, prompt, context)
        for _ in engine.write(session):
            pass
        if len(session.answer) > 1:
            some = True
            yield session
    if not some:
        raise LongspecError(f"{model.name} ends every text at once, so that there is nothing to try sets on.")


@torch.inference_mode()
def prices(decoder: Decoder, text: Session) -> Prices:
    """The latency in seconds of each sub-layer for one token after this sequence, and the cost of each further
    position.
    """
    layers = range(decoder.config.layers)
    ones = [frozenset({i}) for i in layers]
    kinds = [[Skip() for _ in ones], [Skip(mlp=one) for one in ones], [Skip(attention=one) for one in ones]]
    calls: list[float] = []  # a pass without layers
    heads: list[float] = []
    passes: dict[int, list[float]] = {1: [], 1 + MOST: []}  # by number of positions

    def rows(count: int) -> Rows:
        stage, length = text.cache.open(), text.cache.length
        chunk = Chunk(stage, stage.add(range(-1, count - 1)), [text.tokens[length]] * count, length, text.long)
        return Rows.of([chunk], decoder.device)

    def seconds(call: Callable[..., Any], *given: Any) -> float:
        began = perf_counter()
        call(*given)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)
        return perf_counter() - began

    def sweep(kind: Sequence[Skip]) -> list[float]:
        """Measure all layers in turn, so that no layer's weights are still in the processor's cache."""
        one = rows(1)
        hidden = decoder.forward(one, last=0)
        took = [seconds(decoder.forward, one, hidden, i, i + 1, kind[i]) for i in layers]
        calls.append(seconds(decoder.forward, one, hidden, 0, 0))
        heads.append(seconds(decoder.logits, hidden))
        return took

    def full(count: int) -> float:
        some = rows(count)
        return seconds(lambda: decoder.logits(decoder.forward(some)))

    sweeps: list[list[list[float]]] = [[] for _ in kinds]
    for _ in range(_SWEEPS):
        for times, kind in zip(sweeps, kinds, strict=True):
            times.append(sweep(kind))
        for count in passes:
            passes[count].append(full(count))
    whole, attention, mlp = (
        tuple(max(median(layer) - median(calls), 1e-9) for layer in zip(*times, strict=True)) for times in sweeps
    )
    row = max(0.0, (median(passes[1 + MOST]) / median(passes[1]) - 1) / MOST)
    return Prices(whole, attention, mlp, median(heads), row)


def search(decoder: Decoder, texts: Sequence[Session], paid: Prices, until: float, report: Report) -> list[Tuned]:
    """The sets tried on the texts, by expected speed-up; as many as `until` allows, a few at least."""
    optuna = load_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    counts = [len(text.answer) for text in texts]
    moved = [
        influence(decoder, text.cache, text.tokens, count, long=text.long)
        for text, count in zip(texts, counts, strict=True)
    ]
    mean = [[sum(values) / len(moved) for values in zip(*kind, strict=True)] for kind in zip(*moved, strict=True)]
    units = nested(paid, (mean[0], mean[1]))
    sizes = sorted({max(1, round(len(units) * i / 12)) for i in range(1, 10)})
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=len(sizes) + _RANDOM)
    )
    for size in sizes:  # first, for each size, the sub-layers that change the hidden state least
        study.enqueue_trial({str(i): i < size for i in range(len(units))})
    found: dict[Skip, Tuned] = {}
    for done in range(MOST_SETS):
        report("trying sets", done, MOST_SETS)
        if done >= len(sizes) and perf_counter() >= until:
            break
        trial = study.ask()
        skip = united([unit for i, unit in enumerate(units) if trial.suggest_categorical(str(i), (False, True))])
        if skip not in found:
            agreed = sum(
                agreement(decoder, text.cache, text.tokens, count, skip, long=text.long)
                for text, count in zip(texts, counts, strict=True)
            )
            share, part = agreed / sum(counts), paid.share(skip)
            found[skip] = Tuned(skip, part, share, gain(share, part, paid.row))
        study.tell(trial, found[skip].expected)
    return sorted((one for one in found.values() if len(one.skip)), key=lambda one: -one.expected)


def verify(
    model: Model, skips: Sequence[Skip], context: int, until: float, report: Report
) -> tuple[list[float], float]:
    """Each set's speed-up, and plain decoding's tokens per second: medians over prompts answered in turn.

    One prompt at least, more until `until`.
    """
    engines = [Engine(model, drafter="none", cache="dense")]
    for skip in skips:
        engines.append(Engine(model, drafter=Skipping(model.decoder, skip), cache="dense", control="fixed"))
    rates: list[list[float]] = []
    while not rates or (perf_counter() < until and len(rates) < _ROUNDS):
        report("measuring the best sets", len(rates), _ROUNDS)
        turn = [0.0] * len(engines)
        for at in range(len(engines)):
            which = (at + len(rates)) % len(engines)
            turn[which] = rate(engines[which], CHECKS[len(rates) % len(CHECKS)], context)
        rates.append(turn)
    ratios = [median(turn[which] / turn[0] for turn in rates) for which in range(1, len(engines))]
    return ratios, median(turn[0] for turn in rates)


def rate(engine: Engine, prompt: str, context: int | None) -> float:
    """Tokens per second from the end of the prefill to the last token. context: None is the prompt alone."""
    session = _opened(engine, prompt, context)
    for _ in engine.write(session):
        pass
    assert session.prefilled is not None
    assert session.last_token is not None
    return len(session.answer) / (session.last_token - session.prefilled)


def _opened(engine: Engine, question: str, context: int | None) -> Session:
    """A session whose prompt has as many notes as leave room for NEW tokens in the context; None: no notes."""
    vocabulary = engine.model.vocabulary

    def length(prompt: str) -> int:
        return len(encode(vocabulary, prompt, raw=raw))

    raw = False
    try:
        alone = length(question)
    except UsageError:  # no chat template
        raw = True
        alone = length(question)
    room = 0 if context is None else context - NEW - alone
    if room < 0:
        raise UsageError(f"A context of {context} tokens is too short to tune for: a prompt has {alone} tokens and "
                         f"{NEW} follow it; ask for {alone + NEW} or more.")  # fmt: skip
    count = room // max(1, length(NOTES + question) - alone)
    while count and length(NOTES * count + question) > alone + room:
        count -= 1
    return engine.open(NOTES * count + question, raw=raw, max_new_tokens=NEW, temperature=0, repetition_penalty=1.0)


def load_optuna() -> Any:
    """The module. Raises UsageError where it isn't installed."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError("Tuning needs optuna: pip install 'longspec[tune]'.") from error
    return optuna
