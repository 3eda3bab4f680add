"""What a row computes depends on its own position and path alone: bit for bit, in any company, cache and processor.

Plain decoding, one token at a time, is what trees, batches and long passes are held to.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.exact_rows import by_one, path, run, runs_here, tree, write_text
from support.native import coded
from torch import Tensor

from longspec.attention import attend
from longspec.cache.codes import Codec, DualCodec
from longspec.cache.dense import Dense
from longspec.cache.offload import HostStore, Offload
from longspec.cache.quantized import Quantized
from longspec.cache.stage import Segment
from longspec.kernels.isa import ISAS
from longspec.model.decoder import Decoder

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LENGTH = 600
TEXT = torch.randint(3, 96, (LENGTH + 130,), generator=torch.Generator().manual_seed(3)).tolist()
CACHES = {
    "dense": None,
    "int8": Codec(8, symmetric=True),
    "int4": Codec(4),
    "dual": DualCodec(),
    "offload": "offload",  # rows that each row chooses for itself among codes of 2 bits
}


def _isas() -> list[Any]:
    """What this processor runs: the best and plain C; what is between has its bits in test_variants."""
    known = [name for name in ISAS if name in runs_here()]
    return [pytest.param(name, marks=[] if name in (known[0], known[-1]) else pytest.mark.full) for name in known]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LONGSPEC_ISA", request.param)
    name: str = request.param
    return name


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "sliding windows": ("mistral", {"sliding_window": 150}),
    "loops": ("ouro", {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, changes = FAMILIES[request.param]
    return write(oracle(family, **{**SIZES, **changes}, max_position_embeddings=2048), tmp_path_factory.mktemp("exact"))


def decoder(folder: Path, dtype: str) -> Decoder:
    made = coded(folder) if dtype == "int8" else load(folder, torch.bfloat16)
    if made.slow is not None:
        pytest.skip(made.slow)
    return made


def cache_of(made: Decoder, codec: Any) -> Any:
    if codec == "offload":
        return Offload(made.shape, HostStore(made.shape))
    return Dense(made.shape) if codec is None else Quantized(made.shape, codec)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_tree_is_plain_decoding(folder: Path, isa: str, dtype: str, name: str) -> None:
    """Texts of several lengths with a tree each, in one pass: at a chunk's border, a block's, a tile's."""
    made, codec = decoder(folder, dtype), CACHES[name]
    lengths = [0, 5, 62, 129, 510] if isa != "scalar" else [5, 126]
    spans, wanted, bases = [], [], []
    for seed, length in enumerate(lengths):
        cache = cache_of(made, codec)
        if length:
            write_text(made, cache, TEXT[:length])
        tokens, parents = tree((1, 7, 24, 12, 20)[seed], seed)
        if codec is not None:
            kept = [i for i in range(len(tokens)) if len(path(parents, i)) <= 60]
            assert len(kept) == len(tokens)
        bases.append(cache)
        spans.append((tokens, parents))
        wanted.append(by_one(made, cache, tokens, parents))
    stages = [cache.open() for cache in bases]
    together = run(made, [(stage, *span) for stage, span in zip(stages, spans, strict=True)])
    for got, want in zip(together, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["dense", "int8", "offload"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_long_passes_are_plain_decoding(folder: Path, isa: str, dtype: str, name: str) -> None:
    """A prompt in one pass of 130 rows, or in passes of any other number; behind another text or none."""
    made, codec = decoder(folder, dtype), CACHES[name]
    text = TEXT[:130]
    want = write_text(made, cache_of(made, codec), text, 1)
    for size in (130, 65, 64, 33, 7):
        assert torch.equal(write_text(made, cache_of(made, codec), text, size), want), size


def test_forks_change_no_bit(folder: Path, isa: str) -> None:
    """Rows that are shared stand in other buffers; what they are read as depends on their position alone."""
    made = decoder(folder, "bf16")
    plain, trunk = cache_of(made, None), cache_of(made, None)
    write_text(made, trunk, TEXT[:77])
    fork = trunk.fork(70)
    write_text(made, fork, TEXT[70:100])
    fork = fork.fork(95)
    write_text(made, fork, TEXT[95:140])
    write_text(made, plain, TEXT[:140])
    tokens, parents = tree(10, 4)
    assert torch.equal(*(run(made, [(each.open(), tokens, parents)])[0] for each in (plain, fork)))


def test_a_tree_that_grows_in_several_passes_is_plain_decoding(folder: Path, isa: str) -> None:
    made = decoder(folder, "bf16")
    tokens, parents = tree(16, 8)
    cache = cache_of(made, None)
    write_text(made, cache, TEXT[:100])
    want = by_one(made, cache, tokens, parents)
    stage = cache.open()
    beside = cache.open()  # its rows stand apart
    for each in (stage, beside):
        found = [run(made, [(each, tokens[a:b], parents[a:b])])[0] for a, b in ((0, 5), (5, 6), (6, 16))]
        assert torch.equal(torch.cat(found), want)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_all_instruction_sets_give_the_same_bits(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in runs_here():
        monkeypatch.setenv("LONGSPEC_ISA", name)
        made = decoder(folder, dtype)
        for cache, codec in CACHES.items():
            found[name, cache] = write_text(made, cache_of(made, codec), TEXT[:200], 40)
    first = runs_here()[0]
    for (name, cache), logits in found.items():
        assert torch.equal(logits, found[first, cache]), (name, cache)


def test_two_threads_work_apart(folder: Path) -> None:
    """Ctypes lets go of the interpreter: two decoders and two caches at once, each as alone."""
    made = [decoder(folder, "bf16"), decoder(folder, "int8")]
    want = [write_text(each, cache_of(each, None), TEXT[:200], 20) for each in made]
    got: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            got[i].append(write_text(made[i], cache_of(made[i], None), TEXT[:200], 20))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(got[i]) == 5
        assert all(torch.equal(each, want[i]) for each in got[i])


def test_what_is_no_row_of_bf16_never_reaches_a_kernel(folder: Path) -> None:
    made = decoder(folder, "bf16")
    assert made.kernel is not None
    with pytest.raises(TypeError, match="bfloat16"):
        made.kernel.head(torch.zeros(3, 192))
    with pytest.raises(ValueError, match="shape"):
        made.kernel.head(torch.zeros(3, 64, dtype=torch.bfloat16))
    queries = torch.zeros(2, 6, 64, dtype=torch.bfloat16)
    with pytest.raises((TypeError, ValueError)):
        attend(queries, [Segment.dense(torch.zeros(2, 9, 64), torch.zeros(2, 9, 64))], 0.1)
