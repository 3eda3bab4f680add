"""A hybrid's rows have their own bits, as attention's have (test_exact_rows): states, convolutions and gates are C too.

Texts are cut back, forked, kept in files and gone on with: each equals the same text read afresh, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.checkpoints import load, oracle, write
from support.engines import RandomTrees, engine, finish, of_folder, prompts
from support.exact_rows import by_one, path, run, runs_here, tree, write_text
from support.ggufs import write_gguf
from support.native import SIZES, coded

from longspec.cache import BLOCK, CACHES
from longspec.cache.snapshot import Snapshot, save
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.gguf.file import read_gguf
from longspec.model.weights.read import Weights

TEXT = torch.randint(3, 96, (330,), generator=torch.Generator().manual_seed(3)).tolist()
WIDE = SIZES | {"head_dim": 64}
HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5", WIDE | HEADS),
    "qwen3_next": ("qwen3_next", WIDE | HEADS | {"linear_value_head_dim": 16}),
    "lfm2": ("lfm2", {**WIDE, "block_multiple_of": 32, "conv_bias": True}),
    "experts": ("qwen3_5_moe", WIDE | HEADS | {"moe_intermediate_size": 64, "num_experts": 8}),
    "convolutions and experts": ("lfm2_moe", WIDE | {"moe_intermediate_size": 64, "num_experts": 8}),
    "grouped linear": ("linear_llama", WIDE | {"linear_conv_kernel_dim": 63}),
    "some of it": ("linear_llama-some", WIDE),
    "gemma4": ("gemma4", WIDE | {"global_head_dim": 512, "hidden_size_per_layer_input": 32}),
    "keys as values": ("gemma4-keys", WIDE | {"global_head_dim": 128, "sliding_window": 100}),
}
HYBRIDS = [name for name in FAMILIES if FAMILIES[name][0][:5] != "gemma"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(request.param, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(request.param, tmp_path_factory.mktemp("states"))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def written(name: str, folder: Path) -> Path:
    family, changes = FAMILIES[name]
    return write(oracle(family, **changes), folder)


def decoder(folder: Path, dtype: str = "bf16") -> Decoder:
    made = coded(folder) if dtype == "int8" else load(folder, torch.bfloat16)
    if made.slow is not None:
        pytest.skip(made.slow)
    assert made.is_exact
    return made


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", "dense"), ("int8", "int8"), ("bf16", "int4")])
def test_a_tree_is_plain_decoding(folder: Path, dtype: str, kind: str) -> None:
    """Texts of several lengths with a tree each, in one pass: at the text's start, behind a block, over its border."""
    made, spans, wanted = decoder(folder, dtype), [], []
    for seed, (length, count) in enumerate(((0, 1), (5, 7), (61, 24), (126, 12))):
        cache = CACHES[kind](made.shape)
        if length:
            write_text(made, cache, TEXT[:length])
        tokens, parents = tree(count, seed)
        wanted.append(by_one(made, cache, tokens, parents))
        spans.append((cache, tokens, parents))
    together = run(made, [(cache.open(), tokens, parents) for cache, tokens, parents in spans])
    for got, want in zip(together, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_long_passes_are_plain_decoding(folder: Path, dtype: str) -> None:
    made = decoder(folder, dtype)
    text = TEXT[:135]
    want = write_text(made, CACHES["dense"](made.shape), text, 1)
    for size in (135, 65, 64, 33, 7):
        assert torch.equal(write_text(made, CACHES["dense"](made.shape), text, size), want), size


def test_a_kept_path_of_a_tree_is_the_text_read_afresh(hybrid: Path) -> None:
    """Over a block's border, which folds the path; the tree has grown in two passes."""
    made = decoder(hybrid)
    cache, plain = CACHES["dense"](made.shape), CACHES["dense"](made.shape)
    write_text(made, cache, TEXT[:60])
    tokens, parents = tree(30, 5)[0], [-1, *(max(0, i - 1 - i % 3) for i in range(1, 30))]
    stage = cache.open()
    run(made, [(stage, tokens[:12], parents[:12])])
    run(made, [(stage, tokens[12:], parents[12:])])
    kept = max((path(parents, node) for node in range(30)), key=len)
    assert len(kept) > 9, kept
    cache.commit(stage, kept)
    write_text(made, plain, [*TEXT[:60], *(tokens[node] for node in kept)], 1)
    assert torch.equal(write_text(made, cache, TEXT[200:280], 7), write_text(made, plain, TEXT[200:280], 80))


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_texts_that_were_cut_forked_or_kept_in_files_are_read_afresh(hybrid: Path, kind: str, tmp_path: Path) -> None:
    made = decoder(hybrid)

    def read(length: int) -> Any:
        cache = CACHES[kind](made.shape)
        if length:
            write_text(made, cache, TEXT[:length], 50)
        return cache

    def goes_on(cache: Any, as_of: int) -> None:
        """Its rows are those of the text's first `as_of` tokens, whatever pass wrote them."""
        assert cache.length == as_of
        more = [7, 8, *TEXT[as_of : as_of + 40]]
        assert torch.equal(write_text(made, cache, more, 6), write_text(made, read(as_of), more))

    cache = read(150)
    cache.mark()
    write_text(made, cache, TEXT[150:300], 9)
    save(tmp_path / "rows", {}, TEXT[:300], cache)
    again = CACHES[kind](made.shape)
    Snapshot(tmp_path / "rows").load(again)
    goes_on(again, 300)
    goes_on(cache.fork(300), 300)
    goes_on(cache.fork(297), 297)
    marked = cache.fork(160)
    coded_rows = kind != "dense" and made.shape.windows  # which are read back no further than the newest ones
    goes_on(marked, 0 if coded_rows else 2 * BLOCK)
    cache.truncate(295)
    goes_on(cache, 295)


def test_all_instruction_sets_give_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in runs_here():
        monkeypatch.setenv("LONGSPEC_ISA", name)
        for dtype in ("bf16", "int8"):
            made = decoder(folder, dtype)
            found[name, dtype] = write_text(made, CACHES["dense"](made.shape), TEXT[:150], 40)
    for (_, dtype), logits in found.items():
        assert torch.equal(logits, found[runs_here()[0], dtype])


def test_drafts_change_no_token_and_the_result_says_exact(folder: Path) -> None:
    """In bf16, where near-ties are many: random trees, sampled and greedy, a chat's turns too."""
    made = decoder(folder)
    model = replace(of_folder(folder, ()), dtype="bf16", decoder=made)
    texts = prompts(3, 90)
    plain, wanted = engine(model), {}
    for i, text in enumerate(texts):
        session = plain.open(text, raw=True, max_new_tokens=70, key=str(i), temperature=0.8 * (i % 2))
        finish(plain, [session])
        wanted[str(i)] = list(session.tokens)
    drafting = engine(model, RandomTrees(wanted, right=0.8), draft_tokens=12)
    opened = [
        drafting.open(text, raw=True, max_new_tokens=70, key=str(i), temperature=0.8 * (i % 2))
        for i, text in enumerate(texts)
    ]
    finish(drafting, opened)
    assert {session.key: list(session.tokens) for session in opened} == wanted
    assert drafting.answer(opened[0]).exactness == "exact"


def test_a_chats_next_turn_is_a_fresh_text(hybrid: Path) -> None:
    """It goes on from the middle of the last answer, whose rest is cut off."""
    made = decoder(hybrid)
    model = replace(of_folder(hybrid, ()), dtype="bf16", decoder=made)
    drafting = engine(model, "ngram")
    first = drafting.open(prompts(1, 200)[0], raw=True, max_new_tokens=150)
    tokens = [*finish(drafting, [first])[0][:230], 5, 6, 7, 8]
    later = "".join(str(model.vocabulary.tokenizer.id_to_token(token)) for token in tokens[1:])
    after = finish(drafting, [drafting.open(later, raw=True, max_new_tokens=40, after=first)])
    plain = engine(model)
    assert after == finish(plain, [plain.open(later, raw=True, max_new_tokens=40)])


def test_a_file_of_k_quants_is_plain_decoding(tmp_path: Path) -> None:
    """Its value heads read key heads in turns, as llama.cpp keeps them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "linear_value_head_dim": 32}
    kinds = gguf.GGMLQuantizationType
    others = {"ffn_down": kinds.Q6_K, "ssm_conv1d": kinds.F32}
    model = oracle("qwen3_5", **{**WIDE, **HEADS, **sizes})
    file = read_gguf(write_gguf(model, tmp_path / "a.gguf", matrices=kinds.Q4_K, others=others))
    weights = Weights.of_gguf(file, torch.bfloat16)
    made = Decoder(Config.read(file.config()), weights, torch.device("cpu"), coded="Q8_0")
    if made.slow is not None:
        pytest.skip(made.slow)
    assert made.is_exact
    assert {"Q4_K", "Q6_K"} <= made.formats.keys()
    cache = CACHES["dense"](made.shape)
    write_text(made, cache, TEXT[:61])
    tokens, parents = tree(24, 2)
    assert torch.equal(run(made, [(cache.open(), tokens, parents)])[0], by_one(made, cache, tokens, parents))
