"""The tokens of a looped model beside each other: LoopSpec's schedule without a model, and what a model makes of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.engines import engine, finish, of_folder, prompts, tiny
from support.native import SIZES

from longspec.cache.shape import Shape
from longspec.drafters.common.lanes import Lane, Lanes, Schedule
from longspec.drafters.pipeline import Pipeline
from longspec.drafters.spec import parse
from longspec.engine.forward import Input, logits_of
from longspec.errors import ModelError, UsageError
from longspec.model.config import Config
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model

Guess = Callable[[Lane, int], int]
"""Of a lane and the token that really comes next: what an early readout names."""

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


def truth(path: list[int]) -> int:
    """A text of its own behind every path: what is chosen behind a wrong token is wrong too."""
    return (7 * sum((i + 1) * token for i, token in enumerate(path)) + 3) % 50


def simulated(schedule: Schedule, guess: Guess, tokens: int) -> tuple[list[int], int, int]:
    """The text, the cycles that it took, and the most lanes at a time."""
    lanes, cycles, most = Lanes(schedule, 0, tokens), 0, 0
    while lanes.live:
        most, cycles, readers = max(most, len(lanes.live)), cycles + 1, lanes.advance()
        right = [truth(lane.path) for lane in readers]
        done = schedule.loops
        lanes.take(
            readers, [t if lane.done == done else guess(lane, t) for lane, t in zip(readers, right, strict=True)]
        )
    return lanes.chosen, cycles, most


def at_once(lane: Lane, token: int) -> int:
    return token


def never(lane: Lane, token: int) -> int:
    return -1 - lane.done - len(lane.path)  # each guess another one


def later(schedule: Schedule) -> Guess:
    return lambda lane, token: token if lane.done > schedule.stride else -1


SCHEDULES = [(4, 1, None), (4, 1, 2), (4, 1, 3), (4, 2, None), (8, 2, 2), (32, 2, None), (32, 2, 4)]


@pytest.mark.parametrize(
    ("loops", "stride", "second", "births"),
    [
        (4, 1, None, [1, 1, 1, 1]),
        (4, 1, 2, [1, 1, 2, 3]),
        (4, 1, 3, [1, 1, 1, 2]),
        (4, 2, None, [1, 1]),
        (32, 2, 4, [1, 1, 1, 1, 2, 3, 4, 5, 7, 10, 14, 19, 26, 36, 50, 69]),
    ],
)
def test_the_bounds_of_lanes(loops: int, stride: int, second: int | None, births: list[int]) -> None:
    schedule = Schedule(loops, stride, second)
    assert schedule.births == births
    assert schedule.most == sum(births)


@pytest.mark.parametrize(("loops", "stride", "second"), SCHEDULES)
def test_cycles_by_which_guess_is_right(loops: int, stride: int, second: int | None) -> None:
    """The first one: a token comes in every cycle, once the first is through. The second one: in every X. None: each
    takes all cycles of its own.
    """
    schedule, n = Schedule(loops, stride, second), 40
    want: list[int] = []
    for _ in range(n):
        want.append(truth(want))
    assert simulated(schedule, at_once, n) == (want, schedule.cycles + n - 1, schedule.cycles)
    text, cycles, most = simulated(schedule, never, n)
    assert (text, cycles) == (want, n * schedule.cycles)
    assert most == schedule.most  # every guess begins a lane
    if second is not None:
        assert simulated(schedule, later(schedule), n)[:2] == (want, schedule.cycles + (n - 1) * second)


@pytest.mark.parametrize(("loops", "stride", "second"), SCHEDULES[:-1])
def test_whatever_is_guessed_the_text_is_right_and_the_lanes_are_bounded(
    loops: int, stride: int, second: int | None
) -> None:
    schedule, chance = Schedule(loops, stride, second), random.Random(loops + stride)
    want: list[int] = []
    for _ in range(60):
        want.append(truth(want))
    for right in (0.2, 0.5, 0.9):

        def often(lane: Lane, token: int, right: float = right) -> int:
            return token if chance.random() < right else chance.randrange(50)

        text, cycles, most = simulated(schedule, often, 60)
        assert text == want
        assert most <= schedule.most
        assert schedule.cycles + 59 <= cycles <= 60 * schedule.cycles


def test_the_lane_of_the_token_that_is_chosen_goes_on_with_its_children() -> None:
    lanes = Lanes(Schedule(4, 1, 2), 9, most=10)
    lanes.take(lanes.advance(), [5])  # 9 guesses 5
    lanes.take(lanes.advance(), [6, 7])  # 9's second guess is 6; 5 guesses 7
    assert [lane.path for lane in lanes.live] == [[], [5], [6], [5, 7]]
    lanes.take(lanes.advance(), [7, 1, 2])  # 5 thinks so still; 6 guesses 1 and 7 guesses 2
    assert [lane.path for lane in lanes.live] == [[], [5], [6], [5, 7], [6, 1], [5, 7, 2]]
    lanes.take(lanes.advance(), [6, 1, 3, 4, 8])  # 9 is followed by 6
    assert [(lane.path, lane.done) for lane in lanes.live] == [([6], 2), ([6, 1], 1), ([6, 1, 4], 0)]
    assert lanes.chosen == [6]


def test_nothing_begins_behind_an_end() -> None:
    lanes = Lanes(Schedule(2), 9, most=10, ends=[2])
    lanes.take(lanes.advance(), [2])
    assert len(lanes.live) == 1
    lanes.take(lanes.advance(), [2])
    assert (lanes.live, lanes.chosen) == ([], [2])


@pytest.mark.parametrize(
    ("loops", "stride", "second"), [(4, 3, None), (4, 4, None), (4, 0, None), (4, 1, 4), (4, 1, 1)]
)
def test_schedules_that_can_not_be(loops: int, stride: int, second: int | None) -> None:
    with pytest.raises(ValueError, match=r"divide|between"):
        Schedule(loops, stride, second)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("looped"), "ouro", end_tokens=())


class Counted:
    """Counts a decoder's passes over its group of layers, and their rows."""

    def __init__(self, decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
        self.passes, self.rows = 0, list[int]()
        forward = Decoder.forward

        def counting(decoder: Decoder, rows: Rows, hidden: Any = None, first: int = 0, last: Any = None) -> Any:
            loops = ((decoder.config.layers if last is None else last) - first) // decoder.config.group
            self.passes += loops
            self.rows += [len(rows.tokens)] * loops
            return forward(decoder, rows, hidden, first, last)

        patch.setattr(Decoder, "forward", counting)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("named", ["pipeline", "pipeline:loops=2", "pipeline:second=2"])
def test_a_draft_is_what_the_target_writes(
    model: Model, named: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is kept, nothing is computed again, and no rows but the lanes' share a pass."""
    plain = engine(model, "none")
    (want,) = finish(plain, [plain.open(prompts(1)[0], raw=True, max_new_tokens=60, **options)])
    made = engine(model, named, draft_tokens=20)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=60, **options)
    for _ in made.prefill(session):
        pass
    counted = Counted(model.decoder, monkeypatch)
    (got,) = finish(made, [session])
    assert got == want
    assert session.stats.acceptance == 1.0
    schedule = made.speculator.drafters["pipeline"].schedule  # type: ignore[attr-defined]
    assert max(counted.rows) <= schedule.most
    assert counted.passes < 60 * schedule.loops


def test_lanes_that_ended_leave_no_trace(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers begin as NaN: a row that read what no row of its own path has put would show it."""
    empty = Shape.empty

    def poisoned(shape: Shape, size: Any, dtype: torch.dtype) -> torch.Tensor:
        return empty(shape, size, dtype).fill_(float("nan"))

    plain = engine(model, "none")
    want = [finish(plain, [plain.open(text, raw=True, max_new_tokens=50)])[0] for text in prompts(3)]
    monkeypatch.setattr(Shape, "empty", poisoned)
    for named in ("pipeline:second=2", "pipeline:second=3"):
        made = engine(model, named, draft_tokens=30)
        assert finish(made, [made.open(text, raw=True, max_new_tokens=50) for text in prompts(3)]) == want


@pytest.mark.parametrize("cache", ["dense", "int8", "offload"])
def test_the_rows_of_a_draft_give_the_logits_of_a_full_pass(model: Model, cache: str) -> None:
    made = engine(model, "none", cache=cache)
    sessions = [made.open(text, raw=True, max_new_tokens=60) for text in prompts(3)]
    for session in sessions:
        for _ in made.prefill(session):
            pass
    drafts = Pipeline(model.decoder, Schedule(4, 1, 2)).propose(sessions, [6, 1, 11])
    assert [len(draft) for draft in drafts] == [6, 1, 11]
    with torch.inference_mode():
        inputs = [Input.of(s, s.unfed, d) for s, d in zip(sessions, drafts, strict=True)]
        got = logits_of(inputs, model.decoder).split_with_sizes([one.choosing for one in inputs])
        for session, draft, own in zip(sessions, drafts, got, strict=True):
            stage, tokens = session.cache.open(), [*session.unfed, *draft.tokens.tolist()]
            staged = stage.add(range(-1, len(tokens) - 1))
            alone = Rows.of([Chunk(stage, staged, tokens, session.cache.length, False)], model.decoder.device)
            torch.testing.assert_close(own, model.decoder.logits(model.decoder.forward(alone)), atol=1e-5, rtol=1e-5)
    for one, draft in zip(inputs, drafts, strict=True):
        one.session.tokens += draft.tokens.tolist()
        assert one.commit(range(len(draft))) == list(range(len(draft)))  # all layers are there


@pytest.mark.parametrize("coded", [None, "Q8_0"])
@pytest.mark.parametrize("kind", ["dense", "int8"])
@pytest.mark.parametrize("second", [None, 2])
def test_the_kernels_bits_are_those_of_plain_decoding(
    tmp_path: Path, coded: str | None, kind: str, second: int | None
) -> None:
    """A row's bits don't depend on the lanes beside it, nor on lanes that ended: token by token gives the same."""
    folder = write(oracle("ouro", **SIZES), tmp_path)
    decoder = load(folder, torch.bfloat16, coded=coded)
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    made = engine(replace(of_folder(folder, ()), decoder=decoder, dtype="bf16"), "none", cache=kind)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=60)
    for _ in made.prefill(session):
        pass
    (draft,) = Pipeline(decoder, Schedule(4, 1, second)).propose([session], [24])
    with torch.inference_mode():
        got, want = logits_of([Input.of(session, session.unfed, draft)], decoder), []
        for token in [*session.unfed, *draft.tokens.tolist()]:
            stage = session.cache.open()
            rows = Rows.of([Chunk(stage, stage.add([-1]), [token], session.cache.length, False)], decoder.device)
            want.append(decoder.logits(decoder.forward(rows)))
            session.cache.commit(stage, [0])
    assert torch.equal(got, torch.cat(want))


def test_it_drafts_behind_tokens_that_are_forced(model: Model) -> None:
    made = engine(model, "none")
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=60)
    for _ in made.prefill(session):
        pass
    drafter = Pipeline(model.decoder, Schedule(4))
    (draft,) = drafter.propose([session], [9], [[5, 6, 7]])
    assert draft.begun is None
    assert len(draft) == 9
    for limit in (0, 1):
        (draft,) = drafter.propose([session], [limit])
        assert len(draft) == limit


def test_it_is_for_looped_models(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"for a model whose layers run several times \(ouro\).*llama run once"):
        parse("pipeline").make(tiny(tmp_path))
    with pytest.raises(UsageError, match="3 loops a cycle don't divide the 4"):
        parse("pipeline:loops=3").make(model)
    with pytest.raises(UsageError, match="second guess in cycle 4"):
        parse("pipeline:second=4").make(model)


@pytest.mark.parametrize(
    "changes", [{"early_exit_threshold": 0.7}, {"early_exit_step": 1}, {"total_ut_steps": 0}, {"total_ut_steps": 1.5}]
)
def test_a_gate_that_ends_loops_early_is_refused(model: Model, changes: dict[str, Any]) -> None:
    assert model.checkpoint is not None
    raw = model.checkpoint.config()
    with pytest.raises(ModelError, match=r"early|total_ut_steps"):
        Config.read({**raw, **changes})


def test_weights_are_counted_once_and_read_in_every_loop(model: Model) -> None:
    decoder = model.decoder
    c = decoder.config
    assert (c.layers, c.group, c.loops) == (8, 2, 4)
    held = sum(tensor.nbytes for tensor in decoder.tensors())
    assert held == decoder.nbytes
    layers = sum(
        tensor.nbytes for layer in decoder._layers[:2] for part in layer.mlp.weights for tensor in part.tensors
    )
    assert decoder.pass_nbytes > held - decoder.table(torch.arange(c.vocabulary)).nbytes + 3 * layers
