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
TREE = [-1, 0, 0, 1, 2]


def decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = Config.read(json.loads((folder / "config.json").read_text()))
    made = Decoder(config, Weights.of_folder(folder, dtype), torch.device(HERE))
    made._graphs = None
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(oracle("llama"), tmp_path_factory.mktemp("llama"))


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


def text(made: Decoder, cache: Cache, prompt: int) -> Tensor:
    """A prompt, plain steps, a chain, a tree of which a path is kept, and a step behind it: all hidden states."""
    found = []
    for start in range(0, prompt, 100):
        own = TOKENS[start : min(start + 100, prompt)]
        stage, _ = rows_of(made, cache, own, range(-1, len(own) - 1))
        cache.commit(stage, range(len(own)))
    for count, parents, kept in ((1, [-1], [0]), (3, [-1, 0, 1], [0, 1]), (5, TREE, [0, 2, 4]), (1, [-1], [0])):
        stage, hidden = rows_of(made, cache, TOKENS[cache.length : cache.length + count], parents)
        cache.commit(stage, kept)
        found.append(hidden)
    return torch.cat(found).double().cpu()


def check(made: Decoder, empty: Callable[[Decoder], Cache], prompt: int, *, near: float = 1e-5) -> None:
    """All passes behind the prompt are taken, and none differs by more than fp32's sums do."""
    made._graphs = None
    want = text(made, empty(made), prompt)
    graphs = watched(made)
    got = text(made, empty(made), prompt)
    assert (graphs.taken, graphs.broken) == (4, None)
    assert (got - want).abs().max() < near * want.abs().max()


def dense(made: Decoder) -> Cache:
    return Dense(made.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_reads_and_writes_as_the_decoder_does(family: str, tmp_path: Path) -> None:
    """Behind 187 rows: buffers grow in the last passes, and windows begin within the text."""
    name, changes = FAMILIES[family]
    check(decoder(write(oracle(name, **changes), tmp_path)), dense, 187)


@pytest.mark.parametrize("codec", [Codec(8, symmetric=True), Codec(4), Codec(2), DualCodec()], ids=str)
def test_codes_are_read_where_they_lie(codec: Codec, llama: Path) -> None:
    """Behind 189 rows: the near blocks move along during the passes, and rows of one pass read other codes."""
    check(decoder(llama), lambda made: Quantized(made.shape, codec), 189)


def test_codes_and_windows(tmp_path: Path) -> None:
    """Two layers of three look back too little for codes."""
    made = decoder(write(oracle("gemma3", sliding_window=64), tmp_path))
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
    want = [text(made, Dense(made.shape), prompt) for prompt in (170, 80)]
    graphs = watched(made)
    for cache, prompt, hidden in zip(caches, (170, 80), want, strict=True):
        got = text(made, cache, prompt)
        assert (got - hidden).abs().max() < 1e-5 * hidden.abs().max()
    assert {bucket for bucket, _ in graphs._passes} == {1, 4, 8}
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
launched = targets(graph_kernels, ("added", "gated", "put", "read", "read_codes"))
for compiled, _ in zip(launched, targets(kernels, ("joined",)), strict=True):
    for rows, codec in ((1, None), (16, None), (1, Codec(8, symmetric=True)), (16, Codec(4))):
        sizes = ((6,), (4, rows), (config.layers, 10))
        with torch.inference_mode():
            made._step(_Inputs(*(torch.zeros(*size, dtype=torch.int64) for size in sizes), codec))
    # Sixteen bytes at once: the compiler believes that buffers begin at multiples of them.
    wide = all("0x10" in kernel.asm["ptx"] for name, kernel in compiled if name == "read")
    print(max(kernel.metadata.shared for _, kernel in compiled), wide)
"""


def test_they_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Llama-3-8B's heads, for compute capabilities 8.9 and 9.0."""
    sizes = {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder = write(oracle("llama", **sizes), tmp_path / "model")
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path / "kernels"),
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", COMPILED, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for line, most in zip(result.stdout.splitlines(), (99, 227), strict=True):
        shared, wide = line.split()
        assert 0 < int(shared) <= most * 1024
        assert wide == "True"


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
