"""Layers read from disk for each pass: the bits of layers in memory, what is kept, what is read, and what may fail."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.commands import share_kernels
from support.ggufs import write_gguf
from support.native import SHAPES, SIZES, TOKENS, logits
from support.passes import TOLERANCE, feed
from support.streamed import streamed

from longspec.cache import CACHES
from longspec.errors import ModelError
from longspec.machine.system import cache_folder
from longspec.model.config import Config
from longspec.model.decoder import Chunk, Decoder, Rows, Skip
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.weights.pool import Pool
from longspec.model.weights.ring import Ring
from longspec.model.weights.streamed import spread
from longspec.model.weights.unit_file import Key, Unit, UnitFile

FAMILIES = ["gemma4", "llama", "lfm2", "mixtral", "ouro", "phi3", "qwen3_5", "qwen3_moe"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_kernels(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ring_of(made: Decoder) -> Ring:
    assert made.ring is not None
    return made.ring


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0, 1])
def test_the_bits_are_those_of_weights_in_memory(family: str, kept: int, tmp_path: Path) -> None:
    folder = write(oracle(family), tmp_path / "model")
    want, made = load(folder), streamed(folder, kept=kept)
    out = logits(made, [30, 1, 5, 1])
    torch.testing.assert_close(out, logits(want, [30, 1, 5, 1]), atol=TOLERANCE, rtol=0)
    # torch rounds by where in memory a matrix begins: these begin alike.
    assert torch.equal(out, logits(streamed(folder, kept=want.config.group, pool=1 << 30), [30, 1, 5, 1]))
    assert made.nbytes == want.nbytes
    assert all(map(torch.equal, made.tensors(), want.tensors()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coded", ["Q8_0", "Q4_0", None])
def test_the_kernels_read_them_too(shape: str, coded: str | None, tmp_path: Path) -> None:
    family, changes = SHAPES[shape]
    folder = write(oracle(family, **{**SIZES, **changes}), tmp_path / "model")
    want = load(folder, torch.bfloat16, coded=coded)
    if want.slow is not None:
        pytest.skip(want.slow)
    made = streamed(folder, torch.bfloat16, kept=1, coded=coded)
    assert made.slow is None
    assert torch.equal(logits(made, [70, 1, 8, 1]), logits(want, [70, 1, 8, 1]))
    assert made.formats == want.formats


def test_a_files_own_codes(tmp_path: Path) -> None:
    model = oracle("llama", **SIZES)
    path = write_gguf(model, tmp_path / "model.gguf")
    weights = Checkpoint("tiny", gguf=path).weights(torch.bfloat16, coded=True)
    want = Decoder(Config.read(Checkpoint("tiny", gguf=path).config()), weights, torch.device("cpu"), coded="Q8_0")
    if want.slow is not None:
        pytest.skip(want.slow)
    made = streamed(path, torch.bfloat16, coded="Q8_0")
    assert torch.equal(logits(made, [30, 1]), logits(want, [30, 1]))


def test_a_tree_and_passes_of_some_layers(tmp_path: Path) -> None:
    folder = write(oracle("llama", num_hidden_layers=5), tmp_path / "model")
    want, made = load(folder), streamed(folder)
    for decoder in (want, made):
        decoder.got = []  # type: ignore[attr-defined]
        cache = CACHES["dense"](decoder.shape)
        for _ in range(2):
            stage, out = feed(decoder, cache, TOKENS[:6], [-1, 0, 0, 1, 2, 2])
            cache.commit(stage, [0, 1, 3])
            decoder.got.append(out)  # type: ignore[attr-defined]
        stage = cache.open()

        rows = Rows.of([Chunk(stage, stage.add([-1]), TOKENS[:1], cache.length, False)], torch.device("cpu"))
        half = decoder.forward(rows, None, 0, 2)
        decoder.got += [half, decoder.forward(rows, half, 2, 5, Skip(mlp=frozenset({3})))]  # type: ignore[attr-defined]
    for ours, theirs in zip(made.got, want.got, strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("coded", ["Q8_0", "Q4_0", None])
@pytest.mark.parametrize("pool", [1, 60_000, 1 << 30])
def test_experts_come_as_they_are_chosen(coded: str | None, pool: int, tmp_path: Path) -> None:
    folder = write(oracle("qwen3_moe", **SIZES, moe_intermediate_size=64, mlp_only_layers=[]), tmp_path / "model")
    want = load(folder, torch.bfloat16, coded=coded)
    if want.slow is not None:
        pytest.skip(want.slow)
    made = streamed(folder, torch.bfloat16, pool=pool, coded=coded)
    assert torch.equal(logits(made, [70, 1, 8, 1, 1]), logits(want, [70, 1, 8, 1, 1]))
    found = made.pool
    assert found is not None
    assert 0 < found.missed <= found.chosen
    largest = max(unit.nbytes for key, unit in found.file.units.items() if not isinstance(key, int))
    assert found.held_bytes <= max(pool, 2 * largest)
    assert len(found.routes) == want.config.layers
    assert found.missed == (found.chosen if pool == 1 else found.missed)
    if pool > 1 << 20:
        assert found.missed == len(found.file.units) - want.config.layers or found.missed < found.chosen // 2


def test_experts_that_are_chosen_most_stay(tmp_path: Path) -> None:
    units: dict[Key, Unit] = {(0, i): Unit(4096 * i, 4096, zlib.crc32(bytes([i]) * 4096)) for i in range(8)}
    (tmp_path / "layers").write_bytes(b"".join(bytes([i]) * 4096 for i in range(8)))
    pool = Pool(UnitFile(tmp_path / "layers", units), 3 * 4096)
    for i in (0, 1, 0, 1, 2, 0, 1, 3, 0, 1, 4, 5, 6):
        pool.choose([(0, i)])
        pool.bring([(0, i)])()
        assert set(pool.room((0, i)).tolist()) == {i}
        assert pool.held_bytes <= pool.most
    assert pool.missed == 7  # 0 and 1 were read once
    for _ in range(200):
        pool.choose([(0, 7)])
    pool.bring([(0, 7), (0, 5)])()
    assert set(pool.room((0, 7)).tolist()) == {7}
    pool.close()


def test_what_is_read(tmp_path: Path) -> None:
    """Each pass reads what isn't kept, once; and the buffers hold what fits."""
    made = streamed(write(oracle("llama", num_hidden_layers=8), tmp_path / "model"), kept=2)
    ring = ring_of(made)
    logits(made, [5])
    ring.file.nbytes_read = 0
    logits(made, [1] * 20)
    assert 20 * ring.streamed - 3 * ring.file.units[0].nbytes <= ring.file.nbytes_read <= 21 * ring.streamed
    assert ring.streamed == 6 * ring.file.units[0].nbytes
    assert ring.nbytes == 5 * ring.file.units[0].nbytes
    small = streamed(write(oracle("llama", num_hidden_layers=2), tmp_path / "small"))
    logits(small, [5])
    ring_of(small).file.nbytes_read = 0
    logits(small, [1] * 9)
    assert ring_of(small).file.nbytes_read == 0  # two layers have a buffer each


