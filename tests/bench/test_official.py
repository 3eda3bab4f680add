"""`longspec bench drafters --official` on a tiny model, and Spec-Bench's formulas on answers that are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.commands import inside, write_tiny

from longspec.bench.official import OfficialWorkload
from longspec.bench.spec_bench import Answers, Record, Turn, read_records, rows_of
from longspec.engine.engine import Engine
from longspec.errors import UsageError
from longspec.model.load import open_model

SUITE = [
    {"question_id": 81, "category": "writing", "turns": ["Tell me of the sea.", "And of the sea again."]},
    {"question_id": 91, "category": "roleplay", "turns": ["Who are you?"]},
    {"question_id": 161, "category": "qa", "turns": ["Why is the sky blue?"]},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), 512)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (path := tmp_path / "suite.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SUITE))
    return path


def test_the_command(tiny: Path, suite: Path, tmp_path: Path) -> None:
    """Every turn of every record by every drafter; kept answers aren't written again."""
    answers, output = tmp_path / "answers.jsonl", tmp_path / "official.json"
    what = ["bench", "drafters", "--official", "-m", str(tiny), "--dtype", "fp32", "--suite", str(suite)]
    who = ["--drafter", "ngram", "--transformers", "--answers", str(answers)]
    result = inside([*what, *who, "--max-new-tokens", "8", "--output", str(output)], tmp_path)
    assert result.code == 0, result.err
    *table, last = result.out.decode().splitlines()
    report = json.loads(last)
    assert report == json.loads(output.read_text())
    assert (report["max_new_tokens"], report["runs"], report["dtype"]) == (8, 1, "fp32")
    drafters = ["none", "ngram", "transformers prompt lookup"]
    rows = [(row["task"], row["drafter"]) for row in report["results"]]
    assert rows == [(task, name) for task in ("mt_bench", "qa", "overall") for name in drafters]
    assert len(table) == 1 + len(rows)
    for row in report["results"]:
        assert (row["records"], row["turns"]) == {"mt_bench": (2, 3), "qa": (1, 1), "overall": (3, 4)}[row["task"]]
        assert row["new_tokens"] == 8 * row["turns"]
        assert row["mean_accepted_tokens"] == row["new_tokens"] / row["steps"] >= 1
        assert row["drafter"] != "none" or (row["steps"], row["different"]) == (row["new_tokens"], 0)
        assert row["drafter"] != "ngram" or row["different"] == 0
        assert row["speedup"] > 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 1 + 3 * 3
    assert [len(text) for text in lines[1]["choices"][0]["turns"]] <= [8, 8]  # a letter a token, spaces cut

    again = inside([*what, *who, "--max-new-tokens", "8"], tmp_path)
    assert again.code == 0, again.err
    repeated = json.loads(again.out.decode().splitlines()[-1])
    assert repeated["runs"] == 2
    assert repeated["results"] == report["results"]

    other = inside([*what, *who, "--max-new-tokens", "9"], tmp_path)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "answers of another setup" in other.err


def test_a_terminal_gets_the_table_alone(
    tiny: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["bench", "drafters", "-m", str(tiny), "--dtype", "fp32", "--suite", str(suite), "--drafter", "none"]
    asked += ["--prompts", "1", "--max-new-tokens", "2"]
    *table, last = inside(asked, tmp_path).out.decode().splitlines()
    assert json.loads(last)["results"]
    [alone] = inside([*asked, "--json"], tmp_path).out.decode().splitlines()
    assert json.loads(alone).keys() == json.loads(last).keys()
    monkeypatch.setattr("os.isatty", lambda number: number == 1)
    seen = inside(asked, tmp_path).out.decode().splitlines()
    assert len(seen) == len(table)
    assert seen[0].split()[:2] == ["category", "drafter"]


def test_a_suite_that_is_left_out_is_asked_for(tmp_path: Path) -> None:
    result = inside(["bench", "drafters"], tmp_path)
    assert (result.code, result.out) == (2, b"")
    assert result.err == (
        "longspec: --suite must be given: Prompts: objects with `category` and `turns`, one a line. "
        "See longspec bench drafters --help.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--answers", "answers.jsonl"], "--answers keeps the answers of --official"),
        (["--official", "--answers", "{suite}"], "isn't a file of answers that this benchmark wrote"),
        (["--official", "--prompts", "0"], "--prompts"),
    ],
)
def test_what_cannot_be_kept(arguments: list[str], said: str, tiny: Path, suite: Path, tmp_path: Path) -> None:
    told = [part.replace("{suite}", str(suite)) for part in arguments]
    result = inside(["bench", "drafters", "-m", str(tiny), "--suite", str(suite), *told], tmp_path, cwd=tmp_path)
    assert (result.code, result.out) == (2, b"")
    assert said in result.err
    assert suite.read_text().count("\n") == len(SUITE)


