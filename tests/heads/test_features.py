"""Features in a folder: what is written once and read by any head; whose they are, and that they are whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import SECONDS, inside, write_tiny
from support.engines import of_folder, tiny
from support.native import SIZES, coded

from longspec.engine.engine import Engine
from longspec.errors import LongspecError, ModelError, UsageError
from longspec.heads import KINDS
from longspec.heads.format import load_head
from longspec.heads.seen import _run, see
from longspec.model.load import Model
from longspec.text.detokenizer import decode
from longspec.training.course import VALIDATING, start
from longspec.training.features import MANIFEST, Content, Features, layers_of, write_features
from longspec.training.train import Recipe

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["".join(chr(48 + (7 * i + 3 * j * j + j) % 40) for j in range(12 + i % 5)) for i in range(30)]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3, "raw": True}
KINDS_SORTED = sorted(KINDS)


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return tiny(folder, end_tokens=(2, 5), num_hidden_layers=4)


def content(model: Model, **changes: Any) -> Content:
    made = Content(PROMPTS[3:], PROMPTS[:3], layers_of(KINDS_SORTED, model), SAMPLED, tokens=2500, window=48)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def written(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("features") / "whole"
    write_features(model, place, content(model), silent)
    return place


def test_they_are_what_the_target_sees(model: Model, written: Path) -> None:
    features = Features.open(written, model, "clover2")
    assert features.layers == (1, 2, 3, 4)  # of any kind, of a target of 4 layers; the embedding needs no file
    assert len(features) > 64  # more than a shard
    assert features.rows == sum(len(text.tokens) for text in features.texts())
    for number in (0, 64, len(features) - 1):
        text = features.text(number)
        seen, wanted = features.seen(number, (1, 2)), see(model, text.tokens, text.prompt, (1, 2))
        assert seen.prompt == text.prompt
        assert {*seen.states} == {1, 2, 4}
        for layer in (1, 2, 4):
            assert torch.equal(seen.states[layer], wanted.states[layer])
        for name in ("tokens", "top", "probs", "rest"):
            assert torch.equal(getattr(seen, name), getattr(wanted, name))
        mass = seen.probs.float().sum(-1) + seen.rest
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=2e-3, rtol=0)


def test_held_out_prompts_are_answered_greedily(model: Model, written: Path) -> None:
    held = Features.open(written, model, "clover2").held((1, 2))
    assert 0 < len(held) <= 3
    for seen in held:
        made = Engine(model, drafter="none").generate(
            decode(model.vocabulary, seen.tokens[: seen.prompt].tolist()), raw=True, temperature=0, max_new_tokens=64
        )
        assert seen.tokens[seen.prompt :].tolist() == list(made.tokens[:-1])
        assert torch.equal(seen.top[seen.prompt - 1 :, 0], torch.tensor(made.tokens, dtype=torch.int32))
        assert bool((seen.top[: seen.prompt - 1] == 0).all())


def test_no_text_is_read_again_where_a_row_has_its_bits_in_any_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = SIZES
    made = tiny(tmp_path / "model", end_tokens=(2, 5), **sizes)
    model, last = replace(made, dtype="int8", decoder=coded(tmp_path / "model")), made.decoder.config.layers
    assert model.decoder.is_exact
    read: list[int] = []
    monkeypatch.setattr("longspec.heads.seen._run", lambda *given: read.append(1) or _run(*given))  # type: ignore[func-returns-value]
    write_features(model, tmp_path / "features", content(model, tokens=400), silent)
    assert not read
    features = Features.open(tmp_path / "features", model, "clover2")
    for seen in (*features.held((1,)), *(features.seen(number, (1,)) for number in range(len(features)))):
        wanted = see(model, seen.tokens.tolist(), seen.prompt, (1,))
        assert all(torch.equal(seen.states[layer], wanted.states[layer]) for layer in (1, last))
        assert torch.equal(seen.probs, wanted.probs)
    assert read


def test_every_other_text_is_greedy(model: Model, tmp_path: Path) -> None:
    """And of a prompt that is answered again, the other answer; never the same text twice."""
    asked = content(model, prompts=PROMPTS[:4], tokens=400, greedy=True)
    write_features(model, tmp_path / "mixed", asked, silent)
    write_features(model, tmp_path / "sampled", replace(asked, greedy=False), silent)
    mixed, sampled = (Features.open(tmp_path / name, model, "clover").texts() for name in ("mixed", "sampled"))
    same = [one.tokens == other.tokens for one, other in zip(mixed, sampled, strict=False)]
    assert same[:8] == [False, True, False, True, True, False, True, False]
    assert all(same[8:])


def test_a_kill_changes_no_byte(model: Model, folder: Path, written: Path, tmp_path: Path) -> None:
    for stage in ("writing texts", "reading texts"):
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), str(tmp_path / "killed"), stage],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )
        assert process.wait(SECONDS) == -signal.SIGKILL
        with pytest.raises(UsageError, match="aren't complete"):
            Features.open(tmp_path / "killed", model, "clover2")
    write_features(model, tmp_path / "killed", content(model), silent)
    for path in written.iterdir():
        if path.name != "texts.jsonl":  # whose order is that of finishing
            assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    assert not list((tmp_path / "killed").glob(".*"))


def test_others_and_damaged_ones_are_refused(model: Model, written: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds other features \(their tokens differ\)"):
        write_features(model, written, content(model, tokens=100), silent)
    other = tiny(tmp_path / "other", family="llama-tied-biased")
    with pytest.raises(UsageError, match="are of 'tiny', whose weights or shape are not those of tiny"):
        Features.open(written, other, "clover2")
    with pytest.raises(UsageError, match="`longspec train features` writes one"):
        Features.open(tmp_path / "nowhere", model, "clover2")
    place = tmp_path / "copy"
    place.mkdir()
    for path in written.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((place / MANIFEST).read_text())

    def refused(error: type[LongspecError], match: str, **changes: Any) -> None:
        (place / MANIFEST).write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(error, match=match):
            Features.open(place, model, "clover2")

    refused(UsageError, "are of the layers 2, 4, and clover2 reads 1 too; write others", layers=[2, 4])
    refused(UsageError, "as version, where", version=9)
    refused(UsageError, "lacks shards", shards=None)
    refused(UsageError, "names the shard", shards=[{**manifest["shards"][0], "name": "../secret"}])
    refused(UsageError, "names the shard", answers={**manifest["answers"], "name": "../secret"})
    refused(UsageError, "held.safetensors of .* lacks name", answers={})
    refused(ModelError, "isn't what features.json says", shards=[{**manifest["shards"][0], "rows": 7}])
    shard = place / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    refused(ModelError, "shard-00001.safetensors is damaged: its checksum")
    shard.unlink()
    refused(ModelError, "shard-00001.safetensors can't be read")


@pytest.mark.parametrize("kind", KINDS_SORTED)
def test_any_head_is_trained_from_them(model: Model, written: Path, tmp_path: Path, kind: str) -> None:
    """As from prompts, to the last bit."""
    recipe = Recipe(kind=kind, steps=4, tokens=2500, depth=3, draft_vocab=64, window=48, validations=2)
    said = start(model, recipe, tmp_path / "out", [], {}, features=written).run(silent)
    assert said is not None
    assert said["texts"] == len(Features.open(written, model, kind))
    assert len(said["accuracy"]) == (2 if kind == "exits" else 3)
    assert load_head(tmp_path / "out", model).kind == kind
    again = start(model, recipe, tmp_path / "again", [], {}, features=written).run(silent)
    assert again == said
    other = tmp_path / "others"
    other.mkdir()
    for path in written.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / MANIFEST).write_bytes((other / MANIFEST).read_bytes() + b" ")
    course = start(model, recipe, tmp_path / "out", [], {}, features=other)
    with pytest.raises(UsageError, match=r"holds another training \(its features differ\)"):
        course.run(silent)


def test_a_budget_is_a_number_of_steps_once(model: Model, written: Path, tmp_path: Path) -> None:
    recipe = Recipe(kind="clover", minutes=0.01, depth=2, draft_vocab=64, window=48, validations=1)
    said = start(model, recipe, tmp_path / "out", [], {}, features=written).run(silent)
    assert said is not None
    steps = json.loads((tmp_path / "out" / "work" / "steps.json").read_text())
    assert said["steps"] == steps["steps"] == max(1, int(0.6 * (1 - VALIDATING) / steps["seconds_of_a_step"]))
    assert len(said["history"]) >= steps["validations"] >= 1
    assert start(model, recipe, tmp_path / "out", [], {}, features=written).run(silent) == said


def test_the_command_writes_them_and_trains_on_them(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", context=2000)
    (tmp_path / "prompts").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    common = ["-m", str(folder), "--tokens", "400", "--json", "--quiet"]
    write = ["train", "features", *common, "--prompts", str(tmp_path / "prompts"), "-o", str(tmp_path / "features")]
    done = inside(write, tmp_path)
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    assert said["greedy"] is True
    train = ["train", "clover", *common, "--features", str(tmp_path / "features"), "-o", str(tmp_path / "head")]
    done = inside([*train, "--steps", "2", "--draft-vocab", "64"], tmp_path)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["steps"] == 2
    for wrong, message in (
        ([*train, "--prompts", str(tmp_path / "prompts")], "give one of the two"),
        (["train", "clover", *common, "-o", str(tmp_path / "x")], "give one of the two"),
        ([*train, "--layers", "1"], "--layers is for `longspec train features`"),
        ([*write, "--layers", "99"], "There is no layer 99"),
        (["train", "features", *train[2:]], "Features are written from --prompts"),
    ):
        refused = inside(wrong, tmp_path)
        assert (refused.code, message in refused.err) == (2, True), refused.err


def die(folder: Path, out: Path, stage: str) -> None:
    """Be killed in the middle of a stage."""

    def report(said: str, done: int, total: int) -> None:
        if said == stage and done > (64 if stage == "reading texts" else 900) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    made = of_folder(folder, (2, 5))
    write_features(made, out, content(made), report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    die(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
