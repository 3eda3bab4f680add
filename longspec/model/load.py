"""Loading: from a model's name to a decoder and a vocabulary, with the seconds of each.

Chooses device and dtype where they are left open. Imports stay light: tokenizers, not transformers, wherever the
checkpoint has a tokenizer.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from time import perf_counter
from typing import Any

import torch

from longspec.errors import UsageError
from longspec.machine.system import quota
from longspec.machine.tuned import Fit, fit_path, read_fit
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.held import Held
from longspec.model.files.hub import find
from longspec.model.files.keep import kept
from longspec.model.files.store import Report, quiet
from longspec.model.fingerprint import fingerprint, lineage
from longspec.model.native import missing
from longspec.model.weights.footprint import shapes_of
from longspec.model.weights.streamed import Streamed
from longspec.text.tokenizer import Vocabulary

__all__ = [
    "CODED",
    "DTYPES",
    "Model",
    "Opened",
    "auto_dtype",
    "check_dtype",
    "choose_device",
    "choose_dtype",
    "end_tokens",
    "load_model",
    "native_dtype",
    "open_model",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}
"""What rows and the cache are in."""

CODED = {"int8": "Q8_0", "int4": "Q4_0"}
"""Dtypes whose matrices are codes (`longspec.model.weights.quantized`): a file's own, as they are, and what values are
quantized to.
"""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded checkpoint: decoder and vocabulary."""

    name: str
    dtype: str  # a key of DTYPES
    decoder: Decoder
    vocabulary: Vocabulary
    end_tokens: tuple[int, ...]
    defaults: Mapping[str, Any]  # the content of generation_config.json
    seconds: Mapping[str, float]  # by stage: tokenizer, weights
    fit: Fit | None = None  # the settings that `longspec tune` stored for it
    is_read: bool = False  # all weights are resident; else pages of mapped files are loaded when they are touched
    # Held during a forward pass: a decoder has one workspace. Engines of the same model share the lock.
    lock: AbstractContextManager[Any] = field(default_factory=RLock, compare=False, repr=False)
    checkpoint: Checkpoint | None = field(default=None, compare=False, repr=False)  # the files that it was read from

    @property
    def lineage(self) -> str:
        """The dtype-independent fingerprint; see `longspec.model.fingerprint`."""
        return lineage(self.decoder)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The exact fingerprint, on which cache rows depend; see `longspec.model.fingerprint`."""
        return fingerprint(self.decoder, self.vocabulary.tokenizer, self.dtype)


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint with its config and tokenizer read, its weights not yet: the input of a memory plan."""

    checkpoint: Checkpoint
    config: Config
    vocabulary: Vocabulary
    dtype: str  # a key of DTYPES
    device: torch.device
    tokenizer_seconds: float
    fit: Fit | None = None  # the settings that `longspec tune` stored for it

    def set_threads(self, threads: int | None = None) -> None:
        """Set torch's thread count on a CPU: the given one, else OMP_NUM_THREADS, else the tuned one, else at most
        the container's CPU quota: threads beyond it are stopped whenever the quota is used up, and all others wait
        for them.
        """
        if threads is None and "OMP_NUM_THREADS" not in os.environ:
            allowed = quota() or torch.get_num_threads()
            threads = self.fit.threads if self.fit is not None else min(allowed, torch.get_num_threads())
        if threads is not None:
            torch.set_num_threads(threads)

    def load(
        self, *, strict: bool = False, kept: int | None = None, pool: int = 0, report: Report | None = None
    ) -> Model:
        """Read the weights. kept: the number of layers that stay in memory where the others are to be read from disk
        for every pass; pool: the bytes that experts may take then. Raises ModelError where they are damaged or don't
        fit the config.
        """
        began = perf_counter()
        dtype, coded = DTYPES[self.dtype], CODED.get(self.dtype)
        if report is not None and coded is not None and (kinds := self.checkpoint.recoded):
            bits = self.dtype.removeprefix("int")
            report(f"quantizing {', '.join(kinds)} to {bits} bits, as no kernel reads these codes", 0, 0)
        weights = self.checkpoint.weights(dtype, report or quiet, coded=coded is not None)
        if kept is not None:
            shapes, _ = shapes_of(self.checkpoint, weights, self.config, coded)
            weights = Streamed(weights, shapes, kept, pool, report or quiet)
        is_read = self.device.type == "cpu" and (coded is not None or kept is not None or weights.read())
        decoder = Decoder(self.config, weights, self.device, strict=strict, coded=coded)
        defaults = self.checkpoint.generation_config()
        return Model(
            name=self.checkpoint.name,
            dtype=self.dtype,
            decoder=decoder,
            vocabulary=self.vocabulary,
            end_tokens=end_tokens(self.config, defaults, self.vocabulary),
            defaults=defaults,
            checkpoint=self.checkpoint,
            seconds={"tokenizer_s": self.tokenizer_seconds, "weights_s": perf_counter() - began},
            fit=self.fit,
            is_read=is_read,
        )


