"""Names to files: paths, short names, Hugging Face ids in a cache made here; and what a checkpoint's files say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from support.checkpoints import oracle, write
from support.ggufs import write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers

from longspec.errors import ModelError, UsageError
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.hub import SHORT_NAMES, fetch_config, find, installed
from longspec.model.files.store import models_folder


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of ours, an empty one of Hugging Face's, and an empty folder to stand in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint with a tokenizer."""
    folder = write(oracle("llama"), tmp_path / "llama")
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def cached(root: Path, name: str, source: Path) -> None:
    """Put a folder's files where huggingface_hub would have."""
    revision = "0" * 40
    place = root / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    (place / "blobs").mkdir()
    for file in source.iterdir():
        (place / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))


def test_a_folder_is_a_model(folder: Path) -> None:
    checkpoint = find(str(folder))
    assert checkpoint == Checkpoint(str(folder), folder=folder)
    assert checkpoint.config()["model_type"] == "llama"
    assert checkpoint.generation_config()["eos_token_id"] == 2
    assert checkpoint.tokenizer_config() == {}
    assert checkpoint.chat_template() is None
    assert checkpoint.tokenizer().encode("a b c").ids == [0, 1, 2]
    assert checkpoint.weights(torch.float32)["model.norm.weight"].dtype == torch.float32


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    template = "{{ messages }}"
    path = write_gguf(oracle("llama"), tmp_path / "a.gguf", lambda writer: writer.add_chat_template(template))
    checkpoint = find(str(path))
    assert checkpoint == Checkpoint(str(path), gguf=path)
    assert checkpoint.config()["model_type"] == "llama"
    assert checkpoint.generation_config()["eos_token_id"] == 2
    assert checkpoint.tokenizer_config()["eos_token"] == "<|im_end|>"
    assert checkpoint.chat_template() == template
    assert checkpoint.tokenizer().encode("12").tokens == ["1", "2"]
    weights = checkpoint.weights(torch.bfloat16)
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    assert weights.joined([f"model.layers.0.self_attn.{which}_proj.weight" for which in "qkv"]).shape == (80, 48)


def test_a_path_that_exists_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner" / "name")
    assert find("owner/name").folder == Path("owner/name")
    (folder.parent / "owner" / "name").rename("smollm2")
    assert find("smollm2").folder == Path("smollm2")


def test_a_folder_that_only_has_the_name_does_not_hide_the_default_model() -> None:
    Path("smollm2").mkdir()
    with pytest.raises(ModelError, match="the network is off"):
        find("smollm2", offline=True)


def test_home_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find("~/llama").folder == folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2", "There is no model 'smolm2' here: give smollm2, a Hugging Face id"),
        (".", "has no config.json"),
        ("./owner/name", "There is no model"),
        ("../name", "There is no model"),
        ("~/name", "There is no model"),
        ("~nobody-at-all/name", "There is no model"),
        ("/no/such/folder", "There is no model"),
        ("owner/file.gguf", "There is no model"),
        ("file.gguf", "There is no model"),
        ("a/b/c", "There is no model"),
        ("owner/name:file.bin", "There is no model"),
        ("https://example.org/model", "There is no model"),
        ("x" * 10_000, "There is no model"),
        ("nul\0byte", "There is no model"),
    ],
)
def test_what_is_no_model_is_said(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        find(name)


def test_an_empty_name_is_none() -> None:
    with pytest.raises(UsageError, match="The model's name is empty"):
        find("")


def test_another_file_is_no_model() -> None:
    Path("model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=r"is a file, but no GGUF"):
        find("model.bin")


def test_offline_finds_what_is_cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path / "hub", "owner/name", folder)
    checkpoint = find("owner/name", offline=True)
    assert checkpoint.name == "owner/name"
    assert checkpoint.config()["model_type"] == "llama"
    assert torch.equal(checkpoint.weights(torch.float32)["lm_head.weight"], oracle("llama").lm_head.weight)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find("owner/name") == checkpoint
    with pytest.raises(ModelError, match="owner/other isn't on this machine and the network is off"):
        find("owner/other")
    with pytest.raises(ModelError, match=r"owner/name:x\.gguf isn't on this machine"):
        find("owner/name:x.gguf")


def test_one_file_of_a_repository(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    write_gguf(oracle("llama"), tmp_path / "repository" / "tiny.Q4.gguf")
    cached(tmp_path / "hub", "owner/name", tmp_path / "repository")
    checkpoint = find("owner/name:tiny.Q4.gguf", offline=True)
    assert checkpoint.folder is None
    assert checkpoint.config()["hidden_size"] == 48


def test_only_what_is_read_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    stages: list[str] = []
    assert find("owner/name", report=lambda stage, done, total: stages.append(stage)).folder == folder
    assert stages == ["fetching owner/name"]
    assert asked["local_files_only"] is False
    read = {"config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"}
    unread = {
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
        "modeling_custom.py",
        "README.md",
    }
    assert {name for name in read | unread if any(fnmatch(name, p) for p in asked["allow_patterns"])} == read


def failing(error: Exception) -> Callable[..., str]:
    def snapshot(name: str, **options: Any) -> str:
        raise error

    return snapshot


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "needs permission"),
        (errors.RepositoryNotFoundError, "isn't on Hugging Face, or is private"),
        (errors.LocalEntryNotFoundError, "Hugging Face can't be reached"),
        (errors.OfflineModeIsEnabled, "isn't on this machine"),
        (TimeoutError, "can't be fetched from Hugging Face"),
    ],
)
def test_hugging_faces_errors_become_one_sentence(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(kind.__new__(kind)))
    with pytest.raises(ModelError, match=f"owner/name .*{said}") as caught:
        find("owner/name")
    assert "\n" not in str(caught.value)


