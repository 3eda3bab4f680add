"""Lookahead against a simulation that knows no tree: rows in every pass, tokens kept, and what its limits are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.engines import engine, prompts, tiny
from support.real import default

from longspec.cache import CACHES
from longspec.drafters.lookahead import Lookahead
from longspec.model.decoder import Chunk, Rows
from longspec.model.load import Model

Choose = Callable[[Sequence[int]], int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


def chooser(model: Model) -> Choose:
    """The greedy token after a text, by a pass over all of it."""
    known: dict[tuple[int, ...], int] = {}

    @torch.inference_mode()
    def choose(text: Sequence[int]) -> int:
        if (key := tuple(text)) not in known:
            decoder = model.decoder
            stage = CACHES["dense"](decoder.shape).open()
            staged = stage.add(range(-1, len(text) - 1))
            rows = Rows.of([Chunk(stage, staged, list(text), 0, False)], decoder.device)
            known[key] = int(decoder.logits(decoder.forward(rows)[-1:]).argmax())
        return known[key]

    return choose


def simulated(
    choose: Choose, prompt: list[int], new: int, limit: int, window: int, ngram: int, guesses: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """The text, and each step's draft tokens and kept ones. A draft is a set of runs behind the text; its rows are the
    runs' distinct beginnings.
    """
    text, steps = list(prompt), []
    size = window + ngram - 2
    line = (prompt[-size:] * size)[:size]
    columns = [line[j : j + ngram - 1] for j in range(window)]
    pool: dict[int, list[list[int]]] = {}

    def learn(first: int, run: list[int]) -> None:
        older = [other for other in pool.get(first, []) if other != run]
        pool[first] = [*older, run][-guesses:]

    for i in range(len(prompt) - ngram + 1):
        learn(prompt[i], prompt[i + 1 : i + ngram])
    while len(text) < len(prompt) + new:
        branches = min(limit, len(prompt) + new - len(text) - 1) // (ngram - 1)
        bets = pool.get(text[-1], [])[::-1][: min(guesses, branches // 2)]
        sent = columns[: branches - len(bets)]
        paths = [[column[0] for column in sent[:j]] + sent[j] for j in range(len(sent))]
        rows = {tuple(path[: n + 1]) for path in [*bets, *paths] for n in range(len(path))}
        ends = [choose([*text, *path]) for path in paths]
        kept: tuple[int, ...] = ()
        while (*kept, choose([*text, *kept])) in rows:
            kept = (*kept, choose([*text, *kept]))
        steps.append((len(rows), len(kept)))
        text = [*text, *kept, choose([*text, *kept])]
        for j, end in enumerate(ends):
            first, run = columns[j][0], [*columns[j][1:], end]
            learn(first, run)
            columns[j] = run
    return text, steps


def stepped(
    model: Model, drafter: Lookahead, prompt: str, new: int, limit: int, *, raw: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    made = engine(model, drafter, draft_tokens=limit)
    session = made.open(prompt, raw=raw, max_new_tokens=new, temperature=0)
    commits = list(made.write(session))
    return session.tokens, [(commit.drafted, commit.accepted) for commit in commits]


@pytest.mark.parametrize(
    ("limit", "window", "ngram", "guesses"), [(64, 5, 4, 5), (12, 7, 3, 7), (9, 2, 4, 1), (3, 5, 4, 5)]
)
def test_rows_and_kept_tokens_are_those_of_a_simulation(
    model: Model, limit: int, window: int, ngram: int, guesses: int
) -> None:
    prompt, new = prompts(1, 60)[0], 40
    made = stepped(model, Lookahead(window, ngram, guesses), prompt, new, limit, raw=True)
    tokens = engine(model).open(prompt, raw=True).tokens
    assert made == simulated(chooser(model), tokens, new, limit, window, ngram, guesses)


def test_something_is_kept(model: Model) -> None:
    """A tiny random model falls into a loop, which its guesses find."""
    _, steps = stepped(model, Lookahead(), prompts(1, 60)[0], 80, 42, raw=True)
    assert sum(kept for _, kept in steps) > len(steps) / 4


def test_what_the_prompt_says_again_is_drafted_from_the_first_step(model: Model) -> None:
    drafter = Lookahead(window=1, ngram=5, guesses=2)
    session = engine(model).open("ABCDEFGABCDEHIJA", raw=True)
    drafter.begin(session)
    (draft,) = drafter.propose([session], [12])
    a = session.tokens[0]
    children = [node for node, parent in enumerate(draft.parents.tolist()) if parent == -1]
    assert [int(draft.tokens[node]) for node in children][:1] == [a + 1]
    assert session.tokens[1:5] == draft.tokens[:4].tolist()
    assert {len(runs) for runs in drafter._carried[session].pool.values()} == {1, 2}


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_below_a_run_is_no_bet(model: Model, limit: int) -> None:
    session = engine(model).open(prompts(1)[0], raw=True)
    drafter = Lookahead()
    drafter.begin(session)
    assert [len(draft) for draft in drafter.propose([session], [limit])] == [0]


def test_a_prompt_of_one_token_will_do(model: Model) -> None:
    made = engine(model, Lookahead(), draft_tokens=24)
    plain = engine(model).generate("A", raw=True, max_new_tokens=12)
    assert made.generate("A", raw=True, max_new_tokens=12).tokens == plain.tokens


@pytest.mark.real
@pytest.mark.full
def test_counts_on_a_text_of_the_default_model() -> None:
    real = default("fp32")
    made = stepped(real, Lookahead(4, 4, 4), "Count from one to five.", 16, 24, raw=False)
    tokens = engine(real).open("Count from one to five.").tokens
    assert made == simulated(chooser(real), tokens, 16, 24, 4, 4, 4)
