"""Tools, and the toolboxes of every format."""

from __future__ import annotations

from typing import Any

from longspec.calls import FORMATS
from longspec.calls.toolbox import Toolbox

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Its forecast.", "parameters": PARAMETERS},
}
RAIN: dict[str, Any] = {"type": "function", "function": {"name": "rain", "parameters": PARAMETERS}}


def box(name: str, choice: str = "auto", *, strict: bool = False, parallel: bool = True) -> Toolbox:
    """The tools weather and rain for a format."""
    tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in (WEATHER, RAIN)]
    return Toolbox.of(FORMATS[name], tools, choice, parallel)
