"""The C kernel of a layer against torch's operators and fp64, by the instructions of this processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.native import SHAPES, SIZES, logits

from longspec.kernels import build
from longspec.kernels.build import library
from longspec.model.decoder import Decoder
from longspec.model.native import missing


@pytest.fixture(params=SHAPES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, changes = SHAPES[request.param]
    return write(oracle(family, **{**SIZES, **changes}), tmp_path_factory.mktemp("fused"))


def fused(folder: Path, *, strict: bool = False) -> Decoder:
    made = load(folder, torch.bfloat16, strict=strict)
    if made.slow is not None:
        if "compiler" in made.slow:
            pytest.skip(made.slow)
        pytest.fail(made.slow)
    return made


def test_it_is_as_near_to_fp32_as_torch_is(folder: Path) -> None:
    """Root mean square over all logits: within a tenth of what torch's bf16 operators are off."""
    made = fused(folder)
    chunks = [1, 7, 16, 17, 63, 64, 32]
    want = logits(load(folder, torch.float32), chunks)
    got = logits(made, chunks)
    made._fused = None
    theirs = logits(made, chunks)
    assert (got - want).pow(2).mean().sqrt() < 1.1 * (theirs - want).pow(2).mean().sqrt()


def test_a_row_has_the_same_bits_in_any_company(folder: Path) -> None:
    """Under --strict, where attention keeps them too: alone, in chunks, and in chunks above the kernel's rows."""
    made = fused(folder, strict=True)
    want = logits(made, [1] * 200)
    for chunks in ([200], [64, 64, 72], [65, 15, 16, 104], [3, 33, 100, 64]):
        assert torch.equal(logits(made, chunks), want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(folder: Path, threads: int) -> None:
    made = fused(folder, strict=True)
    want, before = logits(made, [40, 1, 9]), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(logits(made, [40, 1, 9]), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 80}, "multiple of 32"),
        ({"intermediate_size": 100}, "multiple of 32"),
        ({"hidden_act": "gelu"}, "activation"),
    ],
)
def test_what_it_does_not_take(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    made = load(write(oracle("llama", **{**SIZES, **changes}), tmp_path), torch.bfloat16)
    assert why in (made.slow or "")
    assert logits(made, [10, 1]).isfinite().all()


def test_fp32_takes_torch(tmp_path: Path) -> None:
    folder = write(oracle("llama", **SIZES), tmp_path)
    assert "float32" in (missing(load(folder, torch.float32).config, torch.float32, torch.device("cpu")) or "")


def test_without_a_compiler_torch_is_taken(tmp_path: Path) -> None:
    source = tmp_path / "layer.c"
    source.write_text("int missing(void) { return 0; }")
    script = (
        f"from pathlib import Path; from longspec.kernels.build import library; print(library(Path({str(source)!r})))"
    )
    for name, why in {"none": "LONGSPEC_COMPILER is none", "no-such-cc": "no compiler named no-such-cc"}.items():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"LONGSPEC_COMPILER": name, "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert why in done.stdout


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_library_says_whether_the_processor_lacks_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "some.c"
    source.write_text(f"int missing(void) {{ return {lacks}; }}")
    found = library(source)
    if isinstance(found, str) and "compiler" in found:
        pytest.skip(found)
    assert isinstance(found, str) == bool(lacks)


def test_a_library_that_was_cut_short_is_built_anew_with_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "short.c"
    source.write_text("int many[40000] = {1}; int seven(void) { return 7; }")
    if isinstance(first := library(source), str):
        pytest.skip(first)
    assert capsys.readouterr().err == ""
    for cut in (0, 100, 5000, 20_000):
        (made,) = (tmp_path / "longspec" / "kernels").glob("short-*.so")
        data = made.read_bytes()
        made.unlink()  # the loaded one keeps its file
        made.write_bytes(data[:cut])
        made.chmod(0o700)
        build._first.cache_clear()
        again = library(source)
        assert not isinstance(again, str)
        assert again.seven() == 7
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "is damaged, and is built anew" in err
        assert len(list((tmp_path / "longspec" / "kernels").glob("short-*.so"))) == 1
    build._first.cache_clear()
    library(source)
    assert capsys.readouterr().err == ""
    build._first.cache_clear()


def test_a_damaged_library_is_made_anew_and_a_bad_source_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.c"
    source.write_text("int seven(void) { return 7; }")
    first = library(source)
    if isinstance(first, str):
        pytest.skip(first)
    assert first.seven() == 7
    (made,) = (tmp_path / "longspec" / "kernels").glob("small-*.so")
    made.unlink()
    made.write_bytes(b"not a library")
    build._first.cache_clear()
    again = library(source)
    assert not isinstance(again, str)
    assert again.seven() == 7
    source.write_text("int seven(void) { return }")
    build._first.cache_clear()
    assert "can't build small.c" in str(library(source))
    source.unlink()
    build._first.cache_clear()
    assert "can't be built" in str(library(source))
    build._first.cache_clear()