def test_records_are_taken_by_task(suite: Path) -> None:
    found = read_records(suite, None)
    assert {task: [each.question for each in records] for task, records in found.items()} == {
        "mt_bench": ["81", "91"],
        "qa": ["161"],
    }
    assert found["mt_bench"][0].turns == ("Tell me of the sea.", "And of the sea again.")
    assert [len(records) for records in read_records(suite, 1).values()] == [1, 1]


def test_a_chat_holds_the_earlier_answers(tiny: Path) -> None:
    """Of the drafter itself; and no turn may write more than the context leaves."""
    engine = Engine(open_model(str(tiny), dtype="fp32").load(), drafter="none")
    seen: list[tuple[list[dict[str, Any]], int]] = []

    def write(messages: Sequence[dict[str, Any]], new: int) -> Turn:
        seen.append(([dict(message) for message in messages], new))
        return Turn(f"answer {len(seen)}", 1, 0.1, [1])

    workload = OfficialWorkload({"none": engine}, {}, 1024, {})
    workload._conversation(write, Record("1", "writing", ("one", "two")))
    (first, most), (second, fewer) = seen
    assert [(each["role"], each["content"]) for each in first] == [("user", "one")]
    expected = [("user", "one"), ("assistant", "answer 1"), ("user", "two")]
    assert [(each["role"], each["content"]) for each in second] == expected
    assert fewer < most < 512
    with pytest.raises(UsageError, match="Question 7 takes more than the model's context of 512 tokens"):
        workload._conversation(write, Record("7", "qa", ("x" * 600,)))


def test_means_are_those_of_the_scripts() -> None:
    """Rates are means over records, accepted tokens over steps; plain answers are counted in their text's tokens."""
    records = [Record("1", "writing", ("a", "b")), Record("2", "qa", ("c",))]
    answers = Answers(None, {})
    answers.add("none", records[0], [Turn("xxx", 4, 2.0, [1] * 4), Turn("xxx", 4, 2.0, [1] * 4)])
    answers.add("none", records[1], [Turn("xx", 2, 1.0, [1] * 2)])
    answers.add("ngram", records[0], [Turn("xxx", 4, 1.0, [3, 1]), Turn("xxy", 4, 1.0, [4])])
    answers.add("ngram", records[1], [Turn("xx", 2, 0.5, [2])])
    none, ngram = rows_of("overall", records, answers, ["none", "ngram"], len)
    assert none["baseline_tokens_per_second"] == pytest.approx((6 / 4 + 2 / 1) / 2)
    assert none["tokens_per_second"] == pytest.approx((8 / 4 + 2 / 1) / 2)
    assert ngram["tokens_per_second"] == pytest.approx(4.0)
    assert ngram["speedup"] == pytest.approx(4.0 / 1.75)
    assert ngram["speedup_same_count"] == pytest.approx(2.0)
    assert (none["mean_accepted_tokens"], ngram["mean_accepted_tokens"]) == (1, 10 / 4)
    assert (none["different"], ngram["different"], ngram["steps"], ngram["turns"]) == (0, 1, 4, 3)


def test_answers_that_are_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for text in ("{", "[1]\n", '{"setup": {}}\n{"model_id": "none"}\n', '{"model_id": "none"}\n'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"isn't a file of answers|of another setup"):
            Answers(path, {})
    assert path.read_text() == text
    path.write_text('{"setup": {"model": "other"}}\n')
    with pytest.raises(UsageError, match="answers of another setup"):
        Answers(path, {"model": "this"})


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    path, record = tmp_path / "answers.jsonl", Record("1", "qa", ("one",))
    Answers(path, {}).add("none", record, [Turn("x", 1, 1.0, [1])])
    whole = path.read_text()
    path.write_text(whole + '{"question_id": "2"')
    again = Answers(path, {})
    assert again.runs == 2
    assert again.get("none", record) is not None
    assert path.read_text() == whole + '{"setup": {}}\n'
