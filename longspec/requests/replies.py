"""Answers in OpenAI's shapes: whole ones, and pieces of a stream.

Takes answers and texts as plain values, gives dicts. What OpenAI has no field for stands in each choice's `longspec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspec.engine.answer import Answer

__all__ = ["Reply"]

_REASONS = {"stop": "stop", "length": "length"}
"""The others have no name there; a text that was ended early is told as one that was cut: `length`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The shape of one request's answers: a chat's, or a completion's."""

    chat: bool
    id: str
    created: int
    model: str

    def whole(self, answers: Sequence[Answer], seeds: Sequence[int | None], choices: int) -> dict[str, Any]:
        """All texts, in their order; `choices` of them answer each prompt."""
        replies = [self._choice(i, answer, seed) for i, (answer, seed) in enumerate(zip(answers, seeds, strict=True))]
        return {**self._head(""), "choices": replies, "usage": usage(answers, choices)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Before a text's first piece: a chat says whose words they are."""
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}}) if self.chat else None

    def piece(self, index: int, thought: str, said: str) -> dict[str, Any]:
        """What came of the reasoning, which a completion has none of, and of the answer."""
        if not self.chat:
            return self._piece(index, {"text": said})
        delta = {"reasoning_content": thought} if thought else {}
        return self._piece(index, {"delta": delta | ({"content": said} if said else {})})

    def last(self, index: int, answer: Answer, seed: int | None) -> dict[str, Any]:
        """After a text's last piece: why it ended, and what it took."""
        ending: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        ending |= {"finish_reason": _reason(answer), "longspec": statistics(answer, seed)}
        return self._piece(index, ending)

    def closing(self, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
        """What the whole request took, where a stream was asked for it."""
        return {**self._head(".chunk"), "choices": [], "usage": usage(answers, choices)}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _piece(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head(".chunk"),
            "choices": [{"index": index, "logprobs": None, "finish_reason": None, **content}],
        }

    def _choice(self, index: int, answer: Answer, seed: int | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        content: dict[str, Any] = {"message": message} if self.chat else {"text": answer.text}
        end = {"finish_reason": _reason(answer), "logprobs": None, "longspec": statistics(answer, seed)}
        return {"index": index, **content, **end}


def usage(answers: Sequence[Answer], choices: int) -> dict[str, Any]:
    """Tokens of all texts together; a prompt with several choices is counted once."""
    prompts = [answer.usage for answer in answers[::choices]]
    prompt = sum(each["prompt_tokens"] for each in prompts)
    completion = sum(answer.usage["completion_tokens"] for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each["cached_tokens"] for each in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(each.usage["reasoning_tokens"] for each in answers)},
    }


def statistics(answer: Answer, seed: int | None) -> dict[str, Any]:
    """As `longspec run --json` names them. seed: with it and the same key, the text can be had again."""
    report = answer.report()
    names = ("finish_reason", "dtype", "exactness", "cache", "cache_lossless", "speculation", "timing")
    return {**{name: report[name] for name in names}, "seed": seed}


def _reason(answer: Answer) -> str:
    return _REASONS.get(answer.finish_reason, "length")
