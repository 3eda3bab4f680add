"""Safetensors files as views, several files as one mapping, and files that mustn't be believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspec.errors import ModelError
from longspec.model.weights.read import Weights
from longspec.model.weights.safetensors import Shard, write_shard


def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "q": torch.randn(6, 4, generator=made),
        "k": torch.randn(2, 4, generator=made),
        "v": torch.randn(2, 4, generator=made),
        "half": torch.randn(3, generator=made).to(torch.bfloat16),
        "small": torch.randn(3, generator=made).to(torch.float16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_tensor_is_read_as_the_package_wrote_it(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    shard = Shard(tmp_path / "model.safetensors")
    assert set(shard.names) == set(tensors())
    for name, tensor in tensors().items():
        seen = shard.take(name)
        assert seen.dtype == tensor.dtype
        assert torch.equal(seen, tensor)


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    floats = {name: tensors()[name] for name in ("v", "q", "empty", "k")}
    entries = [(name, tuple(tensor.shape)) for name, tensor in floats.items()]
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        write_shard(path, entries, dtype, floats.__getitem__)
        theirs = load_file(path)
        assert list(Shard(path).names) == ["v", "q", "empty", "k"]
        for name, tensor in floats.items():
            assert torch.equal(theirs[name], tensor.to(dtype))
            assert torch.equal(Shard(path).take(name), tensor.to(dtype))


def test_tensors_begin_on_a_cache_line(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [("a name of some length", (4,))], torch.float32, lambda name: torch.ones(4))
    assert Shard(tmp_path / "a").take("a name of some length").data_ptr() % 64 == 0


def test_a_file_that_is_read_gives_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": torch.randn(7, 5).bfloat16(), "b": torch.randn(3, 5).bfloat16()}
    path = tmp_path / "model.safetensors"
    write_shard(
        path, [(name, tuple(value.shape)) for name, value in values.items()], torch.bfloat16, values.__getitem__
    )
    shard = Shard(path)
    assert not shard.read()  # too small to be worth it
    monkeypatch.setattr("longspec.model.weights.safetensors._LEAST_READ", 1)
    monkeypatch.setattr("longspec.model.weights.safetensors.has_large_pages", lambda: False)
    assert not shard.read()
    monkeypatch.setattr("longspec.model.weights.safetensors.has_large_pages", lambda: True)
    with monkeypatch.context() as full:
        full.setattr("longspec.model.weights.safetensors.available_bytes", lambda: path.stat().st_size)
        assert not shard.read()
    assert shard.read()
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))  # what is read is the file's no more
    for name, value in values.items():
        assert torch.equal(shard.take(name), value)
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="it is being changed"):
        shard.read()


def test_values_are_kept_or_converted(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    weights = Weights.of_folder(tmp_path, torch.float32)
    assert torch.equal(weights["half"], tensors()["half"].float())
    assert weights["count"].dtype == torch.int64
    assert weights["q"].data_ptr() == weights["q"].data_ptr()  # a view of the map each time
    assert len(weights) == len(tensors())
    assert "q" in weights
    assert "nothing" not in weights
    assert weights.get("nothing") is None
    with pytest.raises(ModelError, match=r"tensor nothing is missing from .*model\.safetensors"):
        weights["nothing"]


def test_writing_to_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    Weights.of_folder(tmp_path, torch.float32)["q"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_map_outlives_its_reader(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    tensor = Weights.of_folder(tmp_path, torch.float32)["q"]
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(tensor, tensors()["q"])


def written(folder: Path, order: list[str], dtype: torch.dtype = torch.float32) -> Weights:
    entries = [(name, tuple(tensors()[name].shape)) for name in order]
    write_shard(folder / "model.safetensors", entries, dtype, tensors().__getitem__)
    return Weights.of_folder(folder, torch.float32)


def test_neighbours_join_without_a_copy(tmp_path: Path) -> None:
    weights = written(tmp_path, ["q", "k", "v"])
    joined = weights.joined(["q", "k", "v"])
    assert torch.equal(joined, torch.cat([tensors()[name] for name in "qkv"]))
    assert joined.data_ptr() == weights["q"].data_ptr()
    assert weights.joined(["k", "v"]).data_ptr() == weights["k"].data_ptr()


@pytest.mark.parametrize("names", [["k", "q", "v"], ["q", "v"], ["v", "k", "q"]])
def test_others_join_with_a_copy(tmp_path: Path, names: list[str]) -> None:
    weights = written(tmp_path, ["q", "k", "v"])
    assert torch.equal(weights.joined(names), torch.cat([tensors()[name] for name in names]))


def test_joining_converts(tmp_path: Path) -> None:
    weights = written(tmp_path, ["q", "k", "v"], torch.bfloat16)
    joined = weights.joined(["q", "k", "v"])
    assert joined.dtype == torch.float32
    assert torch.equal(joined, torch.cat([tensors()[name] for name in "qkv"]).bfloat16().float())


def test_joining_over_files(tmp_path: Path) -> None:
    save_file({"q": tensors()["q"]}, tmp_path / "one.safetensors")
    save_file({"k": tensors()["k"], "v": tensors()["v"]}, tmp_path / "two.safetensors")
    index(tmp_path, {"q": "one.safetensors", "k": "two.safetensors", "v": "two.safetensors"})
    weights = Weights.of_folder(tmp_path, torch.float32)
    assert sorted(weights) == ["k", "q", "v"]
    assert torch.equal(weights.joined(["q", "k", "v"]), torch.cat([tensors()[name] for name in "qkv"]))


def test_rows_of_other_lengths_do_not_join(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4), "c": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    weights = Weights.of_folder(tmp_path, torch.float32)
    for names in (["a", "b"], ["c", "c"]):
        with pytest.raises(ModelError, match="rows of one length"):
            weights.joined(names)


def test_an_odd_header_length_is_read(tmp_path: Path) -> None:
    """The format doesn't promise alignment; the bytes are copied then."""
    values = torch.tensor([1.5, -2.0])
    for pad in range(4):
        header = json.dumps({"a": entry(shape=[2], offsets=[0, 8])}).encode() + b" " * pad
        path = raw(tmp_path / "model.safetensors", header, values.numpy().tobytes())
        assert torch.equal(Shard(path).take("a"), values)