def test_layers_that_stay_are_spread_evenly() -> None:
    assert spread(0, 5) == []
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert [len(spread(kept, 28)) for kept in range(29)] == [*range(29)]
    assert spread(2, 8) == [3, 7]


# --- the file, and what may go wrong


def arranged() -> list[Path]:
    return sorted((cache_folder() / "models" / "arranged").glob("*/layers"))


def test_the_file_is_made_once_and_is_bound_to_its_model(tmp_path: Path) -> None:
    folder = write(oracle("llama"), tmp_path / "model")
    first = logits(streamed(folder), [9])
    (place,) = arranged()
    before = place.stat().st_mtime_ns
    assert torch.equal(logits(streamed(folder, kept=1), [9]), first)
    assert [path.stat().st_mtime_ns for path in arranged()] == [before]
    write(oracle("llama", initializer_range=0.3), folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not torch.equal(logits(streamed(folder), [9]), first)
    assert len(arranged()) == 2


@pytest.fixture
def running(tmp_path: Path) -> Decoder:
    made = streamed(write(oracle("llama", num_hidden_layers=8), tmp_path / "model"))
    logits(made, [9])
    return made


def test_a_file_that_becomes_shorter(running: Decoder, tmp_path: Path) -> None:
    os.truncate(ring_of(running).file.path, 4096)
    with pytest.raises(ModelError, match=r"layers became shorter while the model ran: it has 4,096 bytes, and"):
        logits(running, [1, 1, 1])
    assert torch.equal(logits(streamed(tmp_path / "model"), [9]), logits(load(tmp_path / "model"), [9]))


def test_a_disk_that_fails(running: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    want = logits(running, [9, 1])

    def fails(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        with pytest.raises(ModelError, match=r"can't be read any more: Input/output error\."):
            logits(running, [9, 1, 1])
    assert torch.equal(logits(running, [9, 1]), want)  # it is tried again


def test_a_byte_that_isnt_what_was_written(tmp_path: Path) -> None:
    folder = write(oracle("llama"), tmp_path / "model")
    streamed(folder)
    (place,) = arranged()
    with place.open("r+b") as file:
        file.seek(5000)
        file.write(b"\x99\x98\x97")
    made = streamed(folder)
    with pytest.raises(ModelError, match=r"isn't what was written there: remove it"):
        logits(made, [3])
    with pytest.raises(ModelError, match=r"isn't what was written there"):
        streamed(folder, kept=made.config.group)


def test_sums_that_arent_sums(tmp_path: Path) -> None:
    folder = write(oracle("llama"), tmp_path / "model")
    streamed(folder)
    (place,) = arranged()
    for said in ('{"sums": [1.5]}', '{"sums": [1]}', "[]", "x"):
        (place.parent / "sums.json").write_text(said)
        with pytest.raises(ModelError, match=r"sums\.json"):
            streamed(folder)


def test_a_ring_reads_ahead_in_the_order_of_use(tmp_path: Path) -> None:
    """The unit that followed the last time is read ahead, also where it isn't the next one."""
    data = b"".join(bytes([i]) * 4096 for i in range(12))
    (tmp_path / "layers").write_bytes(data)
    units: dict[Key, Unit] = {i: Unit(4096 * i, 4096, zlib.crc32(bytes([i]) * 4096)) for i in range(12)}
    ring = Ring(UnitFile(tmp_path / "layers", units), range(12), [], 3)
    for round_ in range(6):
        for unit in (0, 2, 4, 7, 8, 11):
            with ring.held(unit):
                assert set(ring.room(unit).tolist()) == {unit}
        if round_ == 1:
            time.sleep(0.05)
            ring.file.nbytes_read = 0
    assert ring.file.nbytes_read <= 4096 * (6 * 4 + 3)  # nothing was read for nothing
    ring.close()
    ring.close()
