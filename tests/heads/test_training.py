"""Training a head: the texts, the steps that a kill doesn't change, and a head that is worth its training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forked
from support.commands import SECONDS, inside, write_tiny
from support.engines import engine, of_folder, tiny
from support.heads import UNSEEN, brought

from longspec.drafters.heads.clover import Head
from longspec.errors import UsageError
from longspec.heads import KINDS
from longspec.heads.format import load_head, new_head, save_head
from longspec.heads.seen import batch_of, see
from longspec.model.load import Model
from longspec.text.detokenizer import decode
from longspec.text.tokenizer import Vocabulary
from longspec.training.course import Course, start
from longspec.training.distil import Text, distil, opening, read_prompts, read_texts
from longspec.training.loss import Drafted, loss_of
from longspec.training.plan import make_plan
from longspec.training.train import Recipe, frequent

ROOT = Path(__file__).resolve().parents[2]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3, "raw": True}
PROMPTS = ["".join(chr(48 + (7 * i + 3 * j * j + j) % 40) for j in range(12 + i % 5)) for i in range(30)]
RECIPE = Recipe(
    kind="clover2", steps=12, tokens=400, depth=3, draft_vocab=64, window=64, texts=2, validations=3, seed=1
)


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return tiny(folder, end_tokens=(2, 5), num_hidden_layers=2)


def written(model: Model, path: Path, tokens: int, **options: Any) -> list[Text]:
    made = engine(model, "ngram")
    return [*distil(made, PROMPTS, path, tokens=tokens, length=48, options=SAMPLED, report=silent, **options)]


def test_texts_are_the_same_however_often_they_are_interrupted(model: Model, tmp_path: Path) -> None:
    whole = written(model, tmp_path / "whole", 900)
    assert sum(len(text.tokens) - text.prompt for text in whole) >= 900
    assert all(len(text.tokens) <= 48 for text in whole)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[1:4]) + lines[4][:20])  # the first one lost, one half written
    assert written(model, tmp_path / "cut", 900) == whole
    assert written(model, tmp_path / "cut", 300) == whole[: len(written(model, tmp_path / "cut", 300))]
    alone = engine(model).generate(PROMPTS[3], key="3", max_new_tokens=48 - len(PROMPTS[3]), **SAMPLED)
    assert tuple(whole[3].tokens[whole[3].prompt :]) == alone.tokens


def templated(model: Model, template: str) -> Model:
    known = model.vocabulary
    return replace(model, vocabulary=Vocabulary(deepcopy(known.tokenizer), known.special, template))


def test_a_model_invents_prompts_where_its_template_has_a_user_speak(model: Model, tmp_path: Path) -> None:
    own = templated(model, "0{% for m in messages %}1{{ m.content }}2{% endfor %}")
    assert opening(own.vocabulary) == "01"
    half = written(own, tmp_path / "half", 600, invented=50)
    taken = [text for text in half if decode(own.vocabulary, text.tokens[: text.prompt]) in PROMPTS]
    assert 0 < len(taken) < len(half)
    (tmp_path / "cut").write_bytes(b"".join((tmp_path / "half").read_bytes().splitlines(keepends=True)[2:5]))
    assert written(own, tmp_path / "cut", 600, invented=50) == half
    counted = templated(model, "{% for m in messages %}{{ m.content | length }}{% endfor %}")
    with pytest.raises(UsageError, match="can't invent prompts"):
        written(counted, tmp_path / "none", 60, invented=1)


def test_prompts_that_leave_no_room_are_left_out(model: Model, tmp_path: Path) -> None:
    long = "a" * 30
    made = engine(model, "ngram")
    for _ in range(2):  # the second time the file holds all of them, and nothing of the first prompt
        texts = [*distil(made, [long, "abc"], tmp_path / "texts", tokens=60, length=48, options=SAMPLED, report=silent)]
        assert texts[0].number == 1
        assert all(text.prompt == 3 for text in texts)
    with pytest.raises(UsageError, match="No prompt leaves room for an answer in 48 tokens"):
        next(distil(made, [long], tmp_path / "none", tokens=60, length=48, options=SAMPLED, report=silent))


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"number": 0, "prompt": 2, "tokens": [1, 2]}', '{"number": 0, "prompt": 1, "tokens": [1, 99999]}'],
)
def test_a_file_of_other_texts_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "texts").write_text(line + "\n")
    with pytest.raises(UsageError, match=r"texts:1 is no text of this model's"):
        read_texts(tmp_path / "texts", 96)


def test_prompts_are_read_from_either_kind_of_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"turns": ["two", "three"], "category": "x"}\n')
    assert read_prompts(path) == ["one", "two"]
    for line in ('{"text": "x"}', '"x"', "x", '{"turns": []}'):
        path.write_text(line)
        with pytest.raises(UsageError, match=r"prompts.jsonl:1 is no prompt"):
            read_prompts(path)
    with pytest.raises(UsageError, match="can't be read: No such file"):
        read_prompts(tmp_path / "nowhere")


def test_frequent_tokens_make_the_draft_vocabulary() -> None:
    texts = [Text(0, 2, [9, 9, 70, 70, 71]), Text(1, 1, [1, 71, 72, 72, 72])]
    tokens = frequent(texts, 1, 96, always=(90,))
    assert tokens is not None
    assert len(tokens) == 64  # whole tiles
    assert {70, 71, 72, 90} <= set(tokens.tolist())
    assert tokens.tolist() == sorted(tokens.tolist())
    assert frequent(texts, 0, 96) is None
    assert frequent(texts, 96, 96) is None


def test_features_are_those_of_decoding(model: Model) -> None:
    """What training reads is what the engine hands to a head, to the last bits of fp32."""
    read: list[torch.Tensor] = []
    drafter = Head(model, new_head("clover", model))
    took = drafter.read
    drafter.read = lambda session, rows: (read.append(torch.stack(list(rows))), took(session, rows))[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    made = engine(model, drafter)
    session = made.open(PROMPTS[0] * 8, max_new_tokens=20, **SAMPLED)
    for _ in made.write(session):
        pass
    rows = torch.cat(read, 1)  # [layers, n, W]
    seen = see(model, session.tokens, session.prompt_length, drafter.needs.layers)
    for layer, own in zip(drafter.needs.layers, rows, strict=True):  # kept in bf16
        torch.testing.assert_close(seen.states[layer][: len(own)].float(), own, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_where_a_head_learns_one_text(model: Model, kind: str) -> None:
    text = Text(0, 4, [3 + (i * i) % 50 for i in range(40)])
    head = new_head(kind, model, depth=3)
    drafted, losses, layers = Drafted(model, head), [], head.reads(model)
    optimizer = torch.optim.Adam(head.module.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, head, drafted, *batch_of(model, [see(model, text.tokens, text.prompt, layers)], layers))
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in head.module.parameters())
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]  # what is left is mostly the entropy of the target itself


def test_a_kill_changes_no_bit(model: Model, folder: Path, tmp_path: Path) -> None:
    """Kill -9 while texts are written and while steps are made; then the same weights as without."""
    said = start(model, RECIPE, tmp_path / "whole", PROMPTS, SAMPLED).run(silent)
    for stage in ("writing texts", "training", "validating"):
        process = subprocess.Popen(
            [*forked.command("heads.test_training"), str(folder), str(tmp_path / "killed"), stage],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )
        assert process.wait(SECONDS) == -signal.SIGKILL
    again = start(model, RECIPE, tmp_path / "killed", PROMPTS, SAMPLED).run(silent)
    assert again == said
    one, other = (load_head(tmp_path / name, model) for name in ("whole", "killed"))
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name
    work = [(tmp_path / name / "work" / "checkpoint.safetensors").read_bytes() for name in ("whole", "killed")]
    assert work[0] == work[1]
    with pytest.raises(UsageError, match=r"holds another training \(its sampling differ\)"):
        start(model, RECIPE, tmp_path / "whole", PROMPTS, {**SAMPLED, "seed": 4}).run(silent)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_on_where_it_was(model: Model, tmp_path: Path, kind: str) -> None:
    """What a head draws at random too is of the step, not of the process."""
    recipe = replace(RECIPE, kind=kind)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", 6):
            raise KeyboardInterrupt

    start(model, recipe, tmp_path / "whole", PROMPTS, SAMPLED).run(silent)
    with pytest.raises(KeyboardInterrupt):
        start(model, recipe, tmp_path / "cut", PROMPTS, SAMPLED).run(stop)
    start(model, recipe, tmp_path / "cut", PROMPTS, SAMPLED).run(silent)
    work = [(tmp_path / name / "work" / "checkpoint.safetensors").read_bytes() for name in ("whole", "cut")]
    assert work[0] == work[1]


def test_a_training_goes_on_from_a_head(model: Model, tmp_path: Path) -> None:
    """With its draft vocabulary; another head to begin with is another training."""
    recipe = replace(RECIPE, steps=1, rate=0.0)
    begun = new_head("clover2", model, depth=2, window=50, tokens=torch.arange(3, 35), seed=7)
    save_head(tmp_path / "one", begun, model)
    start(model, recipe, tmp_path / "out", PROMPTS, SAMPLED, first=tmp_path / "one").run(silent)
    made = load_head(tmp_path / "out", model)
    assert (made.depth, made.window) == (recipe.depth, recipe.window)
    assert made.tokens is not None
    assert torch.equal(made.tokens, torch.arange(3, 35))
    for name, value in begun.module.state_dict().items():
        torch.testing.assert_close(made.module.state_dict()[name], value)
    with pytest.raises(UsageError, match=r"holds another training \(its recipe, first differ\)"):
        start(model, recipe, tmp_path / "out", PROMPTS, SAMPLED).run(silent)
    save_head(tmp_path / "other", new_head("clover", model), model)
    with pytest.raises(UsageError, match=r"holds a clover head, and clover2 is to be trained"):
        start(model, recipe, tmp_path / "out", PROMPTS, SAMPLED, first=tmp_path / "other")


def test_prompts_to_train_on_and_to_validate_on_are_disjoint(model: Model) -> None:
    """Also where a file has a prompt twice, in other case or spacing."""
    doubled = [*PROMPTS, *(f" {prompt.upper()} \n" for prompt in PROMPTS), *PROMPTS[::-1]]
    course = start(model, RECIPE, Path("nowhere"), doubled, SAMPLED)
    one, other = ({"".join(p.split()).casefold() for p in part} for part in (course.prompts, course.held))
    assert not one & other
    assert len(one) + len(other) == len({prompt.casefold() for prompt in PROMPTS})


def die(folder: Path, out: Path, stage: str) -> None:
    """Be killed in the middle of a stage."""
    count = 0

    def report(said: str, done: int, total: int) -> None:
        nonlocal count
        count += said == stage and (done > 0 or stage == "writing texts")
        if count == 6 or (stage == "validating" and count == 1):
            os.kill(os.getpid(), signal.SIGKILL)

    course(folder, out).run(report)


def course(folder: Path, out: Path) -> Course:
    return start(of_folder(folder, (2, 5)), RECIPE, out, PROMPTS, SAMPLED)


@pytest.mark.parametrize("kind", ["clover2", "cerberus", "parallelspec", "specformer"])
def test_a_trained_head_beats_an_untrained_one(tmp_path: Path, kind: str) -> None:
    """200 steps on a target of few layers, whose texts are easier to foresee than chance."""
    model = tiny(tmp_path / "target", end_tokens=(), num_hidden_layers=1)
    recipe = Recipe(kind=kind, steps=200, tokens=6000, depth=3, window=96, texts=2, validations=2, rate=3e-3)
    said = start(model, recipe, tmp_path / "out", PROMPTS, {**SAMPLED, "temperature": 0.3}).run(silent)
    assert said is not None
    untrained, begun, trained = brought(model, tmp_path / "out", recipe, {**SAMPLED, "temperature": 0.3}, UNSEEN)
    assert begun > untrained + 0.1  # least squares
    assert trained > untrained + 0.2
    assert said["tokens_per_step"] > said["untrained_tokens_per_step"]
    assert said["accuracy"][0] > 0.05  # 192 rows tell .1 by .02; chance is a tenth of this
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == said


def test_the_command_trains_a_head_that_run_takes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", context=256)
    (tmp_path / "prompts").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    train = ["train", "clover", "-m", str(folder), "--prompts", str(tmp_path / "prompts"), "--tokens", "400"]
    train += ["-o", str(tmp_path / "head"), "--steps", "3", "--draft-vocab", "64", "--int8", "--threads", "1"]
    planned = inside([*train, "--dry-run"], tmp_path)
    assert (planned.code, planned.out) == (0, b"")
    assert "400 tokens to write" in planned.err
    assert not (tmp_path / "head").exists()
    done = inside([*train, "--json", "--quiet"], tmp_path)
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    assert said["draft_vocabulary"] == 64
    assert json.loads((tmp_path / "head" / "config.json").read_text())["longspec"]["storage"] == "int8"
    run = ["run", "-m", str(folder), "--raw", "--no-stdin", "--max-new-tokens", "24", "abcabc", "--control", "fixed"]
    plain = inside(run, tmp_path, extra={"LONGSPEC_DRAFTER": "none"})
    drafted = inside([*run, "--drafter", str(tmp_path / "head"), "--stats"], tmp_path)
    assert (drafted.code, drafted.out) == (0, plain.out)
    assert "tokens per step with" in drafted.err
    refused = inside([*run, "--drafter", "clover2"], tmp_path)
    assert refused.code == 2
    assert "No clover2 head comes with longspec" in refused.err
    refused = inside(["train", "magic", *train[2:]], tmp_path)
    assert (refused.code, "no head named 'magic'" in refused.err) == (2, True)


def test_a_plan_is_of_the_recipe(model: Model) -> None:
    planned: Course = start(model, RECIPE, Path("nowhere"), PROMPTS, SAMPLED)
    plan = make_plan(model, RECIPE, planned.prompts, planned.held, SAMPLED)
    assert plan.distil_tokens == 400
    assert plan.train_tokens == 12 * 2 * 64
    assert plan.hours > 0
    assert "to train" in str(plan)
    assert not Path("nowhere").exists()


def main() -> None:
    torch.set_num_threads(1)
    target, out, what = sys.argv[1:]
    die(Path(target), Path(out), what)


if __name__ == "__main__":
    main()