def index(folder: Path, files: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry()}, 12, r"expected \d\d bytes, found \d\d"),
        ({"a": entry()}, 17, r"expected \d\d bytes, found \d\d"),
        ({"a": entry(offsets=[0, 2**60], shape=[2**58])}, 16, r"expected 1,152,[\d,]+ bytes, found"),
        ({"a": entry(offsets=[0, 8])}, 16, r"'a' needs 16 bytes for its shape \[2, 2\] and has 8"),
        ({"a": entry(offsets=[16, 0])}, 16, r"offsets \[16, 0\]"),
        ({"a": entry(offsets=[-16, 0])}, 16, r"offsets \[-16, 0\]"),
        ({"a": entry(offsets=[0.0, 16.0])}, 16, "offsets"),
        ({"a": entry(offsets=[0, 16, 32])}, 16, "offsets"),
        ({"a": entry(offsets="0,16")}, 16, "offsets"),
        ({"a": entry(shape=[-2, -2])}, 16, r"shape \[-2, -2\]"),
        ({"a": entry(shape=[True, 4])}, 16, r"shape \[True, 4\]"),
        ({"a": entry(dtype="F33")}, 16, "dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, 16, r"dtype \['F32'\]"),
        ({"a": {"dtype": "F32"}}, 16, "'a' lacks"),
        ({"a": 3}, 16, "'a' lacks"),
        ([1], 16, "isn't a JSON object"),
        (b"{", 16, "can't be parsed"),
        (b"\xff\xfe", 16, "can't be parsed"),
        (b"[" * 100_000, 16, "can't be parsed"),
        (b'{"a": 1, "a": 2}', 16, "twice"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: object, data: int, said: str) -> None:
    path = raw(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(ModelError, match=said) as caught:
        Shard(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100, 100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 5, 8, 20, 1000, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=rf"expected [\w ]*[\d,]+ bytes[\w ]*, found {length:,}"):
            Weights.of_folder(tmp_path, torch.float32)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "bad.safetensors", b"{}", length=2**63)
    with pytest.raises(ModelError, match=r"more than the 100,000,000"):
        Shard(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        Shard(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        Weights.of_folder(tmp_path, torch.float32)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match="safetensors and GGUF only"):
        Weights.of_folder(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "../outside.safetensors"}, r"'\.\./outside\.safetensors', which isn't"),
        ({"a": "/etc/passwd"}, "'/etc/passwd', which isn't"),
        ({"a": "sub/x.safetensors"}, "which isn't"),
        ({"a": ".."}, "which isn't"),
        ({"a": ""}, "which isn't"),
        ({"a": "pytorch_model.bin"}, "which isn't"),
        ({"a": 3}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"b": "part.safetensors"}, "holds the tensor b, and it doesn't"),
        ({"a": "gone.safetensors"}, "No such file"),
    ],
)
def test_an_index_stays_in_its_folder(tmp_path: Path, files: object, said: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "part.safetensors")
    index(folder, files)
    with pytest.raises(ModelError, match=said):
        Weights.of_folder(folder, torch.float32)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="isn't an index"):
        Weights.of_folder(tmp_path, torch.float32)