def test_what_the_hub_logs_of_each_try_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub.utils import logging

    def download(*_: Any, **__: Any) -> str:
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 4/5].")
        raise errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    before = logging.get_verbosity()
    for verbosity, said in (("", False), ("warning", True)):
        monkeypatch.setenv("HF_HUB_VERBOSITY", verbosity)
        with pytest.raises(ModelError, match="can't be reached"):
            fetch_config("owner/name")
        assert ("Retrying" in caplog.text) is said
    assert logging.get_verbosity() == before


def test_a_repository_without_a_config_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(ModelError, match=r"has no config\.json on Hugging Face"):
        find("owner/name")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_a_broken_config_is_said(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        find(str(folder)).config()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ one }}", "{{ one }}"),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ two }}"}], "{{ two }}"),
        ([{"name": "tool_use", "template": "no"}], None),
        ([3], None),
        (3, None),
    ],
)
def test_the_template_of_the_tokenizers_config(folder: Path, template: object, expected: str | None) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert find(str(folder)).chat_template() == expected
    (folder / "chat_template.jinja").write_text("{{ own file }}")
    assert find(str(folder)).chat_template() == "{{ own file }}"


def test_a_tokenizer_never_cuts_a_text(folder: Path) -> None:
    cutting = tokenizer()
    cutting.enable_truncation(2)
    cutting.enable_padding(length=20)
    cutting.save(str(folder / "tokenizer.json"))
    assert find(str(folder)).tokenizer().encode("a b a").ids == [0, 1, 0]


def test_a_broken_tokenizer_is_said(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json isn't a usable tokenizer"):
        find(str(folder)).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"holds no usable tokenizer: add its tokenizer\.json"):
        find(str(folder)).tokenizer()


def test_older_tokenizer_files_go_through_transformers(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"t": 0, "h": 1, "th": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert find(str(folder)).tokenizer().encode("thh").tokens == ["th", "h"]


def test_models_are_listed(folder: Path, tmp_path: Path) -> None:
    (here,) = installed()
    assert (here.name, here.here, here.nbytes) == ("smollm2", False, 0)
    assert "Apache-2.0" in here.description
    cached(tmp_path / "hub", "owner/name", folder)
    assert [(model.name, model.here) for model in installed()] == [("smollm2", False), ("owner/name", True)]
    assert installed()[1].nbytes > 100_000
    assert installed()[1].format == "float32, 32 bits a weight"


def test_listing_models_needs_no_torch() -> None:
    code = "import sys; from longspec.model.files.hub import installed; installed(); print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "False", result.stderr


def test_the_cache_folder_follows_the_standard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models_folder() == tmp_path / "cache" / "longspec" / "models"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert models_folder() == tmp_path / ".cache" / "longspec" / "models"


@pytest.mark.real
def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the user's own cache
    checkpoint = find(next(iter(SHORT_NAMES)))
    assert checkpoint.config()["num_hidden_layers"] == 30
    assert checkpoint.generation_config() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tokenizer = checkpoint.tokenizer()
    assert "|".join(tokenizer.encode("In 2023, 12345 apples").tokens) == "In|Ġ|2|0|2|3|,|Ġ|1|2|3|4|5|Ġapples"
    assert "<|im_start|>" in (checkpoint.chat_template() or "")
    for dtype in (torch.float32, torch.bfloat16):
        weights = checkpoint.weights(dtype)
        names = [f"model.layers.29.self_attn.{which}_proj.weight" for which in "qkv"]
        assert weights.joined(names).data_ptr() == weights[names[0]].data_ptr()
        assert weights["model.norm.weight"].isfinite().all()
