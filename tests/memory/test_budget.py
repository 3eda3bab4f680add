"""The memory budget: sizes, what a text is planned to take against what it takes, the order of choices, the watch."""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.commands import write_tiny
from support.engines import engine, finish, tiny
from support.ggufs import write_gguf
from support.passes import TOKENS, filled
from support.real import default

from longspec.cache import BLOCK, CACHES, Dense
from longspec.cache.quantized import Quantized
from longspec.drafters.auto import auto, heads_for
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.engine.memory_guard import STEPS, Watch
from longspec.errors import BudgetError, ModelError, UsageError
from longspec.machine.system import available_bytes, parse_bytes, peak_bytes, resident_bytes, shown
from longspec.memory.plan import CHUNKS, DRAFTS, Plan, Request, alone, choice, choices, plan
from longspec.model import load as loading
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.hub import find
from longspec.model.load import DTYPES, Model
from longspec.model.weights.footprint import Footprint, footprint, parameters
from longspec.sampling.sampler import looks_in_place
from longspec.text.detokenizer import decode

MIB = 1 << 20
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip


def request(tokens: int = 7000, dtype: str = "bf16", drafter: str = "ngram", **changes: Any) -> Request:
    config = Config.read(SMOLLM2)
    weights = parameters(config, tied=True) * DTYPES[dtype].itemsize
    given = {"footprint": Footprint(weights, weights, weights), "process": 256 * MIB, **changes}
    given["drafters"] = auto({}) if drafter == "auto" else [parse(drafter)]
    return Request(config, dtype, torch.device("cpu"), tokens=tokens, **given)


# --- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("50MiB", 50 * MIB), ("6GB", 6_000_000_000), ("6GiB", 6 << 30), ("1.5 GiB", 3 << 29), ("1kB", 1000), ("1KB", 1000),
     ("123456", 123456), ("7B", 7), (42, 42), (" 2TiB ", 2 << 40)],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "6G", "6gib", "-1GiB", "1e9", "GiB", "6 Gi B", "six", "0", "0MiB", "٣GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="memory"):
        parse_bytes(text)


def test_sizes_are_shown_as_no_less_than_they_are() -> None:
    assert shown(50 * MIB) == "50 MiB"
    assert shown(50 * MIB + 1) == "51 MiB"
    assert shown(20 << 30) == "20.0 GiB"
    assert [shown(n) for n in (0, 1, 36, 1023, 1024, 1025)] == [
        *("0 bytes", "1 byte", "36 bytes", "1,023 bytes"),
        *("1 KiB", "2 KiB"),
    ]
    assert [shown(n * 1024) for n in (1023, 1023.5, 1024)] == ["1,023 KiB", "1 MiB", "1 MiB"]


def test_what_this_process_has() -> None:
    before = resident_bytes()
    held = mmap.mmap(-1, 64 * MIB)  # new pages, where an allocator may give some that are resident already
    held.write(bytes(64 * MIB))
    assert 60 * MIB < resident_bytes() - before < 80 * MIB
    assert peak_bytes() >= resident_bytes() - MIB
    assert available_bytes() > 64 * MIB
    held.close()


