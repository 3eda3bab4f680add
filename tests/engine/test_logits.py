"""What is told of logits and what changes them: exact under speculation, with every drafter that bets hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.engines import RandomTrees, engine, prompts, tiny
from torch import Tensor

from longspec.engine.engine import Engine
from longspec.errors import UsageError
from longspec.model.load import Model

TEXT = prompts(1, 60)[0]
SAMPLED: dict[str, Any] = {"raw": True, "max_new_tokens": 40, "temperature": 0.9, "seed": 4}
GREEDY: dict[str, Any] = {"raw": True, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


def drafted(model: Model, **options: Any) -> Engine:
    """An engine whose drafts are long trees, the right continuation among them."""
    right = engine(model).generate(TEXT, **options).tokens
    prompt = engine(model).open(TEXT, **options).tokens
    return engine(model, RandomTrees({"": [*prompt, *right]}))


def row_bound(logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
    """A processor that bans each row's last tokens, and needs the right path for it."""
    logits = logits.clone()
    for row, path in zip(logits, paths, strict=True):
        row[list(path[-3:])] = -torch.inf
    return logits


@pytest.mark.parametrize("options", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize(
    "changes",
    [
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.2, "frequency_penalty": 0.1},
        {"logit_bias": {20: 4.0, 30: -100}},
        {"processors": [row_bound]},
    ],
    ids=["frequency", "presence", "bias", "processor"],
)
def test_changed_logits_are_exact_under_speculation(
    model: Model, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    asked = {**options, **changes}
    plain = engine(model).generate(TEXT, **asked)
    assert plain.tokens != engine(model).generate(TEXT, **options).tokens
    answer = drafted(model, **asked).generate(TEXT, **asked)
    assert answer.tokens == plain.tokens
    assert answer.speculation["accepted"] > 5
    assert engine(model, "recycle+ngram").generate(TEXT, **asked).tokens == plain.tokens


def test_penalties_are_openais(model: Model) -> None:
    """A naive loop over the model's own logits."""
    made = engine(model)
    answer = made.generate(TEXT, frequency_penalty=0.5, presence_penalty=0.3, **GREEDY)
    tokens, count = made.open(TEXT, raw=True).tokens, dict[int, int]()
    for token in answer.tokens:
        logits = torch.tensor(whole(made, tokens))
        for seen, times in count.items():
            logits[seen] -= 0.5 * times + 0.3
        assert int(logits.argmax()) == token
        count[token] = count.get(token, 0) + 1
        tokens.append(token)


def whole(made: Engine, tokens: list[int]) -> list[float]:
    """The logits behind these tokens, by one pass over all of them."""
    from longspec.engine.forward import Input, logits_of

    session = made.open("x", raw=True)
    session.tokens = tokens
    with torch.inference_mode():
        found: list[float] = logits_of([Input.of(session, tokens)], made.model.decoder)[0].tolist()
    return found


@pytest.mark.parametrize("options", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_log_probabilities_are_those_of_plain_decoding(model: Model, options: dict[str, Any]) -> None:
    plain = engine(model).generate(TEXT, logprobs=3, **options)
    assert plain.logprobs is not None
    assert [one.token for one in plain.logprobs] == list(plain.tokens)
    answer = drafted(model, **options).generate(TEXT, logprobs=3, **options)
    assert answer.speculation["accepted"] > 5
    assert answer.logprobs is not None
    for one, other in zip(plain.logprobs, answer.logprobs, strict=True):
        assert (one.token, [token for token, _ in one.top]) == (other.token, [token for token, _ in other.top])
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    tokens = engine(model).open(TEXT, raw=True).tokens
    first = torch.log_softmax(torch.tensor(whole(engine(model), tokens)), -1)
    assert plain.logprobs[0].logprob == pytest.approx(float(first[plain.tokens[0]]), abs=1e-4)
    assert engine(model).generate(TEXT, **options).logprobs is None


def test_log_probabilities_end_with_the_answer(model: Model) -> None:
    whole = engine(model).generate(TEXT, **GREEDY).text
    answer = engine(model).generate(TEXT, logprobs=0, stop=whole[5:8], **GREEDY)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.tokens) == 5
    assert answer.logprobs[0].top == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"logprobs": 21}, "logprobs is 21; it must be 0 to 20"),
        ({"logit_bias": {10_000: 1}}, "logit_bias names the token 10000"),
        ({"logit_bias": {3: 101}}, "must be a number from -100 to 100"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1"),
    ],
)
def test_what_is_out_of_range_is_refused(model: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        engine(model).generate(TEXT, **options)


@pytest.mark.parametrize("cache", ["dense", "int8"])
def test_texts_are_scored(model: Model, cache: str) -> None:
    made, text = engine(model, cache=cache), "AbCdEf" * 30
    [score] = made.score([text])
    tokens = made.open(text, raw=True).tokens
    assert list(score.tokens) == tokens[1:]
    for place in (1, 5, 63, 64, 65, 150):
        falling = torch.log_softmax(torch.tensor(whole(engine(model), tokens[:place])), -1)
        assert score.logprobs[place - 1] == pytest.approx(
            float(falling[tokens[place]]), abs=1e-3 if cache == "dense" else 0.5
        )
    assert score.perplexity == pytest.approx(float(torch.tensor(score.logprobs).mean().neg().exp()), rel=1e-4)
    [answered] = made.score(["AbC"], prompt="Why?")
    assert len(answered.logprobs) == 3
    with pytest.raises(UsageError, match="no token to score"):
        made.score([""], prompt="Why?")
