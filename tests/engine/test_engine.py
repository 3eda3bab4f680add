"""Losslessness: whatever is drafted, however many sessions share a pass, the tokens are those of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from support.engines import RandomTrees, engine, every_drafter, finish, fits, prompts, tiny

import longspec.engine.forward as module
from longspec.cache import BLOCK, CACHES
from longspec.errors import ContextError, UsageError
from longspec.model.load import Model
from longspec.sampling.verify import verify
from longspec.text.detokenizer import decode
from longspec.types import Draft, Drafter, Verdict

GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 5}
PENALISED: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2}
WAYS = {"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED, "greedy penalised": {"repetition_penalty": 1.3}}
NEW = BLOCK + 9
"""Behind prompts of 150 to 184 tokens, each text crosses a border of blocks, and the third one two."""


FAMILIES = ["llama", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("tiny"), request.param, end_tokens=())


def opened(made: Any, count: int, way: dict[str, Any], new: int = NEW, **options: Any) -> list[Any]:
    texts = prompts(count)
    return [
        made.open(text, raw=True, key=str(i), max_new_tokens=new + i, **{**way, **options})
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def plain(model: Model) -> Callable[..., dict[str, list[int]]]:
    """Plain decoding, session by session: the texts that every other way must give, by session key."""

    @cache
    def texts(way: str, cache: str = "dense") -> dict[str, list[int]]:
        made = engine(model, "none", cache=cache)
        return {session.key: finish(made, [session])[0] for session in opened(made, 3, WAYS[way])}

    return texts


_GREEDY = "ngram", "random trees", "always right"  # every drafter's greedy texts are in constraints/test_constraint.py
_ELSEWHERE = ("ngram", "greedy"), ("random trees", "sampled")  # than in a dense cache
_HYBRIDS = ["qwen3_5", "lfm2"]
_MIXTURES = ["qwen3_moe", "qwen3_5_moe", "gpt_oss"]
_LOOPED = ["ouro"]
_IN_LOOPED = [
    ("pipeline", "dense"),
    ("pipeline", "int4"),
    ("pipeline", "offload"),
    ("exit", "dense"),
    ("skip", "dense"),
]
_SHARED = ["gemma4"]
_IN_SHARED = [
    ("random trees", "dense"),
    ("skip", "dense"),
    ("exit", "dense"),
    ("random trees", "int4"),
    ("ngram", "offload"),
]
_IN_MIXTURES = [("random trees", "dense"), ("ngram", "dense")]
_IN_HYBRIDS = [("random trees", "dense"), ("exit", "dense"), ("model", "dense"), ("random trees", "int4")]


def _matrix() -> Iterator[Any]:
    """Every family, drafter, cache and way, for one session and three; what is alike is left to the full matrix."""
    families = [*FAMILIES, *_HYBRIDS, *_MIXTURES, *_LOOPED, *_SHARED]
    for family, drafter, kind, way, count in product(families, every_drafter({}), CACHES, WAYS, (1, 3)):
        llama = family == "llama"
        if not fits(drafter, family):
            continue
        if family in _LOOPED:
            usual = (drafter, kind) in _IN_LOOPED and way == "sampled"
        elif family in _HYBRIDS:
            usual = family == "qwen3_5" and (drafter, kind) in _IN_HYBRIDS and way == "sampled"
        elif family in _MIXTURES:
            usual = family in ("qwen3_moe", "gpt_oss") and (drafter, kind) in _IN_MIXTURES and way == "sampled"
        elif family in _SHARED:
            if drafter == "mtp":  # which it can't have
                continue
            usual = (drafter, kind) in _IN_SHARED and way == "sampled"
        elif kind == "dense":
            usual = way == "sampled" or (llama and way == "greedy" and drafter in _GREEDY)
        else:
            usual = llama and (drafter, way) in _ELSEWHERE
        marks: Any = [] if usual and count == 3 else pytest.mark.full
        yield pytest.param(family, drafter, kind, way, count, marks=marks)


@pytest.mark.parametrize(("model", "drafter", "cache", "way", "count"), list(_matrix()), indirect=["model"])
def test_the_tokens_are_those_of_plain_decoding(
    model: Model, plain: Any, drafter: str, cache: str, way: str, count: int
) -> None:
    texts = plain(way, cache)
    made = engine(model, every_drafter(texts)[drafter](), cache=cache, draft_tokens=24)
    sessions = opened(made, count, WAYS[way])
    assert finish(made, sessions) == [texts[session.key] for session in sessions]
    total = sum((session.stats for session in sessions[1:]), sessions[0].stats)
    assert total.committed == total.accepted + total.steps
    if drafter == "always right":
        assert total.tokens_per_step > 8
    if drafter == "always wrong":
        assert total.drafted > 0


@pytest.mark.parametrize("drafter", ["random trees", "ngram"])
def test_strict_tokens_are_those_of_strict_plain_decoding(tmp_path: Path, drafter: str) -> None:
    """Bit for bit: not the tokens only, but the logits that chose them."""
    model = tiny(tmp_path, "gemma3", end_tokens=(), strict=True)
    seen: dict[str, dict[int, torch.Tensor]] = {}

    def written(name: str, drafter: Any) -> list[list[int]]:
        made = engine(model, drafter, draft_tokens=12)
        logits, rows = made.model.decoder.logits, seen.setdefault(name, {})

        def recording(hidden: torch.Tensor) -> torch.Tensor:
            out = logits(hidden)
            rows[len(sessions[0].tokens)] = out[0].clone()  # the row after the text
            return out

        object.__setattr__(made.model.decoder, "logits", recording)
        try:
            sessions = opened(made, 1, GREEDY, new=2 * BLOCK + 9)
            return finish(made, sessions)
        finally:
            object.__setattr__(made.model.decoder, "logits", logits)

    want = written("none", "none")
    assert written("bets", every_drafter({"0": want[0]})[drafter]()) == want
    shared = seen["none"].keys() & seen["bets"].keys()
    assert len(shared) > 20
    assert all(torch.equal(seen["none"][at], seen["bets"][at]) for at in shared)


@pytest.mark.parametrize("broken", ["keeps all", "no correction", "bonus of another row"])
def test_a_broken_verifier_is_noticed(model: Model, plain: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "verify", _broken[broken])
    for way in ("greedy", "sampled"):
        made = engine(model, RandomTrees(plain(way)), draft_tokens=24)
        sessions = opened(made, 1, WAYS[way])
        assert finish(made, sessions) != [plain(way)["0"]]


def _keeps_all(tokens: Any, parents: Any, choices: Any) -> Verdict:
    kept, at = [], -1
    for i, parent in enumerate(parents):
        if parent == at:
            kept.append(i)
            at = i
    return Verdict(tuple(kept), choices[at + 1])


def _no_correction(tokens: Any, parents: Any, choices: Any) -> Verdict:
    verdict = _real(tokens, parents, choices)
    wrong = [tokens[i] for i, p in enumerate(parents) if p == (verdict.kept[-1] if verdict.kept else -1)]
    return Verdict(verdict.kept, wrong[0] if wrong else verdict.bonus)


def _another_row(tokens: Any, parents: Any, choices: Any) -> Verdict:
    return Verdict(_real(tokens, parents, choices).kept, choices[-1])


_real = verify
_broken = {"keeps all": _keeps_all, "no correction": _no_correction, "bonus of another row": _another_row}


class Likely(Drafter):
    """Bets on what is likely anyhow, so that a verifier that believes it shifts the distribution."""

    def begin(self, session: Any) -> None:
        pass

    def observe(self, session: Any, commit: Any, verdict: Any) -> None:
        pass

    def propose(self, sessions: Any, limits: Any, ahead: Any = None) -> list[Draft]:
        tree = Draft.tree([5, 7, 5, 9, 7], [-1, -1, 0, 0, 1])
        return [tree if limit >= 5 else Draft.tree([5, 7, 9][:limit], [-1] * min(limit, 3)) for limit in limits]


@pytest.mark.parametrize("draws", [2000, pytest.param(6000, marks=pytest.mark.full)])
def test_sampled_pairs_follow_the_enumerated_distribution(
    draws: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafting, verification and sampler together: thousands of sessions in shared passes against all pairs of tokens.

    Fixed seed, alpha 1e-6, cells with at least 5 expected. A verifier that believes every draft is rejected.
    """
    model = tiny(tmp_path, "llama", end_tokens=(), vocab_size=12, num_hidden_layers=2)
    prompt, temperature = "058213", 1.5

    def counted(draws: int) -> torch.Tensor:
        made = engine(model, Likely(), draft_tokens=8)
        counts = torch.zeros(144)
        for start in range(0, draws, 1000):
            options: dict[str, Any] = {"raw": True, "max_new_tokens": 3, "temperature": temperature, "seed": 3}
            sessions = [made.open(prompt, key=str(start + i), **options) for i in range(1000)]
            for tokens in finish(made, sessions):
                counts[tokens[-3] * 12 + tokens[-2]] += 1
        return counts

    made = engine(model)
    probabilities = torch.zeros(12, 12, dtype=torch.float64)
    with torch.inference_mode():
        from support.passes import feed

        tokens = model.vocabulary.encode(prompt, add_special=True)
        for first in range(12):
            logits = feed(model.decoder, CACHES["dense"](model.decoder.shape), [*tokens, first])[1].double()
            one, two = torch.softmax(logits[-2:] / temperature, -1)
            probabilities[first] = one[first] * two
    assert made.context == 512

    def p_value(counts: torch.Tensor) -> float:
        expected = probabilities.flatten() * counts.sum()
        big = expected >= 5
        observed, wanted = [*counts[big].tolist(), 0.0], [*expected[big].tolist(), 0.0]
        observed[-1], wanted[-1] = float(counts[~big].sum()), float(expected[~big].sum())
        return float(stats.chisquare(observed, [w * sum(observed) / sum(wanted) for w in wanted]).pvalue)

    assert p_value(counted(draws)) > 1e-6
    monkeypatch.setattr(module, "verify", _keeps_all)
    assert p_value(counted(1000)) < 1e-6


