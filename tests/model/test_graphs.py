"""Recorded passes against the decoder that runs one operator after the other: launches run through Triton's interpreter
where there is no GPU, and are replayed as a graph where there is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import oracle, write
from torch import Tensor

HERE = "cuda" if torch.cuda.is_available() else "cpu"
if HERE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from longspec.cache import Dense  # noqa: E402
from longspec.cache.codes import Codec, DualCodec  # noqa: E402
from longspec.cache.quantized import Quantized  # noqa: E402
from longspec.cache.stage import Cache, Stage  # noqa: E402
from longspec.model.config import Config  # noqa: E402
from longspec.model.decoder import Chunk, Decoder, Rows  # noqa: E402
from longspec.model.gpu.cuda_graphs import Graphs, missing  # noqa: E402
from longspec.model.weights.read import Weights  # noqa: E402

pytest.importorskip("triton")

SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
"""The interpreter takes 30 ms for a program of a launch, and most launches have one for each row and head."""

LAYERS: dict[str, dict[str, Any]] = {  # of two layers one of each kind
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases, heads of 24 channels": ("qwen2", {"head_dim": 24}),
    "norms of each head": ("qwen3", {}),
    "windows, softcaps, four norms": ("gemma2", {"sliding_window": 70}),
    "two ropes": ("gemma3", {"sliding_window": 64}),
    "a layer without positions": ("smollm3", {}),
    "rotated in part, fused matrices": ("phi3", {"sliding_window": None}),
}
TOKENS = torch.randint(3, 96, (400,), generator=torch.Generator().manual_seed(1)).tolist()
Passes = Sequence[tuple[int, list[int], list[int]]]  # rows, their parents, those that are kept
PASSES: Passes = [(1, [-1], [0]), (3, [-1, 0, 0], [0, 2]), (1, [-1], [0])]
"""A plain step, a tree of which a path is kept, of fewer rows than the recorded pass, and a step behind it."""

LONG: Passes = [(1, [-1], [0]), (3, [-1, 0, 1], [0, 1]), (5, [-1, 0, 0, 1, 2], [0, 2, 4]), (1, [-1], [0])]
"""A chain too."""


def decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = Config.read(json.loads((folder / "config.json").read_text()))
    made = Decoder(config, Weights.of_folder(folder, dtype), torch.device(HERE))
    made._graphs = None
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two key heads, each of two query heads."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    return write(oracle("llama", **SMALL | heads), tmp_path_factory.mktemp("llama"))


class Watched(Graphs):
    """Counts what it takes."""

    taken = 0

    def forward(self, rows: Any) -> Tensor | None:
        made = super().forward(rows)
        self.taken += made is not None
        return made


def watched(made: Decoder) -> Watched:
    graphs = made.graphs()
    graphs.__class__ = Watched
    made._graphs = graphs
    assert isinstance(graphs, Watched)
    return graphs


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def rows_of(made: Decoder, cache: Cache, tokens: Sequence[int], parents: Sequence[int]) -> tuple[Stage, Tensor]:
    """A pass of these rows: their stage, and hidden states [r, width]."""
    stage: Stage = cache.open()
    staged = stage.add(parents)
    return stage, made.forward(Rows.of([Chunk(stage, staged, tokens, cache.length, False)], made.device))


def text(made: Decoder, cache: Cache, prompt: int, passes: Passes = PASSES) -> Tensor:
    """A prompt, and passes behind it: their hidden states."""
    found = []
    for start in range(0, prompt, 100):
        own = TOKENS[start : min(start + 100, prompt)]
        stage, _ = rows_of(made, cache, own, range(-1, len(own) - 1))
        cache.commit(stage, range(len(own)))
    for count, parents, kept in passes:
        stage, hidden = rows_of(made, cache, TOKENS[cache.length : cache.length + count], parents)
        cache.commit(stage, kept)
        found.append(hidden)
    return torch.cat(found).double().cpu()


def check(made: Decoder, empty: Callable[[Decoder], Cache], prompt: int, passes: Passes = PASSES) -> None:
    """All passes behind the prompt are taken, and none differs by more than fp32's sums do."""
    made._graphs = None
    want = text(made, empty(made), prompt, passes)
    graphs = watched(made)
    got = text(made, empty(made), prompt, passes)
    assert (graphs.taken, graphs.broken) == (len(passes), None)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def dense(made: Decoder) -> Cache:
    return Dense(made.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_reads_and_writes_as_the_decoder_does(family: str, tmp_path: Path) -> None:
    """Behind 190 rows: buffers grow in the second pass, and windows begin within the text."""
    name, changes = FAMILIES[family]
    check(decoder(write(oracle(name, **SMALL | LAYERS.get(name, {}) | changes), tmp_path)), dense, 190)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_full_each_family_with_more_heads_and_layers(family: str, tmp_path: Path) -> None:
    """Of four layers each kind twice, and of passes also those of eight rows."""
    name, changes = FAMILIES[family]
    check(decoder(write(oracle(name, **changes), tmp_path)), dense, 187, LONG)


CODECS = [Codec(8, symmetric=True), Codec(4), Codec(2), DualCodec()]


@pytest.mark.parametrize(
    "codec",
    [pytest.param(each, id=str(each), marks=[pytest.mark.full] * (i in (1, 2))) for i, each in enumerate(CODECS)],
)
def test_codes_are_read_where_they_lie(codec: Codec, llama: Path) -> None:
    """Behind 190 rows: the near blocks move along during the passes, and rows of one pass read other codes."""
    check(decoder(llama), lambda made: Quantized(made.shape, codec), 190)


@pytest.mark.full
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_full_codes_with_more_heads_and_layers(codec: Codec, tmp_path: Path) -> None:
    check(decoder(write(oracle("llama"), tmp_path)), lambda made: Quantized(made.shape, codec), 189, LONG)


def test_codes_and_windows(tmp_path: Path) -> None:
    """One layer of two looks back too little for codes."""
    made = decoder(write(oracle("gemma3", **SMALL | LAYERS["gemma3"], sliding_window=64), tmp_path))
    check(made, lambda made: Quantized(made.shape, Codec(8)), 200)


def test_bf16_is_as_near_to_fp32_as_torch_is(llama: Path) -> None:
    """Root mean square over all hidden states, against what torch's operators are off: the interpreter cuts bits off
    where a GPU rounds.
    """
    want = text(decoder(llama), dense(decoder(llama)), 70)
    made = decoder(llama, torch.bfloat16)
    theirs = text(made, dense(made), 70)
    watched(made)
    ours = text(made, dense(made), 70)
    off = (ours - want).pow(2).mean().sqrt() / (theirs - want).pow(2).mean().sqrt()
    assert off < (2.0 if HERE == "cpu" else 1.2)


def test_one_recorded_pass_serves_other_texts_and_sizes(llama: Path) -> None:
    """Two texts in turns by the same inputs; 3 and 4 rows by the same pass."""
    made = decoder(llama)
    caches = [Dense(made.shape), Dense(made.shape)]
    want = [text(made, Dense(made.shape), prompt) for prompt in (100, 70)]
    graphs = watched(made)
    for cache, prompt, hidden in zip(caches, (100, 70), want, strict=True):
        got = text(made, cache, prompt)
        assert (got - hidden).abs().max() < 1e-5 * hidden.abs().max()
    assert {bucket for bucket, _ in graphs._passes} == {1, 4}
    ends = [rows_of(made, cache, TOKENS[:4], range(-1, 3))[1] for cache in caches]
    made._graphs = None
    for cache, hidden in zip(caches, ends, strict=True):
        assert (rows_of(made, cache, TOKENS[:4], range(-1, 3))[1] - hidden).abs().max() < 1e-5 * hidden.abs().max()


def test_what_it_does_not_take_goes_the_other_way(llama: Path) -> None:
    """Several texts, a fork's shared rows, a wide pass, a second stage, a part of the layers."""
    made = decoder(llama)
    cache: Cache = Dense(made.shape)
    stage, _ = rows_of(made, cache, TOKENS[:100], range(-1, 99))
    cache.commit(stage, range(100))
    graphs = watched(made)
    stages = [Dense(made.shape).open() for _ in range(2)]
    chunks = [Chunk(stage, stage.add([-1]), [5], 0, False) for stage in stages]
    made.forward(Rows.of(chunks, made.device))
    made.forward(Rows.of(chunks[:1], made.device), last=1)
    rows_of(made, cache.fork(50), [7], [-1])
    rows_of(made, cache, TOKENS[:65], range(-1, 64))
    first = cache.open()
    rows_of(made, cache, [7], [-1])
    assert graphs.taken == 0
    del first
    rows_of(made, cache, [7], [-1])
    assert graphs.taken == 1


def test_a_pass_that_cannot_be_recorded_is_done_otherwise(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder(llama)
    want = text(made, dense(made), 20)
    graphs = watched(made)

    def fail(*given: object) -> None:
        raise RuntimeError("CUDA error: not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_recorded", fail)
    assert torch.equal(text(made, dense(made), 20), want)
    assert "operator by operator, which is slower: a pass of 24 rows" in str(made.remark())
    assert made.remark() is None
    assert str(graphs.broken).endswith("rows can't be recorded: CUDA error: not permitted when stream is capturing")


def test_it_says_why_a_decoder_records_nothing(llama: Path) -> None:
    config = decoder(llama).config
    assert "this is cpu" in str(missing(config, torch.bfloat16, torch.device("cpu")))


COMPILED = """
import sys
import torch
from support.compiled import targets
from longspec.attention import triton_kernels as kernels
from longspec.cache.codes import Codec
from longspec.model.gpu import kernels as graph_kernels
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.gpu.cuda_graphs import _Inputs
from longspec.model.weights.read import Weights
import json
from pathlib import Path

folder = Path(sys.argv[1])
config = Config.read(json.loads((folder / "config.json").read_text()))
made = Decoder(config, Weights.of_folder(folder, torch.bfloat16), torch.device("cpu")).graphs()
capabilities = [int(sys.argv[2])]
launched = targets(graph_kernels, ("added", "gated", "put", "read", "read_codes"), capabilities)
for compiled, _ in zip(launched, targets(kernels, ("joined",), capabilities), strict=True):
    for rows, codec in ((1, None), (16, None), (1, Codec(8, symmetric=True)), (16, Codec(4))):
        sizes = ((6,), (4, rows), (config.layers, 10))
        with torch.inference_mode():
            made._step(_Inputs(*(torch.zeros(*size, dtype=torch.int64) for size in sizes), codec))
    # Sixteen bytes at once: the compiler believes that buffers begin at multiples of them.
    wide = all("0x10" in kernel.asm["ptx"] for name, kernel in compiled if name == "read")
    print(max(kernel.metadata.shared for _, kernel in compiled), wide)
"""


@pytest.mark.parametrize(("capability", "most"), [(89, 99), (90, 227)])
@pytest.mark.full
def test_they_compile_for_gpus_that_are_not_here(capability: int, most: int, tmp_path: Path) -> None:
    """Llama-3-8B's heads, and KiB of memory that a processor's programs share: 8.9 has the least."""
    sizes = {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder = write(oracle("llama", **sizes, num_hidden_layers=1), tmp_path / "model")
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path / "kernels"),
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", COMPILED, str(folder), str(capability)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    shared, wide = result.stdout.split()
    assert 0 < int(shared) <= most * 1024
    assert wide == "True"


@pytest.mark.full
def test_the_script_that_waits_for_a_gpu_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu.py"
    small = ["--shape", "tiny", "--device", "cpu", "--rows", "1", "2", "--contexts", "200", "--new-tokens", "4"]
    command = [sys.executable, str(script), *small, "--rounds", "1", "--output", str(tmp_path / "report.json")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["context"] for each in report["plain"]] == [64, 2048]
    assert [each["rows"] for each in report["rows"]] == [1, 2]
    assert [each["cache"] for each in report["caches"]] == ["dense", "int8", "int4"]
