"""How drafts are accepted: exactly, or with `semantic:FOLDER` by what a probe says of their meaning, which is lossy.

Takes an engine's options and a text's; gives the drafter that writes whole steps, or refuses what makes no sense. Loads
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspec.errors import UsageError
from longspec.semantic.probe import read_about
from longspec.semantic.steps import STEP_TOKENS
from longspec.types import Drafter

__all__ = ["EXACT", "LOSSY", "REMARK", "accepting", "check_text"]

EXACT, LOSSY = "exact", "semantic"
REMARK = f"--accept {LOSSY} is lossy: steps stay that the model would have written otherwise"

_HELD = ("json_schema", "regex", "tools", "reasoning_budget")


def accepting(
    accept: str, drafter: str | Drafter, options: Mapping[str, Any], most: int | None, *, strict: bool = False
) -> tuple[dict[str, Any], Path | None]:
    """An engine's `drafter`, `options` and `draft_tokens`, and the folder of the probe: as they were given, and None,
    for exact acceptance; for acceptance by meaning the draft model that writes whole steps. most: tokens of a draft,
    None for the usual number.

    Raises:
        UsageError: an unknown way to accept, no probe, no draft model, or another drafter.
    """
    name, _, folder = accept.partition(":")
    if accept == EXACT:
        return {"drafter": drafter, "options": dict(options), "draft_tokens": most}, None
    if name != LOSSY:
        raise UsageError(f"Drafts can't be accepted by {accept!r}; use {EXACT}, or {LOSSY}:FOLDER, which is lossy.")
    if not folder:
        raise UsageError(f"{LOSSY} needs a probe: name its folder ({LOSSY}:FOLDER), which `longspec train semantic` "
                         "writes for a target and a draft model.")  # fmt: skip
    if strict:
        raise UsageError(f"--strict is for exact texts, and --accept {LOSSY} writes others; leave one out.")
    if not options.get("draft"):
        raise UsageError(f"--accept {LOSSY} judges the steps that a draft model writes: name one (--draft-model).")
    drafter = "model+ngram" if drafter == "auto" else drafter
    if not isinstance(drafter, str) or drafter.split("+")[0].split(":")[0] != "model":
        raise UsageError(f"--accept {LOSSY} judges the steps that a draft model writes, and the drafter is {drafter}; "
                         "use auto, model, or model over another one.")  # fmt: skip
    read_about(folder)
    most = STEP_TOKENS if most is None else most
    return {"drafter": drafter, "options": {**options, "steps": True}, "draft_tokens": most}, Path(folder)


def check_text(options: Mapping[str, Any]) -> None:
    """Raise UsageError where a text is to be held to something that a step accepted by its meaning may break."""
    held = [name for name in _HELD if options.get(name) is not None]
    if held:
        raise UsageError(f"{held[0]} holds every token, and steps accepted by their meaning aren't held; leave it out, "
                         f"or load the model without --accept {LOSSY}.")  # fmt: skip
