"""The default model, loaded once in a process for all tests that read it."""

from __future__ import annotations

from functools import cache

from longspec.model.load import Model, load_model


def default(dtype: str, strict: bool = False) -> Model:
    """In fp32, bf16, int8, or what `auto` takes."""
    return _loaded(dtype, strict)


@cache
def _loaded(dtype: str, strict: bool) -> Model:
    return load_model("smollm2", dtype=dtype, strict=strict)
