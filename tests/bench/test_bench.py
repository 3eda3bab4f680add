"""`longspec bench engines` on a tiny model: all engines write alike, and what is said is what was measured."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.commands import inside, write_tiny

from longspec.bench.contenders import Contender, ours
from longspec.bench.engines import EngineWorkload, chats, contexts
from longspec.bench.harness import Column, Table, Took, Turns
from longspec.bench.process import Case, Worker, opened
from longspec.errors import LongspecError, UsageError
from longspec.model.load import open_model

SUITE = [
    {"category": "sums", "turns": ["What is 7 and 8?", "And 9?"]},
    {"category": "sums", "turns": ["What is 2 and 1?"]},
    {"category": "tales", "turns": ["Tell me of the sea."]},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), 4096)


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    """In fp32 both engines choose alike, so that both write all tokens that they may."""
    (suite := tmp_path / "suite.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SUITE))
    (text := tmp_path / "text").write_text("The sea was calm, and nobody spoke of it. " * 20)
    arguments = ["bench", "engines", "-m", str(tiny), "--suite", str(suite), "--text", str(text), "--context", "300"]
    settings = ["--setting", "none/dense/fp32", "--setting", "ngram/int8/fp32"]
    few = ["--rounds", "2", "--batch", "2", "--max-new-tokens", "8", "--peer", "transformers", "--peer", "lookup"]
    output = tmp_path / "engines.json"
    result = inside([*arguments, *settings, *few, "--output", str(output)], tmp_path)
    assert result.code == 0, result.err
    *table, last = result.out.decode().splitlines()
    report = json.loads(last)
    assert report == json.loads(output.read_text())
    assert (report["base"], report["rounds"]) == ("transformers", 2)
    assert report["hardware"]["cores"] >= 1
    assert list(report["engines"]) == ["none/dense/fp32", "ngram/int8/fp32", "transformers", "transformers lookup"]
    assert report["engines"]["transformers"]["versions"].keys() == {"transformers", "torch"}
    cases = [(row["case"], row["width"]) for row in report["results"]]
    assert list(dict.fromkeys(cases)) == [("sums", 1), ("tales", 1), ("all", 1), ("all", 2), ("300", 1), ("300", 2)]
    assert len(table) == 1 + len(cases) == 1 + 4 * 4 + 2 * 3
    for row in report["results"]:
        rate, ratio = row["tokens_per_second"], row["ratio"]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"]
        assert row["engine"] != "transformers" or ratio == {"median": 1.0, "least": 1.0, "most": 1.0}
        assert (row["first_token_seconds"] is None) == (row["width"] == 2)
        assert row["peak_bytes"] > 50 << 20
        assert row["tokens"] <= row["prompts"] * 8
        if row["engine"] != "transformers lookup":  # of transformers, the pass that ends the prompt brings the first
            assert row["tokens"] == row["prompts"] * (7 if row["engine"] == "transformers" else 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --suite for chats, --text for long contexts, or both"),
        (["--suite", "{suite}", "--output", "no/such/file"], "there is no folder no/such"),
        (["--suite", "{suite}", "--category", "songs"], "no category 'songs'; it has: sums, tales."),
        (["--suite", "{suite}", "--peer", "abacus"], "'abacus' is not known"),
        (["--suite", "{suite}", "--setting", "none/dense/fp32/x"], "is no drafter/cache/dtype"),
        (["--suite", "{suite}", "--setting", "wings"], "'wings'"),
        (["--suite", "{suite}", "--setting", "none", "--peer", "llama.cpp"], "this model has none"),
        (["--suite", "{suite}", "--setting", "none", "--peer", "assistant"], "needs a --draft-model"),
        (["--text", "{suite}", "--context", "5000"], "the context of"),
        (["--text", "{suite}", "--context", "3000"], "3,000 are needed; give a longer one, or --context."),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], said: str, tiny: Path, tmp_path: Path) -> None:
    (suite := tmp_path / "suite").write_text("".join(json.dumps(one) + "\n" for one in SUITE))
    told = [part.replace("{suite}", str(suite)) for part in arguments]
    result = inside(["bench", "engines", "-q", "-m", str(tiny), *told], tmp_path)
    assert (result.code, result.out) == (2, b"")
    assert said in result.err
    assert result.err.count("\n") == 1


def built_for_avx2(folder: Path) -> Contender:
    """llama.cpp's worker in an interpreter whose llama_cpp says of its build what one for AVX2 alone says."""
    package = folder / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").touch()
    said = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | REPACK = 1 | "
    (package / "llama_cpp.py").write_text(
        f"def llama_backend_init(): pass\ndef llama_print_system_info(): return {said.encode()!r}\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    settings = {"repacked": True, "instructions": ["AVX2", "FMA", "AVX512_VNNI", "AMX_INT8"]}
    return Contender("llama.cpp", "llama.cpp", settings, False, str(python))


def test_a_worker_that_fails_says_why(tiny: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny), "drafter": "none", "cache": "dense", "dtype": "fp32", "threads": 1}
    with pytest.raises(LongspecError, match=r"odd can't be measured: KeyError: 'draft_model'\."):
        Worker(Contender("odd", "longspec", settings, True))
    with pytest.raises(LongspecError, match=r"no/such/python can't be run for llama.cpp: No such file"):
        Worker(Contender("llama.cpp", "llama.cpp", {}, False, "no/such/python"))
    if find_spec("llama_cpp") is None:
        with pytest.raises(LongspecError, match=r"llama.cpp can't be measured: ModuleNotFoundError: .*'llama_cpp'"):
            Worker(Contender("llama.cpp", "llama.cpp", {"repacked": True}, False, sys.executable))
    with pytest.raises(LongspecError, match=r"built without AVX512_VNNI, AMX_INT8, .*GGML_NATIVE=ON"):
        Worker(built_for_avx2(tmp_path))
    worker = Worker(ours(["none/dense/fp32"], str(tiny), None, 1)[0])
    worker._process.kill()
    with pytest.raises(LongspecError, match="its process ended with code -9"):
        worker.write(Case("", [], 1), [])
    worker.close()


