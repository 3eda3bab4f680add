"""The default model, loaded once in a process for all tests that read it."""

from __future__ import annotations

from functools import cache

from longspec.model.load import Model, load_model


def default(dtype: str, strict: bool = False) -> Model:
    """In fp32, bf16, int8, or what `auto` takes."""
    return _loaded(dtype, strict)


def exact() -> Model:
    """In a dtype in which bets may change no token here: int8 by the kernels, which loads and writes in a quarter of
    the time, else fp32.
    """
    model = default("auto")
    return model if model.decoder.is_exact else default("fp32")


@cache
def _loaded(dtype: str, strict: bool) -> Model:
    return load_model("smollm2", dtype=dtype, strict=strict)
