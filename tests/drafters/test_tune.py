"""`longspec tune`: the planted set is found, what is said is what was measured, and the command keeps it for `skip`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import inside, write_tiny
from support.engines import engine, prompts
from support.planted import PLANTED, eight_layers

from longspec.bench import tune as module
from longspec.bench.fit import Measured, best, bets, measure
from longspec.bench.tune import NEW, prices, search, tune, verify, write
from longspec.drafters.common.skip_speedup import Prices, gain
from longspec.drafters.layer_skip import Skipping, load_skip
from longspec.errors import UsageError
from longspec.machine.tuned import Fit, fit_path, keep_fit
from longspec.model.decoder import Skip
from longspec.model.load import Model, open_model

pytest.importorskip("optuna")

FOREVER = float("inf")


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return eight_layers(tmp_path_factory.mktemp("planted"), vocab_size=160)


@pytest.mark.parametrize("context", [300, 1000])
def test_texts_fill_the_context_and_no_more(model: Model, context: int) -> None:
    texts = list(write(model, context, 0.0, silent))  # out of time: one text, and no more
    assert len(texts) == 1
    (text,) = texts
    assert len(text.answer) == NEW
    assert context - 600 < len(text.tokens) <= context
    with pytest.raises(UsageError, match=r"context of 70 tokens is too short.* ask for \d+ or more"):
        list(write(model, 70, 0.0, silent))


def test_the_search_finds_the_planted_set(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes, so that the machine has no say; within a few percent of the planted set's expected gain."""
    monkeypatch.setattr(module, "MOST_SETS", 50)
    texts = list(write(model, 300, FOREVER, silent))[:3]
    paid = Prices.by_bytes(model.decoder, 300)
    found = search(model.decoder, texts, paid, FOREVER, silent)
    assert len(found) <= 50
    assert found[0].expected > 0.97 * gain(1.0, paid.share(PLANTED), paid.row)
    assert found[0].agreement > 0.9
    assert [one.expected for one in found] == sorted((one.expected for one in found), reverse=True)
    assert found == search(model.decoder, texts, paid, FOREVER, silent)
    few = search(model.decoder, texts, paid, 0.0, silent)  # out of time at once
    assert 0 < len(few) < 12


def test_measured_prices_are_those_of_whole_passes(model: Model) -> None:
    """In the rough: this machine does other things too."""
    (text,) = write(model, 300, 0.0, silent)
    paid = prices(model.decoder, text)
    assert len(paid.whole) == len(paid.attention) == len(paid.mlp) == 8
    assert min(*paid.whole, *paid.attention, *paid.mlp, paid.rest) > 0
    assert paid.row >= 0
    whole, halves = sum(paid.whole), sum(paid.attention) + sum(paid.mlp)
    assert whole / 3 < halves < 3 * whole
    layers = frozenset(range(1, 7))
    assert paid.share(Skip(layers, layers)) < 0.6
    assert text.cache.length == len(text.tokens) - 1


