"""Tools that a model may call: how each family writes its calls, read while they are written, and held to schemas.

A format is a file with a subclass of `Format`, and a line in FORMATS. Which one a model writes its chat template says.
"""

from __future__ import annotations

from collections.abc import Mapping

from longspec.calls.format import Format
from longspec.calls.gemma import Gemma
from longspec.calls.harmony import Harmony
from longspec.calls.hermes import Hermes
from longspec.calls.llama import Llama
from longspec.calls.mistral import Mistral, MistralList
from longspec.calls.qwen_xml import QwenXml

__all__ = ["FORMATS", "find"]

FORMATS: Mapping[str, Format] = {
    "qwen-xml": QwenXml(),  # before hermes: its templates have both's marks
    "hermes": Hermes(),
    "mistral": Mistral(),  # before the list, whose mark it has too
    "mistral-list": MistralList(),
    "llama": Llama(),
    "harmony": Harmony(),
    "gemma": Gemma(),
}
"""By name, in the order in which a template is asked."""


def find(template: str | None) -> Format | None:
    """The format in which a model with this chat template writes calls; None where it takes no tools, or writes them
    in a form that isn't known here.
    """
    if template is None or "tools" not in template:
        return None
    return next((form for form in FORMATS.values() if form.is_of(template)), None)
