"""Responses in OpenAI's formats: complete objects, and chunks of a stream.

Takes answers and texts as plain values, gives dicts. Figures without an OpenAI field are in each choice's `longspec`.
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
    """The response format of one request: chat or completion."""

    chat: bool
    id: str
    created: int
    model: str

    def whole(self, answers: Sequence[Answer], seeds: Sequence[int | None], choices: int) -> dict[str, Any]:
        """The complete response, with all answers in order; `choices` of them per prompt."""
        replies = [self._choice(i, answer, seed) for i, (answer, seed) in enumerate(zip(answers, seeds, strict=True))]
        return {**self._head(""), "choices": replies, "usage": usage(answers, choices)}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk before an answer's first text: a chat's role; None for a completion."""
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}}) if self.chat else None

    def piece(self, index: int, thought: str, said: str) -> dict[str, Any]:
        """A chunk of reasoning (chats only) and answer text."""
        if not self.chat:
            return self._piece(index, {"text": said})
        delta = {"reasoning_content": thought} if thought else {}
        return self._piece(index, {"delta": delta | ({"content": said} if said else {})})

    def last(self, index: int, answer: Answer, seed: int | None) -> dict[str, Any]:
        """The chunk after an answer's last text: its finish reason and its figures."""
        ending: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        ending |= {"finish_reason": _reason(answer), "longspec": statistics(answer, seed)}
        return self._piece(index, ending)

    def closing(self, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
        """The stream's final chunk with the request's usage, if the client asked for it."""
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
    """Token counts of all answers; a prompt with several choices is counted once."""
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
    """An answer's figures under the names of `longspec run --json`. seed: the same seed and key
    reproduce the answer.
    """
    report = answer.report()
    names = ("finish_reason", "dtype", "exactness", "cache", "cache_lossless", "speculation", "timing")
    return {**{name: report[name] for name in names}, "seed": seed}


def _reason(answer: Answer) -> str:
    return _REASONS.get(answer.finish_reason, "length")