def test_a_text_ends_at_its_end_token_wherever_it_stands(tmp_path: Path, plain: Any, model: Model) -> None:
    """The end token is one that plain decoding wrote; a draft that holds it in the middle must not write past it."""
    text = plain("sampled")["0"]
    start = len(text) - NEW
    for place in (0, 7, 40):
        end = text[start + place]
        want = text[: text.index(end, start) + 1]
        ending = Model("tiny", "fp32", model.decoder, model.vocabulary, (end,), {}, {})
        for drafter in ("none", RandomTrees(plain("sampled"), right=1.0)):
            made = engine(ending, drafter, draft_tokens=24)
            sessions = opened(made, 1, SAMPLED)
            assert finish(made, sessions) == [want]
            assert sessions[0].finish_reason == "stop"
            assert sessions[0].text == decode(model.vocabulary, want[start:-1])


@pytest.mark.parametrize("drafter", ["none", "ngram", "right"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_across_steps_ends_text_tokens_and_cache_alike(
    model: Model, plain: Any, drafter: str, length: int
) -> None:
    text = plain("sampled")["0"]
    start = len(text) - NEW
    answer = decode(model.vocabulary, text[start:])
    for place in (0, 9, 23, 24, 25, 60):
        stop = answer[place : place + length]
        want = answer[: answer.index(stop)]
        bets = RandomTrees(plain("sampled"), right=1.0) if drafter == "right" else drafter
        made = engine(model, bets, draft_tokens=24)
        session = opened(made, 1, SAMPLED, stop=[stop, "\x00never"])[0]
        shown = "".join(commit.text for commit in made.write(session))
        assert session.finish_reason == "stop"
        assert session.text == shown == want
        begins = [len(decode(model.vocabulary, text[start : start + i])) for i in range(NEW)]
        kept = sum(begin < len(want) for begin in begins)  # tokens that begin before the stop string
        assert session.tokens == text[: start + kept]
        assert session.cache.length < len(session.tokens)
        assert made.answer(session).usage["completion_tokens"] == kept


def test_a_finished_text_goes_on_where_it_was_cut(model: Model, plain: Any) -> None:
    """A limit, a stop string and more room: the cache holds what the text holds, so it can go on."""
    text = plain("greedy")["0"]
    made = engine(model, RandomTrees(plain("greedy")), draft_tokens=24)
    session = opened(made, 1, GREEDY)[0]
    limit = session.limit
    for room in (1, 2, 30, 64, limit):
        session.limit = min(limit, session.prompt_length + room)
        session.finish_reason = None
        finish(made, [session])
        assert session.finish_reason == "length"
        assert session.tokens == text[: session.limit]


def test_a_long_prompt_is_prefilled_in_chunks_that_end_at_blocks(model: Model) -> None:
    made = engine(model)
    assert list(made.prefill(made.open("0" * 500, raw=True))) == [499]
    made.prefill_rows = 128
    assert list(made.prefill(made.open("0" * 511, raw=True))) == [128, 256, 384, 510]


def test_a_seed_and_a_key_give_the_same_text_and_others_another(model: Model) -> None:
    made = engine(model, "ngram")

    def answer(**options: Any) -> Any:
        return made.generate("0123456789", raw=True, max_new_tokens=40, temperature=1.5, **options).tokens

    assert answer(seed=1) == answer(seed=1)
    assert answer(seed=1) != answer(seed=2)
    assert answer(seed=1, key="a") != answer(seed=1, key="b")


def test_what_does_not_fit_the_context_is_refused_with_both_numbers(model: Model) -> None:
    made = engine(model)
    with pytest.raises(ContextError, match=r"600 tokens.*512"):
        made.open("0" * 600, raw=True)
    with pytest.raises(ContextError, match=r"10 tokens and 503 new ones.*513 together.*512"):
        made.open("0" * 10, raw=True, max_new_tokens=503)
    assert made.open("0" * 10, raw=True, max_new_tokens=502).limit == 512
    assert made.open("0" * 10, raw=True).limit == 512


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"stop": [""]}, "stop string is empty"),
     ({"temperature": -1.0}, "temperature is -1.0"), ({"raw": True, "system": "x"}, "raw prompt is one text")],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(model: Model, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        engine(model).open("0123", **options)


def test_unknown_names_are_refused_with_the_known_ones(model: Model) -> None:
    with pytest.raises(UsageError, match=r"'oracle'.*ngram"):
        engine(model, "oracle")
    with pytest.raises(UsageError, match=r"'float3'.*dense"):
        engine(model, cache="float3")


def test_generate_and_stream_write_the_same_text(model: Model) -> None:
    made = engine(model, "ngram")
    answer = made.generate([{"role": "user", "content": "01230123"}], max_new_tokens=30)
    assert "".join(made.stream("01230123", max_new_tokens=30)) == answer.text
    assert len(answer.tokens) == answer.usage["completion_tokens"] == 30
    assert answer.finish_reason == "length"
    assert answer.usage["prompt_tokens"] == len("u01230123a")


def test_an_interrupted_text_keeps_what_it_has(model: Model) -> None:
    made = engine(model)
    session = made.open("0123", raw=True, stop=["zzzzzz"])
    steps = made.write(session)
    shown = "".join(next(steps).text for _ in range(5))
    shown += session.interrupt().text
    answer = made.answer(session)
    assert answer.finish_reason == "interrupted"
    assert answer.text == shown == decode(model.vocabulary, answer.tokens)