def test_sets_are_measured_in_turns(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set writes every prompt; the ratio is of rates on the same prompt, and each goes first once."""
    asked = []

    def rate(made: Any, prompt: str, context: int) -> float:
        drafter = made.speculator.drafters.get("skipping")
        asked.append((prompt, drafter and drafter.skip))
        return 10.0 * (len(asked) // 3 + 1) * (2.0 if drafter and drafter.skip == PLANTED else 1.0)

    monkeypatch.setattr(module, "rate", rate)
    ratios, plain = verify(model, [PLANTED, Skip()], 300, FOREVER, silent)
    assert ratios[0] > 1.5
    assert 0.5 < ratios[1] < 1.5
    assert plain > 0
    turns = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    assert all(len({prompt for prompt, _ in turn}) == 1 for turn in turns)
    assert all({skip for _, skip in turn} == {None, PLANTED, Skip()} for turn in turns)
    assert {turn[0][1] for turn in turns} == {None, PLANTED, Skip()}
    asked.clear()
    verify(model, [PLANTED, Skip()], 300, 0.0, silent)
    assert len(asked) == 3


def test_a_tuning_names_the_best_that_was_measured(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SETS", 20)
    stages = []
    tuning = tune(model, context=300, seconds=0.2, report=lambda stage, done, total: stages.append(stage))
    measured = [one.measured for one in tuning.sets]
    assert None not in measured
    assert measured == sorted(measured, reverse=True)  # type: ignore[type-var]
    assert tuning.tried <= 20
    assert tuning.tokens_per_second > 0
    assert len(dict.fromkeys(stages)) == 4
    drafted = engine(model, Skipping(model.decoder, tuning.sets[0].skip))
    plain = engine(model).generate(prompts(1)[0], raw=True, max_new_tokens=50)
    assert drafted.generate(prompts(1)[0], raw=True, max_new_tokens=50).tokens == plain.tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), context=2000)


def test_the_command_keeps_a_set_where_skip_finds_it(folder: Path, tmp_path: Path) -> None:
    model = ["-m", str(folder)]
    done = inside(["tune", *model, "--budget", "0.5", "--json", "--threads", "1"], tmp_path)
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    (path,) = (tmp_path / "config" / "longspec" / "skip").iterdir()
    assert said["file"] == str(path)
    skip = load_skip(path, 4)
    assert sorted(skip.attention) == said["attention"]
    assert sorted(skip.mlp) == said["mlp"]
    assert said["faster"] == (said["measured"] > 1)
    assert said["context"] == 512
    kept = json.loads(path.read_text())
    assert {name: kept[name] for name in ("agreement", "expected", "measured")}.items() <= said.items()
    (fit,) = (tmp_path / "config" / "longspec" / "fit").iterdir()
    assert {name: json.loads(fit.read_text())[name] for name in ("dtype", "threads")}.items() <= said.items()
    assert json.loads(fit.read_text())["entropy"] == said["gate"]["limits"]
    assert {one["threads"] for one in said["settings"]} == {1}
    run = ["run", *model, "--raw", "--no-stdin", "--max-new-tokens", "8", "abcabc"]
    plain, skipped = inside([*run, "--drafter", "none"], tmp_path), inside([*run, "--drafter", "skip"], tmp_path)
    assert (skipped.code, skipped.out) == (0, plain.out)
    path.write_text("{}")
    refused = inside([*run, "--drafter", "skip"], tmp_path)
    assert refused.code == 2
    assert "no skip set" in refused.err


def test_the_command_prints_a_table_and_writes_a_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    done = inside(["tune", "-m", str(folder), "--budget", "0.5", "-c", "300", "--output", str(path)], tmp_path)
    assert (done.code, done.err) == (0, "")
    lines = done.out.decode().splitlines()
    assert lines[0].split() == ["DTYPE", "THREADS", "1", "TOKEN", "9", "TOKENS", "64", "TOKENS", "PERPLEXITY"]
    assert ["ATTENTIONS", "MLPS", "PASS", "AGREEMENT", "EXPECTED", "MEASURED"] in [line.split() for line in lines]
    assert ("times the tokens/s" in lines[-2]) != ("None is faster" in lines[-2])
    assert any(line.startswith("--control entropy drafts ") and " behind more: " in line for line in lines)
    assert lines[-1] == f"Kept in {path}"
    load_skip(path, 4)
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "0"], "--budget: 0 is out of range"),
        (["--context", "3000"], "3,000 tokens were asked for; the context of"),
        (["--context", "70"], "too short to tune for"),
    ],
)
def test_the_command_refuses_what_cannot_be_tuned(
    folder: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = inside(["tune", "-m", str(folder), *arguments], tmp_path)
    assert done.code == 2
    assert said in done.err
    assert done.out == b""


def test_the_fastest_that_writes_as_well_is_chosen() -> None:
    found = [
        Measured(Fit("bf16", 2), (0.012, 0.013, 0.02), 10.0),
        Measured(Fit("bf16", 1), (0.018, 0.020, 0.04), 10.0),
        Measured(Fit("int8", 2), (0.003, 0.007, 0.03), 10.2),
    ]
    assert best(found).fit == Fit("bf16", 2)  # 2 % worse is too much
    assert best([*found, replace(found[2], perplexity=10.05)]).fit == Fit("int8", 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_auto_is_what_was_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    opened, before = open_model(str(folder)), torch.get_num_threads()
    assert opened.fit is None
    path = fit_path(opened.config, str(opened.device), coded=False)
    keep_fit(path, Fit(dtype, 1), {})
    fitted = open_model(str(folder))
    assert (fitted.dtype, fitted.fit) == (dtype, Fit(dtype, 1))
    assert open_model(str(folder), dtype="fp32").dtype == "fp32"
    for text in ("", "[]", "{}", '{"kind": "longspec fit", "version": 1, "dtype": "fp64", "threads": 1}',
                 path.read_text().replace('"threads": 1', '"threads": 1000000')):  # fmt: skip
        path.write_text(text)
        assert open_model(str(folder)).fit is None
    fitted.set_threads()
    assert torch.get_num_threads() == 1
    fitted.set_threads(2)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    fitted.set_threads()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_container_lets_no_more_threads_run_than_it_has_time_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    opened, before = open_model(str(folder)), torch.get_num_threads()
    for allowed, chosen, threads in ((2, 64, 2), (2, 1, 1), (None, 3, 3)):
        monkeypatch.setattr("longspec.model.load.quota", lambda allowed=allowed: allowed)
        torch.set_num_threads(chosen)
        opened.set_threads()
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_what_is_measured_is_the_models_own(folder: Path) -> None:
    before = torch.get_num_threads()
    opened = open_model(str(folder), dtype="fp32")
    found, model = measure(opened, ["fp32", "bf16"], [2, 1], silent)
    torch.set_num_threads(before)
    assert [one.fit for one in found][:2] == [Fit("fp32", 2), Fit("fp32", 1)]
    assert found[2].fit.dtype == "bf16"
    assert all(len(one.seconds) == 3 and min(one.seconds) > 0 for one in found)
    assert found[0].perplexity == found[1].perplexity
    assert found[2].perplexity == pytest.approx(found[0].perplexity, rel=0.05)
    assert model.dtype == best(found).fit.dtype
    assert bets(model, 512, 0.0, silent) > 0
