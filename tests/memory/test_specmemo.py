"""A budget decides how a run drafts before it makes the cache lossy: the tree, the drafters, the texts side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.commands import inside, write_tiny
from support.engines import prompts

from longspec.drafters.auto import auto
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.engine.scheduler import Schedule
from longspec.memory.gain import DRAFTS, How, Taken, gain, hows, taken
from longspec.memory.plan import Plan, Request, choice, choices, plan, request_of
from longspec.model.config import Config
from longspec.model.load import open_model
from longspec.model.mixtures import Mixture
from longspec.model.reads import Reads
from longspec.model.weights.footprint import Footprint
from longspec.sampling.sampler import looks_in_place

MIB = 1 << 20
CONFIG = Config.read(
    {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), context=2000)


def request(texts: int = 1, draft: Path | None = None) -> Request:
    """What `auto` asks for, with a draft model if there is one."""
    footprint = Footprint(256 * MIB, 256 * MIB, 256 * MIB)
    drafters = auto({"draft": str(draft)} if draft else {})
    return Request(
        CONFIG, "fp32", torch.device("cpu"), footprint, 2000, 256 * MIB, texts=texts, drafters=drafters, may_drop=True
    )


# --- the order of candidates


def test_trees_shrink_to_none_before_the_cache_is_made_lossy() -> None:
    asked = request()
    dense = [one for one in choices(asked) if one.cache == "dense"]
    ways = [(one.draft_tokens, [each.spec.name for each in one.how.drafters]) for one in dense[::4]]
    assert ways == [*((n, [name]) for n in (15, *DRAFTS) for name in ("recycle+ngram", "ngram")), (0, [])]
    assert [one.cache for one in choices(asked)][: len(dense)] == ["dense"] * len(dense)
    least = plan(asked, dense[-1].need.total)
    assert (least.choice.cache, least.choice.draft_tokens) == ("dense", 0)
    assert str(least).endswith("cache dense, prefill in chunks of 64 rows, without drafts")
    assert plan(asked, dense[-1].need.total - 1).choice.cache == "int8"
    named = replace(asked, may_drop=False)
    assert {one.draft_tokens for one in choices(named)} == {15, *DRAFTS}


def test_a_tree_takes_little_more_than_its_logits() -> None:
    """The kernel looks through them where they lie; torch would sort copies."""
    if not looks_in_place():
        pytest.skip("there is no C compiler")
    whole, *_, least = (one for one in choices(request()) if (one.cache, one.prefill_rows) == ("dense", 64))
    assert (whole.draft_tokens, least.draft_tokens) == (15, 0)
    assert 4 < (whole.need.workspace - least.need.workspace) / 15 / CONFIG.vocabulary <= 12


def test_a_draft_model_that_nobody_named_is_left_out_first(folder: Path) -> None:
    asked = request(draft=folder)
    model, text = taken(asked)
    assert (model.kind, text.kind) == ("model", "text")
    assert min(model.once, text.once, model.text, text.text) > 0
    dense = [one.how for one in choices(asked) if one.cache == "dense" and one.prefill_rows == 64]
    assert dense[0].without == ()
    assert ("model+ngram",) in [how.without for how in dense]
    assert dense[-1].without == ("model+ngram", "recycle+ngram")
    whole = choice(asked, "dense", 512)
    made = plan(asked, whole.need.total - 1)
    assert made.choice.cache == "dense"
    assert made.report()["without"] == list(made.choice.how.without)
    names = [each.spec.name for each in made.choice.how.drafters]
    assert names in (["model+ngram", "recycle+ngram"], ["recycle+ngram"], ["ngram"])
    named = replace(asked, drafters=[parse("model+ngram", {"draft": str(folder)})], may_drop=False)
    assert all(one.how.without == () for one in choices(named))


def test_a_table_of_the_vocabulary_is_left_out_before_a_tree_shrinks() -> None:
    asked = request()
    dense = [one for one in choices(asked) if (one.cache, one.prefill_rows) == ("dense", 64)]
    made = plan(asked, dense[0].need.total - 1)
    assert (made.choice.draft_tokens, made.choice.how.without) == (15, ("recycle",))
    assert dense[0].need.drafter - made.choice.need.drafter == 4 * 8 * CONFIG.vocabulary
    assert "without recycle" in str(made)


def test_fewer_texts_are_written_side_by_side(folder: Path) -> None:
    asked = request(texts=16)
    widths = {one.how.texts for one in choices(asked)}
    assert widths == {16, 8, 4, 2, 1}
    less = choice(replace(asked, texts=4), "dense", 64)
    made = plan(asked, less.need.total)
    assert made.choice.cache == "dense"
    assert 4 <= made.choice.how.texts < 16
    assert f"{made.choice.how.texts} of 16 texts side by side" in str(made)
    assert made.report()["planned_texts"] == made.choice.how.texts


def test_the_order_falls_with_what_is_promised_and_the_curve_with_bytes() -> None:
    for texts in (1, 8):
        asked = request(texts=texts)
        ways = hows(asked, taken(asked), 15, streams=False)
        assert all(one.gain >= other.gain for one, other in pairwise(ways))
        assert ways[0].texts == texts
        tried = list(choices(asked))
        frontier = [one for i, one in enumerate(tried) if all(one.need.total < other.need.total for other in tried[:i])]
        assert len(frontier) > 8
        for one in frontier[:: len(frontier) // 3]:
            assert plan(asked, one.need.total).choice == one


# --- what drafts promise


def promise(
    most: int, texts: int = 1, once: int | None = None, reads: Reads | None = None, *, streams: bool = False
) -> float:
    """Of n-grams, or of a head with so many bytes."""
    drafters = [Taken(parse("ngram" if once is None else "mtp"), once or 0, 0)]
    return gain(Reads(1000) if reads is None else reads, drafters, most, texts, streams=streams)


def test_a_longer_draft_promises_more_with_falling_returns() -> None:
    found = [promise(most) for most in (0, 2, 4, 8, 15)]
    assert found[0] == 1
    assert found == sorted(found)
    rises = [(b - a) / (n - m) for (a, m), (b, n) in pairwise(zip(found, (0, 2, 4, 8, 15), strict=True))]
    assert rises == sorted(rises, reverse=True)
    assert found[2] > 0.8 * found[4]  # SpecMemo's point: most of it for a fraction of the bytes
    assert promise(48, streams=True) > promise(15, streams=True) > promise(15)


def test_texts_side_by_side_leave_less_to_drafts() -> None:
    assert promise(15, texts=16) > promise(15, texts=1)
    assert promise(15, texts=16) / promise(0, texts=16) < promise(15) / promise(0)


def test_a_mixtures_drafts_promise_less() -> None:
    mixed = Reads(10, 20.0, Mixture(64, 2, 16, (True,)))
    assert 1 <= promise(15, reads=mixed) < promise(15)


def test_a_drafter_as_heavy_as_the_target_promises_next_to_nothing() -> None:
    assert promise(15, once=1000) < 1.3
    assert promise(15, once=20) > 1.3


# --- engines


def test_the_engine_loads_what_the_plan_holds(folder: Path) -> None:
    made = Engine.load(str(folder), memory="auto", dtype="fp32", draft_model=str(folder))
    assert made.plan is not None
    assert [*made.speculator.drafters] == ["model+ngram", "recycle+ngram"]
    light = [one for one in made.plan.choice.how.drafters if one.kind == "text"]
    how = How(tuple(light), 15, 1, 1.0, ("model+ngram",))
    less = Plan(made.plan.request, made.plan.budget, replace(made.plan.choice, how=how))
    assert not less.limits.holds("model")
    other = Engine(made.model, options={"draft": str(folder)}, plan=less)
    assert [*other.speculator.drafters] == ["recycle+ngram"]
    bare = Engine(made.model, options={"draft": str(folder)}, plan=replace(less, choice=replace(
        made.plan.choice, how=replace(how, without=("model+ngram", "recycle")))))  # fmt: skip
    assert [*bare.speculator.drafters] == ["ngram"]
    plain = replace(less, choice=replace(less.choice, how=replace(how, draft_tokens=0, drafters=())))
    silent = Engine(made.model, options={"draft": str(folder)}, plan=plain)
    answers = [
        each.generate(prompts(1)[0], raw=True, max_new_tokens=20, temperature=0).tokens
        for each in (made, other, bare, silent)
    ]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert silent.drafter_name == "none"


def test_a_planned_width_bounds_what_shares_a_pass(folder: Path) -> None:
    opened = open_model(str(folder), dtype="fp32", device="cpu")
    asked = request_of(opened, 300, texts=8)
    one = choice(asked, "dense", 64)
    made = Engine(opened.load(), drafter="none", plan=Plan(asked, 1 << 40, replace(one, how=replace(one.how, texts=2))))
    assert Schedule(made, 8).width == 2
    assert Schedule(made, 1).width == 1
    assert Schedule(Engine(made.model, drafter="none"), 8).width == 8
    told = dict(made.generate_many(["0123", "45", "6789"], width=8, raw=True, max_new_tokens=8))
    assert sorted(told) == [0, 1, 2]


def test_plan_says_why_one_is_taken(folder: Path, tmp_path: Path) -> None:
    given = ["plan", "-m", str(folder), "--dtype", "fp32", "--device", "cpu", "--json"]
    for _ in range(2):  # the first call makes this process larger, for which the second plans
        report = json.loads(inside([*given, "--memory", "16GiB"], tmp_path).out)
    assert report["next"] is None
    curve = report["curve"]
    assert [one["draft_tokens"] for one in curve if one["cache"] == "dense" and one["weights"] == "memory"][-1] == 0
    rates = [one["tokens_per_second"] for one in curve if one["cache"] == "dense" and one["weights"] == "memory"]
    assert rates == sorted(rates, reverse=True)
    less = [*given[:-1], "--memory", str(curve[len(curve) // 2]["budget_bytes"])]
    said = inside(less, tmp_path).out.decode()
    assert re.search(r"^With [\d,]+ \w+ more the row above would be taken: [^\n]+\.\n\Z", said, re.MULTILINE)
    roomy = inside([*given[:-1], "--memory", "16GiB"], tmp_path).out.decode()
    assert roomy.endswith("\nMore memory would bring nothing more.\n")