def open_model(
    name: str | torch.nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    offline: bool | None = None,
    report: Report | None = None,
) -> Opened:
    """Find a model by short name, path or Hugging Face id, or take a model object of transformers, with its tokenizer.
    report: a callback for downloads: stage, bytes done, total; offline: forbid them.

    Raises:
        ModelError: it can't be found, read, or isn't supported.
        UsageError: the dtype or the device is unknown, or not available.
    """
    place = choose_device(device)
    checkpoint = find(name, offline=offline, report=report) if isinstance(name, str) else Held.of(name, tokenizer)
    config = Config.read(checkpoint.config())
    fit = read_fit(fit_path(config, str(place), coded=checkpoint.coded))
    kind = choose_dtype(dtype, place, checkpoint, config, fit)
    if kind == "int4" and (folder := kept(checkpoint)) is not None:
        checkpoint = Checkpoint(checkpoint.name, folder)
    began = perf_counter()
    special = {role: token for role, token in checkpoint.tokenizer_config().items() if role in _SPECIAL}
    # A GGUF file's add_bos_token holds for chats too; in a folder the template alone decides, as for transformers.
    begins = checkpoint.gguf is not None and checkpoint.tokenizer_config().get("add_bos_token") is True
    vocabulary = Vocabulary(checkpoint.tokenizer(), special, checkpoint.chat_template(), begins=begins)
    seconds = perf_counter() - began
    return Opened(checkpoint, config, vocabulary, kind, place, seconds, fit)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    strict: bool = False,
    report: Report | None = None,
) -> Model:
    """Open a model and read its weights; raises the errors of both."""
    return open_model(name, dtype=dtype, device=device, report=report).load(strict=strict, report=report)


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where torch finds one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"The device {name!r} is not known; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} was asked for, but this torch ({torch.__version__}) finds no CUDA GPU.")
    return device


def check_dtype(name: str) -> None:
    """Raise UsageError where no dtype has this name."""
    if name not in ("auto", *DTYPES):
        raise UsageError(f"The dtype {name!r} is not known; use one of: auto, {', '.join(DTYPES)}.")


def choose_dtype(
    name: str, device: torch.device, checkpoint: Checkpoint, config: Config, fit: Fit | None = None
) -> str:
    """The dtype of that name. Raises UsageError where there is none, or it can't be had here."""
    check_dtype(name)
    if name == "auto":
        return auto_dtype(device, checkpoint, config, fit)[0]
    if name in CODED and (why := missing(config, DTYPES[name], device)) is not None:
        raise UsageError(f"The dtype {name} can't be had here: {why}. Use auto, bf16 or fp32.")
    return name


def auto_dtype(device: torch.device, checkpoint: Checkpoint, config: Config, fit: Fit | None = None) -> tuple[str, str]:
    """The dtype of `auto`, and why: the tuned one, if there is one; else int8 where the checkpoint is quantized and the
    kernel is available, bf16 where its kernel is available, and `native_dtype` elsewhere.
    """
    tuned = "longspec tune found it the fastest here"
    if fit is not None and fit.dtype not in CODED:
        return fit.dtype, tuned
    if (why := missing(config, DTYPES["int8"], device)) is not None:
        native = native_dtype(device)
        speed = "multiplies it fast" if native == "bf16" else "multiplies no bf16 fast"
        return native, f"no C kernel runs it ({why}), and {device.type} {speed}"
    if fit is not None:
        return fit.dtype, tuned
    if checkpoint.coded:
        return "int8", "its file holds codes, which the C kernels multiply as they are"
    return "bf16", "the C kernels multiply it"


def native_dtype(device: torch.device) -> str:
    """bf16 where the device multiplies it natively, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("bf16") else "fp32"


def end_tokens(config: Config, defaults: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """All tokens that end a text: those of the generation config, the config and the tokenizer, and those that are
    known by name.
    """
    named = defaults.get("eos_token_id")
    ends = list(named) if isinstance(named, list) else [] if named is None else [named]
    ends += config.end_tokens
    ends += [i for i in [vocabulary.id_of("eos_token")] if i is not None]
    ends += vocabulary.turn_ends
    return tuple(dict.fromkeys(int(end) for end in ends if not vocabulary.is_spoken(int(end))))
