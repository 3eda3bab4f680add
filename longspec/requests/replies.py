"""Responses in OpenAI's formats for chats and completions: complete objects, and chunks of a stream.

Takes answers and commits as plain values, gives dicts. Figures without an OpenAI field are in each choice's `longspec`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from longspec.engine.answer import Answer
    from longspec.types import Commit, TokenLogprob

__all__ = ["Event", "Format", "Reply", "Spelled", "call_id", "statistics", "usage"]

Event = tuple[str | None, Mapping[str, Any]]
"""A server-sent event: its name, where the format has names, and its object."""

Spelled = Callable[[int], bytes | None]
"""A token's bytes; None for one that is no text. Where log-probabilities are told."""

_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Format(Protocol):
    """The response to one request, whole or as events."""

    @property
    def done(self) -> bytes:
        """What a stream ends with."""
        ...

    def whole(self, answers: Sequence[Answer], seeds: Sequence[int | None], choices: int) -> dict[str, Any]:
        """The complete response, with all answers in order; `choices` of them per prompt."""
        ...

    def begins(self, prompts: Sequence[int]) -> Iterator[Event]:
        """The events before any text. prompts: each answer's tokens of the prompt."""
        ...

    def piece(self, index: int, commit: Commit) -> Iterator[Event]:
        """Those of new text of an answer."""
        ...

    def ends(self, index: int, answer: Answer, seed: int | None) -> Iterator[Event]:
        """Those after an answer's last text."""
        ...

    def closes(self, answers: Sequence[Answer], choices: int) -> Iterator[Event]:
        """Those after all answers."""
        ...


@dataclass(frozen=True, slots=True)
class Reply:
    """The format of a chat or completion."""

    chat: bool
    id: str
    created: int
    model: str
    spelled: Spelled | None = None
    include_usage: bool = False
    done: bytes = b"data: [DONE]\n\n"

    def whole(self, answers: Sequence[Answer], seeds: Sequence[int | None], choices: int) -> dict[str, Any]:
        replies = [self._choice(i, answer, seed) for i, (answer, seed) in enumerate(zip(answers, seeds, strict=True))]
        return {**self._head(""), "choices": replies, "usage": usage(answers, choices)}

    def begins(self, prompts: Sequence[int]) -> Iterator[Event]:
        for index in range(len(prompts) if self.chat else 0):
            yield self._piece(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, index: int, commit: Commit) -> Iterator[Event]:
        told = {"logprobs": self._told(commit.logprobs)} if commit.logprobs else {}
        if not self.chat:
            if commit.said or told:
                yield self._piece(index, {"text": commit.said, **told})
            return
        delta: dict[str, Any] = {"reasoning_content": commit.thought} if commit.thought else {}
        if commit.said:
            delta["content"] = commit.said
        if commit.calls:
            delta["tool_calls"] = [_part(part.index, part.name, part.arguments) for part in commit.calls]
        if delta or told:
            yield self._piece(index, {"delta": delta, **told})

    def ends(self, index: int, answer: Answer, seed: int | None) -> Iterator[Event]:
        ending: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        ending |= {"finish_reason": _reason(answer), "longspec": statistics(answer, seed)}
        yield self._piece(index, ending)

    def closes(self, answers: Sequence[Answer], choices: int) -> Iterator[Event]:
        if self.include_usage:
            yield None, {**self._head(".chunk"), "choices": [], "usage": usage(answers, choices)}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _piece(self, index: int, content: dict[str, Any]) -> Event:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **content}
        return None, {**self._head(".chunk"), "choices": [choice], **({"usage": None} if self.include_usage else {})}

    def _choice(self, index: int, answer: Answer, seed: int | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [_call(call.name, call.arguments) for call in answer.calls]
        content: dict[str, Any] = {"message": message} if self.chat else {"text": answer.text}
        told = None if answer.logprobs is None else self._told(answer.logprobs)
        end = {"finish_reason": _reason(answer), "logprobs": told, "longspec": statistics(answer, seed)}
        return {"index": index, **content, **end}

    def _told(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities of an answer's tokens, in the form of chats or of completions."""
        assert self.spelled is not None
        texts = [(one, self.spelled(one.token)) for one in logprobs]
        known = [(one, text) for one, text in texts if text is not None]  # the end of a text isn't told
        tops = [[(self.spelled(token) or b"", value) for token, value in one.top] for one, _ in known]
        if self.chat:
            content = [
                {**_token(text, one.logprob), "top_logprobs": [_token(*each) for each in top]}
                for (one, text), top in zip(known, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [_letters(text) for _, text in known],
            "token_logprobs": [_finite(one.logprob) for one, _ in known],
            "top_logprobs": [{_letters(text): _finite(value) for text, value in top} for top in tops],
        }


def _token(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _letters(text), "logprob": _finite(logprob), "bytes": [*text]}


def _letters(text: bytes) -> str:
    return text.decode(errors="replace")


def _finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI's API says this number for it."""
    return max(logprob, -9999.0)


def call_id() -> str:
    """A name for a call: nine letters and digits, as Mistral's chat templates want it."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


def _part(index: int, name: str, arguments: str) -> dict[str, Any]:
    """A part of a call: its first one brings id and name."""
    return {"index": index, **(_call(name, arguments) if name else {"function": {"arguments": arguments}})}


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
    """OpenAI's word; a text that was ended early is told as one that was cut: `length`."""
    if answer.finish_reason != "stop":
        return "length"
    return "tool_calls" if answer.calls else "stop"
