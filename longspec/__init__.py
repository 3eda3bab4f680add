"""longspec: long answers, several tokens per forward pass, exactly what plain decoding would give.

Names are loaded on first use: `import longspec` must not import torch (the command's help has to be instant).
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspec.engine.answer import Answer as Answer
    from longspec.engine.engine import Engine as Engine
    from longspec.engine.scoring import Score as Score
    from longspec.engine.session import Session as Session
    from longspec.errors import BudgetError as BudgetError
    from longspec.errors import ContextError as ContextError
    from longspec.errors import LongspecError as LongspecError
    from longspec.errors import ModelError as ModelError
    from longspec.errors import UsageError as UsageError
    from longspec.sampling.parameters import Sampling as Sampling
    from longspec.types import Commit as Commit
    from longspec.types import Draft as Draft
    from longspec.types import Drafter as Drafter
    from longspec.types import Stats as Stats
    from longspec.types import TokenLogprob as TokenLogprob

__version__ = "0.1.0"

# OpenMP's threads, which torch has beside the kernels' team, spin behind each operator that they share: 300,000 times
# unless the user or this says otherwise, some milliseconds in which the team lacks a core. Torch reads it when it is
# loaded. (On two cores of a Zen 4 processor the default model wrote 90 tokens a second with and 170 without.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {
    "Answer": "engine.answer",
    "BudgetError": "errors",
    "Commit": "types",
    "ContextError": "errors",
    "Draft": "types",
    "Drafter": "types",
    "Engine": "engine.engine",
    "LongspecError": "errors",
    "ModelError": "errors",
    "Sampling": "sampling.parameters",
    "Score": "engine.scoring",
    "Session": "engine.session",
    "Stats": "types",
    "TokenLogprob": "types",
    "UsageError": "errors",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"longspec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'longspec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
