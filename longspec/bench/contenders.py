"""The contenders of `longspec bench engines`: longspec in several settings, transformers, llama.cpp.

Takes names, files and threads; gives each contender's worker settings, or the reason why it isn't available. Loads
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from longspec.drafters import DRAFT_TOKENS
from longspec.engine.options import check
from longspec.errors import UsageError
from longspec.kernels.isa import processor_features
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.convert import converted
from longspec.model.load import DTYPES, Opened, check_dtype, end_tokens, native_dtype

__all__ = ["PEERS", "Contender", "ends", "ours", "peers"]

PEERS = ("transformers", "lookup", "assistant", "llama.cpp")
"""transformers' generate plainly, with its prompt lookup, with a draft model; and llama.cpp."""

_LLAMA_NAMES = {
    "avx2": "AVX2", "fma": "FMA", "avx_vnni": "AVX_VNNI", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16", "amx_int8": "AMX_INT8", "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8",
}  # fmt: skip
"""Instructions, by the system's names and by those of llama.cpp's report of its build: one that was built without any
that this processor has would be measured below its best."""

_LOOKUP = 10
"""Tokens that transformers' prompt lookup drafts: what its own documentation takes."""


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine and the settings for its worker process."""

    name: str
    kind: str  # a key of longspec.bench.worker.WRITERS
    settings: Mapping[str, Any]
    batches: bool  # whether it decodes several sequences in one pass
    python: str = ""  # the interpreter that has its package; this one, if empty


def ours(settings: Sequence[str], model: str, draft_model: str | None, threads: int) -> list[Contender]:
    """Contenders of longspec itself, one per setting: DRAFTER, DRAFTER/CACHE or DRAFTER/CACHE/DTYPE.

    Raises:
        UsageError: a setting has more parts, or a name in it is unknown.
    """
    contenders = []
    for setting in settings:
        drafter, cache, dtype, *more = [*setting.split("/"), *["auto"] * max(0, 2 - setting.count("/"))]
        if more or not (drafter and cache and dtype):
            raise UsageError(f"The setting {setting!r} is no drafter/cache/dtype; write it as none, or auto/int8/bf16.")
        drafts = drafter == "auto" or "model" in drafter.split("+")
        check(drafter, cache, False, DRAFT_TOKENS, {"draft": draft_model} if drafts and draft_model else {})
        check_dtype(dtype)
        common = {"model": model, "drafter": drafter, "cache": cache, "dtype": dtype, "threads": threads}
        contenders.append(
            Contender(setting, "longspec", {**common, "draft_model": draft_model if drafts else None}, True)
        )
    return contenders


def ends(model: Opened) -> tuple[int, ...]:
    """The end-of-text tokens of a model."""
    return end_tokens(model.config, model.checkpoint.generation_config(), model.vocabulary)


def peers(
    wanted: Sequence[str], checkpoint: Checkpoint, smaller: Checkpoint | None, python: str, context: int, threads: int
) -> list[Contender | str]:
    """The other engines on the same files; for an unavailable one, the reason. context: maximum tokens of a sequence.
    python: the interpreter that has llama-cpp-python; this one, if empty.
    """
    dtype = native_dtype(torch.device("cpu"))
    contenders: list[Contender | str] = []
    for name in wanted:
        if name == "llama.cpp":
            if checkpoint.gguf is None:
                contenders.append("llama.cpp reads GGUF files, and this model has none")
            elif not python and find_spec("llama_cpp") is None:
                contenders.append("llama.cpp needs llama-cpp-python, here or in the interpreter of --llama-python")
            else:
                has = [_LLAMA_NAMES[feature] for feature in _LLAMA_NAMES if feature in processor_features()]
                settings = {"file": str(checkpoint.gguf), "threads": threads, "context": context, "instructions": has}
                contenders.append(Contender(name, name, {**settings, "repacked": True}, False, python))
            continue
        assistant = smaller if name == "assistant" else None
        if name == "assistant" and assistant is None:
            contenders.append("assisted generation needs a --draft-model")
        elif checkpoint.folder is None or (assistant is not None and assistant.folder is None):
            contenders.append(f"{name} reads a model's folder, and this is a single file")
        else:
            settings = {"folder": _readable(checkpoint, dtype), "dtype": dtype, "threads": threads}
            settings |= {"lookup": _LOOKUP if name == "lookup" else 0}
            settings |= {"assistant": _readable(assistant, dtype) if assistant is not None else None}
            plain = name == "transformers"
            contenders.append(Contender(name if plain else f"transformers {name}", "transformers", settings, plain))
    return contenders


def _readable(checkpoint: Checkpoint, dtype: str) -> str:
    """The folder that transformers loads; for a checkpoint from GGUF, the converted copy."""
    assert checkpoint.folder is not None
    return str(checkpoint.folder if checkpoint.gguf is None else converted(checkpoint.folder, DTYPES[dtype]))
