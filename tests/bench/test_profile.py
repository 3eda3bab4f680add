"""`longspec run --profile`: the parts of a step add up, the text stays what it is, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import inside
from support.engines import engine, prompts
from support.engines import tiny as tiny_model
from support.real import default

from longspec.bench.profile import profiled, table
from longspec.engine.engine import Engine


def test_the_command(tiny: str, tmp_path: Path) -> None:
    arguments = ["run", "--no-stdin", "Tell me of the sea.", "-m", tiny, "--dtype", "fp32", "--max-new-tokens", "12"]
    plain, trace = inside(arguments, tmp_path), tmp_path / "trace.json"
    result = inside([*arguments, "--profile", str(trace)], tmp_path)
    assert (result.code, result.out) == (0, plain.out), result.err
    said = result.err.splitlines()
    assert said[0].startswith("longspec: a step's time, means of ")
    assert [line.split()[0] for line in said[1:]] == [
        *("step", "draft", "layers", "attention", "products", "head", "rest", "floor")
    ]
    assert "GB/s" in said[-1]
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step", "layers", "attention", "head"} <= names
    quiet = inside([*arguments, "-q", "--profile", str(trace)], tmp_path)
    assert (quiet.code, quiet.out, quiet.err) == (0, plain.out, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "{home}/no/trace"], "no/trace.part can't be written"),
        (["--profile", "{home}/trace", "--each-line"], "leave one out"),
        (["--profile", ""], "the name is empty"),
    ],
)
def test_wrong_requests(arguments: list[str], said: str, tiny: str, tmp_path: Path) -> None:
    told = [part.replace("{home}", str(tmp_path)) for part in arguments]
    result = inside(["run", "hi", "-m", tiny, *told], tmp_path)
    assert (result.code, result.out) == (2, b"")
    assert said in result.err
    assert not list(tmp_path.glob("trace*"))


@pytest.mark.parametrize("drafter", ["none", "ngram", "lookahead", "recycle", "skip", "exit", "sparse", "model+ngram"])
def test_parts_add_up_and_nothing_stays(drafter: str, tmp_path: Path) -> None:
    """Passes of a prompt and of a drafter are no part of the target's."""
    made = engine(tiny_model(tmp_path), drafter)
    prompt = prompts(1)[0]
    plain = made.generate(prompt, raw=True, max_new_tokens=20, temperature=0).tokens
    owners = [made, made.model.decoder, *made.speculator.drafters.values()]
    before = [dict(vars(owner)) for owner in owners]
    session = made.open(prompt, raw=True, max_new_tokens=20, temperature=0)
    with profiled(made) as times:
        for _ in made.write(session):
            pass
    assert tuple(session.answer) == plain
    assert [vars(owner).keys() for owner in owners] == [one.keys() for one in before]
    assert times.steps == session.stats.steps
    step, parts = times.seconds["step"], {name: times.seconds[name] for name in ("draft", "layers", "head")}
    assert 0 < sum(parts.values()) <= step
    assert 0 < times.seconds["attention"] <= parts["layers"]
    assert parts["draft"] > 0
    events = [event for event in json.loads(times.trace)["traceEvents"] if event.get("cat") == "user_annotation"]
    passes = sum(event["name"] == "layers" for event in events)
    assert passes > times.steps  # the prompt's too
    lines = table(times, made, session, 1e9).splitlines()
    assert lines[0].endswith(f"{len(prompt):,} to {len(session.tokens):,} tokens")
    assert f"{made.model.decoder.pass_nbytes / 1e6:,.1f} MB of weights" in lines[-1]
    assert table(times, made, session, None).splitlines() == lines[:-1]


def test_what_a_pass_reads(tmp_path: Path) -> None:
    """The table of embeddings only where it is the head."""
    for tied in (False, True):
        decoder = tiny_model(tmp_path / str(tied), tie_word_embeddings=tied).decoder
        table_nbytes = 96 * 48 * 4
        assert decoder.nbytes - decoder.pass_nbytes == (0 if tied else table_nbytes)


@pytest.mark.real
def test_the_kernel_that_runs_all_layers_is_looked_into() -> None:
    made = Engine(default("auto"), drafter="none")
    session = made.open("Why is the sky blue?", max_new_tokens=8, temperature=0)
    with profiled(made) as times:
        for _ in made.write(session):
            pass
    assert tuple(session.answer) == made.generate("Why is the sky blue?", max_new_tokens=8, temperature=0).tokens
    assert 0 < times.seconds["attention"] < times.seconds["layers"] < times.seconds["step"]