def test_rounds_go_in_turns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt by all of them, each first in its turn; a ratio is that of one round."""
    model, order = open_model(str(tiny), dtype="fp32"), list[str]()
    write = Worker.write

    def noted(self: Worker, case: Case, prompts: object) -> Took:
        order.append(self.contender.name)
        return write(self, case, prompts)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "write", noted)
    with ExitStack() as held:
        names = ["none/dense/fp32", "ngram/dense/fp32"]
        workers: dict[str, Worker] = {}
        for worker in opened(ours(names, str(tiny), None, 1), held, silent):
            assert isinstance(worker, Worker)
            workers[worker.contender.name] = worker
        cases = chats(model.vocabulary, {"sums": ["What is 7 and 8?"]}, 6, 1, ())
        cases += contexts(model.vocabulary, "Row upon row. " * 40, [256], 6, 1)
        results = list(EngineWorkload(workers, cases, 3, names[1], str(tiny)).rows(silent))
    none, ngram = names
    assert order == [none, ngram, *([none, ngram, ngram, none] * 3)]
    assert [(one["case"], one["engine"], one["tokens"]) for one in results] == [
        (case, name, 6) for case in ("sums", "256") for name in names
    ]
    assert all(one["ratio"]["least"] == one["ratio"]["most"] == 1 for one in results if one["engine"] == ngram)


def test_a_text_is_cut_at_evenly_spread_places(tiny: Path) -> None:
    vocabulary = open_model(str(tiny), dtype="fp32").vocabulary
    text = "".join(chr(33 + i % 80) for i in range(1000))
    one, several = contexts(vocabulary, text, [400], 8, 4)
    assert [prompt["text"] for prompt in one.prompts] == [text[:400]]
    assert [prompt["text"] for prompt in several.prompts] == [text[at : at + 400] for at in (0, 200, 400, 600)]
    assert several.turns == [list(several.prompts)]
    with pytest.raises(UsageError, match="has 1,000 tokens, and 2,000 are needed"):
        contexts(vocabulary, text, [2000], 8, 4)


def test_the_order_rotates_and_counts_add_up() -> None:
    order, turns = list[str](), Turns()
    writers = {name: lambda prompt: Took(1, len(prompt), 0.5, firsts=(0.1,)) for name in "abc"}
    sums = dict.fromkeys(writers, Took())
    for prompt in ("x", "xx", "xxx", "x"):
        for name, took in turns.write(writers, prompt, order.append).items():
            sums[name] += took
    assert "".join(order) == "abcbcacababc"
    assert sums == dict.fromkeys("abc", Took(4, 7, 2.0, firsts=(0.1,) * 4))
    assert sums["a"].rate == 3.5
    assert Took().rate == 0


def test_a_table_leaves_out_what_a_row_lacks() -> None:
    table = Table(Column("name", -6, "{name}"), Column("share", 7, "{share[median]:.1f}"), Column("n", 3, "{n:.0f}"))
    assert table.head == "name      share    n"
    assert table.line({"name": "a", "share": {"median": 0.25}, "n": None}) == "a           0.2     "
    assert table.line({"name": "b", "share": None, "n": 2}) == "b                  2"