# --- what is planned against what is


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("length", [1, 64, 130, 290])
def test_a_cache_takes_the_room_that_it_says(kind: str, length: int, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = load(write(oracle("llama"), tmp_path))
        cache: Any = filled(model, CACHES[kind], length)
        room = CACHES[kind](model.shape).room(length)
    stored = cache.store.nbytes if hasattr(cache, "store") else 0
    assert room.host + room.disk == stored
    assert sum(tensor.nbytes for _, tensor in cache.state()) - stored <= room.device
    assert cache.nbytes <= room.device * 9 / 8 + 5 * BLOCK * model.shape.row_bytes  # the prompt was one chunk
    if length > 4 * BLOCK and not stored:
        assert room.device < 1.5 * cache.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama", "llama-tied-biased", "olmo2", "phi3"])
def test_weights_are_counted_without_being_read(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = oracle(family)
    checkpoint = find(str(write(model, tmp_path)))
    config = Config.read(checkpoint.config())
    told = footprint(checkpoint, config, dtype)
    made = Decoder(config, checkpoint.weights(dtype), torch.device("cpu"))
    file = (tmp_path / "model.safetensors").stat().st_size
    assert told.weights == made.nbytes
    assert told.loading >= told.resident >= told.weights
    if dtype == torch.float32:
        assert file - 20_000 < told.resident < file + told.weights  # views, and copies of q, k and v
    else:
        assert told.resident == told.weights
        assert told.loading > file + told.weights - 20_000
    tied = bool(checkpoint.config().get("tie_word_embeddings"))
    assert 0.9 < parameters(config, tied=tied) * dtype.itemsize / told.weights <= 1.01


def test_a_gguf_file_is_dequantized(tmp_path: Path) -> None:
    checkpoint = find(str(write_gguf(oracle("llama"), tmp_path / "a.gguf")))
    told = footprint(checkpoint, Config.read(checkpoint.config()), torch.bfloat16)
    file = (tmp_path / "a.gguf").stat().st_size
    assert told.weights <= told.resident < 1.2 * told.weights
    assert told.loading > file + told.weights


def test_a_wrong_shape_is_seen_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint = find(str(write(oracle("llama"), tmp_path)))
    config = Config.read(checkpoint.config() | {"intermediate_size": 81})
    with pytest.raises(ModelError, match="gate_proj"):
        footprint(checkpoint, config, torch.float32)


# --- choosing


def test_the_least_change_that_fits_is_chosen() -> None:
    asked = request()
    order = list(choices(asked))
    drafts = [15, *DRAFTS]
    assert [one.cache for one in order[:: len(CHUNKS) * len(drafts)]] == ["dense", "int8", "int4", "disk"]
    assert [one.draft_tokens for one in order[:: len(CHUNKS)]] == drafts * 4
    assert [one.prefill_rows for one in order[: len(CHUNKS)]] == list(CHUNKS)
    best = [one for i, one in enumerate(order) if all(one.need.total < earlier.need.total for earlier in order[:i])]
    assert list(dict.fromkeys(one.cache for one in best)) == ["dense", "int8", "int4"]
    for one, other in pairwise(best):  # to the byte
        assert plan(asked, one.need.total).choice == one
        assert plan(asked, one.need.total - 1).choice == other
    least = best[-1].need.total
    assert plan(asked, least).choice == best[-1]
    with pytest.raises(BudgetError, match=f"budget is {shown(least - MIB)}.*need at least {shown(least)}"):
        plan(asked, least - MIB)
    with pytest.raises(BudgetError):
        plan(asked, least - 1)


def test_the_plan_says_what_it_picked() -> None:
    asked = request()
    dense, int4 = choice(asked, "dense", 512), choice(asked, "int4", 64)
    assert str(plan(asked, dense.need.total)) == (
        f"{shown(dense.need.total)} of {shown(dense.need.total)} planned for 7,000 tokens: cache dense"
    )
    said = str(plan(asked, int4.need.total))
    assert "cache int4 (the text may differ from dense's), prefill in chunks of 64 rows" in said
    assert json.loads(json.dumps(plan(asked, int4.need.total).report()))["planned_bytes"] == int4.need.total


def test_drafts_are_made_smaller_before_the_cache_is_made_lossy() -> None:
    """A tree takes its rows and their logits, 49,152 tokens of 12 bytes, of 34 where torch sorts copies of them."""
    asked = request()
    whole, less = choice(asked, "dense", 64), choice(replace(asked, draft_tokens=4), "dense", 64)
    row = asked.shape.row_bytes + 49152 * (12 if looks_in_place() else 34)
    assert whole.need.total - less.need.total == 11 * row
    made = plan(asked, less.need.total)
    assert (made.choice.cache, made.choice.draft_tokens, made.choice.prefill_rows) == ("dense", 4, 64)
    assert str(made).endswith("cache dense, prefill in chunks of 64 rows, at most 4 drafted tokens")
    assert made.report()["draft_tokens"] == 4
    assert {one.draft_tokens for one in choices(replace(asked, draft_tokens=0))} == {0}  # plain decoding
    assert {one.draft_tokens for one in choices(replace(asked, draft_tokens=3))} == {3, 2}


def test_the_engine_drafts_what_was_planned(folder: str) -> None:
    roomy = Engine.load(folder, memory="auto", dtype="fp32", drafter="ngram")
    assert roomy.plan is not None
    assert roomy.speculator.most == 15
    choice = roomy.plan.choice
    few = replace(roomy.plan, choice=replace(choice, how=replace(choice.how, draft_tokens=4)))
    assert Engine(roomy.model, drafter="ngram", plan=few).speculator.most == 4
    assert Engine(roomy.model, drafter="ngram", plan=few, draft_tokens=2).speculator.most == 2
    none = replace(roomy.plan, choice=replace(choice, how=replace(choice.how, draft_tokens=0)))
    assert Engine(roomy.model, drafter="none", plan=none).plan == none
    assert Engine(roomy.model, plan=none).drafter_name == "none"


def test_a_cache_by_name_is_kept_or_refused() -> None:
    asked = request()
    budget = choice(asked, "int4", 64).need.total
    with pytest.raises(BudgetError, match=r"cache dense .*weights 257 MiB.* leave the cache to auto"):
        plan(asked, budget, "dense")
    assert plan(asked, budget, "int2").choice.cache == "int2"
    assert plan(asked, 2 << 30, "int2").choice.cache == "int2"


def test_weights_that_do_not_fit_alone_are_said_to() -> None:
    asked = request()
    needed = alone(asked)
    with pytest.raises(
        BudgetError, match=rf"weights alone need {shown(needed)}, which no cache.*or a smaller model\.$"
    ):
        plan(asked, needed - 1)
    with pytest.raises(BudgetError, match=r"or ask for fewer tokens\.$"):
        plan(asked, needed)
    assert alone(request(tokens=1)) == needed < min(one.need.total for one in choices(request(tokens=1)))
    on_gpu = replace(asked, device=torch.device("cuda"))
    with pytest.raises(BudgetError, match=rf": the weights alone need {shown(asked.footprint.weights)}, "):
        plan(on_gpu, asked.footprint.weights - 1)


def test_a_plan_grows_with_all_that_it_counts() -> None:
    base = choice(request(), "dense", 512).need
    assert choice(request(4000), "dense", 512).need.cache < base.cache
    assert choice(request(dtype="fp32"), "dense", 512).need.workspace > base.workspace
    assert choice(request(drafter="none"), "dense", 512).need.drafter < base.drafter
    assert choice(request(threads=64), "dense", 512).need.workspace > base.workspace
    assert choice(request(strict=True), "int4", 64).need.workspace > choice(request(), "int4", 64).need.workspace
    late = request(footprint=Footprint(10 * MIB, 10 * MIB, 900 * MIB))
    assert choice(late, "dense", 64).need.total > 1100 * MIB  # loading alone


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request()
    on_gpu = Request(asked.config, asked.dtype, torch.device("cuda"), asked.footprint, asked.tokens, asked.process)
    each = len(CHUNKS) * (1 + len(DRAFTS))
    assert [one.cache for one in choices(on_gpu)][::each] == ["dense", "int8", "int4", "offload", "disk"]
    offload = choice(on_gpu, "offload", 64)
    assert offload.need.process == 0
    assert offload.host > asked.tokens * on_gpu.shape.row_bytes * 0.9
    assert offload.lacks(8 << 30) is None
    monkeypatch.setattr("longspec.memory.choices.available_bytes", lambda: 100 * MIB)
    assert "of host memory" in str(offload.lacks(8 << 30))


def test_a_full_disk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = choice(request(), "disk", 64)
    assert disk.lacks(8 << 30) is None
    monkeypatch.setattr("longspec.memory.choices.shutil.disk_usage", lambda path: SimpleNamespace(free=MIB))
    assert "of disk" in str(disk.lacks(8 << 30))
    with pytest.raises(BudgetError, match="of disk"):
        plan(request(), 8 << 30, "disk")


# --- the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("tiny"), context=60_000))


def test_the_engine_is_planned_before_weights_are_read(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(loading.Opened, "load", lambda *args, **options: pytest.fail("weights were read"))
        with pytest.raises(BudgetError, match="memory budget is 50 MiB"):
            Engine.load(folder, memory="50MiB", dtype="fp32")
        with pytest.raises(UsageError, match="'much' is no size"):
            Engine.load(folder, memory="much", dtype="fp32")
    roomy = Engine.load(folder, memory="auto", dtype="fp32")
    assert roomy.plan is not None
    assert (roomy.cache_name, roomy.prefill_rows) == ("dense", CHUNKS[0])
    assert roomy.plan.request.tokens == roomy.context == 60_000
    tight = choice(roomy.plan.request, "int4", 64).need.total + 8 * MIB
    made = Engine.load(folder, memory=tight, cache="int4", dtype="fp32")
    assert (made.cache_name, made.prefill_rows) == ("int4", 64)
    session = made.open("0" * 200, max_new_tokens=4, raw=True)
    assert next(iter(made.prefill(session))) <= made.prefill_rows
    report = made.answer(session).report()
    assert report["cache"] == made.cache_name
    assert report["cache_lossless"] is False
    assert report["memory"]["budget"]["budget_bytes"] == tight


def test_a_dtype_that_takes_less_is_named(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, context=1000)
    write(oracle("llama", max_position_embeddings=1000, bos_token_id=1, eos_token_id=None).bfloat16(), folder)
    for dtype, said in (("fp32", True), ("bf16", False)):
        with pytest.raises(BudgetError) as refused:
            Engine.load(str(folder), dtype=dtype, memory="1MiB")
        assert ("or take --dtype bf16, with which it is" in str(refused.value)) is said, dtype


def test_a_text_is_not_longer_than_planned(folder: str) -> None:
    made = Engine.load(folder, memory="8GiB", tokens=lambda vocabulary: vocabulary.encode("000", add_special=False)[0])
    assert made.plan is not None
    planned = made.plan.request.tokens
    assert planned == 19
    assert made.open("0" * 10, raw=True).limit == planned
    with pytest.raises(BudgetError, match="10 tokens and 20 new ones"):
        made.open("0" * 10, raw=True, max_new_tokens=20)
    with pytest.raises(BudgetError, match="planned for 19"):
        made.open("0" * 19, raw=True)


# --- the watch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), end_tokens=())


class Watched(Watch):
    """Sees what it is told to see."""

    seen = 0

    def used(self) -> int:
        return self.seen


def watched(model: Model, monkeypatch: pytest.MonkeyPatch, *, moves: bool) -> tuple[Engine, Watched]:
    monkeypatch.setattr("longspec.engine.memory_guard.peak_bytes", lambda: 0)
    made = engine(model, "ngram")
    c = model.decoder.config
    asked = Request(c, "fp32", torch.device("cpu"), Footprint(MIB, MIB, MIB), 512, process=100 * MIB)
    made.plan = Plan(asked, 300 * MIB, choice(asked, "dense", 512))
    made.watch = watch = Watched(made.plan, moves=moves)
    watch.seen = 200 * MIB
    return made, watch


def test_a_dense_cache_becomes_a_smaller_one_instead_of_passing_the_budget(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, watch = watched(model, monkeypatch, moves=True)
    session = made.open("0123" * 40, raw=True, max_new_tokens=300)
    for _ in made.prefill(session):
        pass
    for _ in range(STEPS):
        made.step([session])
    assert type(session.cache) is Dense
    take_rows = Quantized.take_rows

    def moved(*args: Any) -> None:
        watch.seen = 200 * MIB
        take_rows(*args)

    monkeypatch.setattr(Quantized, "take_rows", moved)
    watch.seen = 300 * MIB
    finish(made, [session])
    assert type(session.cache).__name__ == "Quantized"
    assert len(session.notes) == 1
    assert re.match("the cache became int[84] after", session.notes[0])
    assert len(session.answer) == 300
    answer = made.answer(session).report()
    assert (answer["cache"], answer["cache_lossless"]) == (session.cache_name, False)
    assert session.cache_name in ("int8", "int4")
    assert answer["memory"]["budget"]["notes"] == session.notes


def test_a_text_ends_with_what_it_has(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache was asked for by name, or a smaller one isn't enough: the longest of the texts."""
    for moves in (False, True):
        made, watch = watched(model, monkeypatch, moves=moves)
        sessions = [made.open("0123" * 40 + "4" * i, raw=True, max_new_tokens=200, stop=["\0\0"]) for i in (0, 90)]
        for session in sessions:
            for _ in made.prefill(session):
                pass
        watch.seen = 400 * MIB
        shown = ["", ""]
        while all(session.finish_reason is None for session in sessions):
            for i, commit in enumerate(made.step(sessions)):
                shown[i] += commit.text
        assert [session.finish_reason for session in sessions] == [None, "length"]
        assert commit.finish_reason == "length"
        assert len(sessions[1].answer) < 200
        assert shown[1] == sessions[1].text == decode(model.vocabulary, sessions[1].answer)
        assert "the text ended after" in sessions[1].notes[-1]
        watch.seen = 200 * MIB
        finish(made, sessions[:1])
        assert len(sessions[0].answer) == 200


def test_a_prompt_that_passes_the_budget_is_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made, watch = watched(model, monkeypatch, moves=False)
    made.prefill_rows = 64
    session = made.open("0123" * 40, raw=True)
    watch.seen = 400 * MIB
    with pytest.raises(BudgetError, match=r"400 MiB after 64 tokens of the prompt"):
        list(made.prefill(session))


def test_a_dense_cache_turned_into_codes_holds_what_it_held(model: Model) -> None:
    """In the first layer, whose rows read nothing before them, as if it had been coded from the start."""
    with torch.inference_mode():
        for kind in ("int8", "int4"):
            native: Any = filled(model.decoder, CACHES[kind], 290)
            made = Quantized.of_dense(filled(model.decoder, CACHES["dense"], 290), native.codec)
            assert made.length == 290
            state = dict(made.state())
            for name, tensor in native.state():
                assert state[name].shape == tensor.shape
                if name.split(".")[1] == "0":
                    assert torch.equal(state[name], tensor)
            forked: Any = filled(model.decoder, CACHES["dense"], 290).fork(270)
            assert Quantized.of_dense(forked, native.codec).length == 270
    assert len(TOKENS) == 300


def test_a_plan_counts_a_head_that_is_named() -> None:
    """Some 90 MiB for the one that comes with the default model, and 1.5 KiB for each token."""

    def drafter(name: str) -> int:
        return choice(request(drafter=name), "dense", 64).need.drafter

    assert 80 * MIB < drafter("recycle+ngram+clover2") - drafter("recycle+ngram") < 110 * MIB
    assert drafter("auto") == drafter("recycle+ngram")


@pytest.mark.real
def test_auto_takes_the_head_where_the_plan_leaves_room() -> None:
    model = default("bf16")
    asked = request(tokens=1000)
    assert heads_for(model) == ["clover2"]
    assert heads_for(model, asked.tokens, 95 * MIB) == ["clover2"]
    assert heads_for(model, asked.tokens, 85 * MIB) == []
