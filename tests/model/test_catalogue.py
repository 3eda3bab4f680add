"""Models by name: what the catalogue says, which one fits, and a file that is fetched from a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants
from support.checkpoints import oracle
from support.ggufs import write_gguf
from support.hub import Hub, served

from longspec.cli.main import guarded
from longspec.errors import ModelError
from longspec.model.files import catalogue as module
from longspec.model.files import hub as hub_module
from longspec.model.files.catalogue import FAST, Entry, best, catalogue
from longspec.model.files.hub import find, installed
from longspec.sampling.parameters import Sampling

TINY = Entry("tiny", "A tiny model", "owner/tiny-GGUF", "tiny.gguf", "MIT", 1, 64, 4, "llama", settings={"top_k": 3})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one tiny model, which the catalogue names, and an empty cache."""
    data = write_gguf(oracle("llama"), tmp_path / "tiny.gguf").read_bytes()
    named = {
        "tiny": replace(TINY, nbytes=len(data)),
        "future": replace(TINY, name="future", family="future", file="future.gguf"),
    }
    monkeypatch.setattr(hub_module, "catalogue", lambda: MappingProxyType(named))
    monkeypatch.setattr(module, "catalogue", lambda: MappingProxyType(named))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what of an answer is lost where it breaks off
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)  # type: ignore[attr-defined]
    with served({"owner/tiny-GGUF/tiny.gguf": data}) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield made


def test_entries_hold_together() -> None:
    for name, one in catalogue().items():
        assert name == one.name
        assert one.need > one.nbytes > one.row > 0
        assert one.file.endswith(".gguf")
        if one.drafter is not None:
            assert catalogue()[one.drafter].family == one.family
            assert catalogue()[one.drafter].nbytes < one.nbytes / 2
        Sampling.over({"do_sample": True, **one.settings}, {})  # within bounds


def test_the_best_model_fits_and_writes_fast_enough() -> None:
    plenty = 1 << 40
    readable = [one for one in catalogue().values() if one.is_readable]
    assert best(plenty, 1e15) == readable[-1]
    assert best(plenty, 1.0) is None
    assert best(1 << 20, 1e15) is None
    for rate in (FAST * 1e9, FAST * 2.6e9):  # a mixture reads a part of its bytes for a token
        chosen = best(plenty, rate)
        assert chosen is not None
        assert chosen.speed(rate) >= FAST
        assert all(one.speed(rate) < FAST for one in readable[readable.index(chosen) + 1 :])
    small = best(4 << 30, 1e15)
    assert small is not None
    assert small.need <= 4 << 30


def test_a_name_is_fetched_once(hub: Hub) -> None:
    checkpoint = find("tiny")
    assert checkpoint.gguf is not None
    assert checkpoint.gguf.read_bytes() == hub.files["owner/tiny-GGUF/tiny.gguf"]
    assert checkpoint.generation_config()["top_k"] == 3  # what its makers advise
    assert find("tiny").gguf == find("owner/tiny-GGUF:tiny.gguf").gguf == checkpoint.gguf
    assert hub.ranges == [None]
    assert [one.description for one in installed()][1] == "tiny: in Hugging Face's cache"
    assert find("tiny", offline=True).gguf == checkpoint.gguf


def test_an_interrupted_download_goes_on(hub: Hub) -> None:
    hub.cuts = [100_000, 50_000, *[0] * 6]  # a bad line, and then none
    with pytest.raises(ModelError, match="can't be fetched"):
        find("tiny")
    assert hub.ranges[:3] == [None, "bytes=100000-", "bytes=150000-"]
    hub.cuts, hub.ranges[:] = [], []
    checkpoint = find("tiny")
    assert hub.ranges == ["bytes=150000-"]
    assert checkpoint.gguf is not None
    assert checkpoint.gguf.read_bytes() == hub.files["owner/tiny-GGUF/tiny.gguf"]


def test_other_bytes_are_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.model.files.resume._digest", lambda *_: "0" * 64)
    with pytest.raises(ModelError, match="other bytes"):
        find("tiny")
    assert [path.name for path in (tmp_path / "hub").rglob("*.incomplete")] == []


def test_a_family_of_the_future_is_refused_by_name(hub: Hub) -> None:
    with pytest.raises(ModelError, match="future has the architecture future, which longspec doesn't read yet"):
        find("future")
    assert hub.ranges == []


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"no model 'qwen3-4' here: give qwen3-4b"):
        find("qwen3-4")


def test_the_command(hub: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.machine.bandwidth.memory_rate", lambda device: 1e12)
    assert guarded(["models", "--all"]) == 0
    rows = [line.split("\t")[:2] for line in capfd.readouterr().out.splitlines()]
    assert rows == [["smollm2", "pull"], ["tiny", "pull"], ["future", "unsupported"]]
    assert guarded(["pull", "tiny", "--fit"]) == 2
    assert guarded(["pull", "--fit"]) == 0
    out, err = capfd.readouterr()
    assert out.endswith("tiny.gguf\n")
    assert "tiny fits in" in err
