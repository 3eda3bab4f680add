"""Reasoning effort, as variables of the model's chat template.

Takes a vocabulary with its template; loads no model, so that an unknown effort is refused before one is loaded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.text.tokenizer import Vocabulary

__all__ = ["EFFORTS", "checked", "variables"]

EFFORTS = ("none", "low", "medium", "high")

_LEVEL = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")  # Qwen 3 and SmolLM3; DeepSeek V3.1 and Granite


def checked(effort: str) -> str:
    """Return the effort; raise UsageError if it isn't one of EFFORTS."""
    if effort not in EFFORTS:
        raise UsageError(f"The effort {effort!r} is not known; use one of: {', '.join(EFFORTS)}.")
    return effort


def variables(vocabulary: Vocabulary, effort: str | None) -> dict[str, Any]:
    """Variables of the chat template for this effort.

    Raises:
        UsageError: the template doesn't support the effort.
    """
    if effort is None:
        return {}
    checked(effort)
    known = vocabulary.variables
    switches = {name: effort != "none" for name in _SWITCHES if name in known}
    if _LEVEL in known and (effort != "none" or not switches):
        if effort == "none" and not re.search(r"['\"]none['\"]", vocabulary.template or ""):
            raise UsageError("This model's chat template knows the efforts low, medium and high; use one of these.")
        return {**switches, _LEVEL: effort}
    if switches and effort in ("none", "high"):
        return switches
    if switches:
        raise UsageError(
            f"This model's chat template can only turn thinking on and off, so there is no effort {effort!r}; use high "
            "or none, or a --reasoning-budget."
        )
    raise UsageError(
        "This model's chat template knows no effort: none of its variables is "
        f"{', '.join((_LEVEL, *_SWITCHES))}; leave the effort out."
    )
