"""A tiny model that takes tools and thinks if it is asked to; of what it writes only the grammar makes sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from support.checkpoints import load, oracle, write
from support.engines import engine
from support.letters import tokenizer_of
from tokenizers import AddedToken

from longspec.engine.engine import Engine
from longspec.model.load import Model
from longspec.text.tokenizer import Vocabulary

TEMPLATE = """{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}{{ m.role[0] }}{{ m.content }}\
{% for c in m.tool_calls or [] %}<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}{% endfor %}\
{% if add_generation_prompt %}a{% if enable_thinking %}<think>{% endif %}{% endif %}"""

TOWN: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bonn", "Oslo"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Town(BaseModel):
    """A town to go to."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Bonn", "Oslo"]
    days: Literal[1, 2]


def tool(name: str, *, strict: bool = False) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": TOWN, "strict": strict}}


def vocabulary() -> Vocabulary:
    """Every printable character is a token; 2 ends a text."""
    names = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = tokenizer_of(names)
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return Vocabulary(tokenizer, {"pad_token": "<pad>", "eos_token": "</s>"}, TEMPLATE)


def agent(folder: Path, drafter: str = "ngram") -> Engine:
    decoder = load(write(oracle("llama", vocab_size=104, max_position_embeddings=20_000), folder))
    return engine(Model("tiny", "fp32", decoder, vocabulary(), (2,), {}, {}), drafter)
