"""One sequence being decoded, with all its state: tokens, cache, sampling, and its end conditions.

A session knows when its answer is over; it doesn't know how tokens are produced. `take` is the only way to add
tokens, so that an end-of-text token, a stop string or a limit inside of a draft is one case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from longspec.cache.stage import Cache
from longspec.calls.call import Call, CallPart
from longspec.calls.reader import Reader
from longspec.constraints.matcher import Constraint
from longspec.constraints.thinking_budget import Guide
from longspec.errors import ModelError, UsageError
from longspec.sampling.processors import Processor, changed, penalised
from longspec.sampling.sampler import Sampling, noise_key, rank
from longspec.text.detokenizer import Transcript
from longspec.text.reasoning import Section
from longspec.text.repetition import Loops
from longspec.types import Commit, FinishReason, Stats, TokenLogprob, Verdict

__all__ = ["Session"]


class Session:
    """A prompt and the answer so far.

    key: key of its sampling noise: the same seed and key give the same tokens.
    limit: the maximum of prompt and answer together, in tokens.
    constraint: a grammar, a thinking budget, or both.
    section: separates reasoning from answer, for models that mark it.
    reader: finds calls of tools in the answer, where there are tools.
    loops: detects an answer that repeats itself, which ends it.
    drafter: who drafts, where the control isn't to choose.
    processors: change the logits before a token is chosen.
    parse: makes an object of the answer's text, once it ended by itself.
    logprobs: how many likeliest tokens are told beside each token's log-probability; None for neither.
    long: the sequence is planned beyond a longrope model's original context.
    cache_name: the cache's kind at the start; a memory guard may have converted it to a smaller one.
    began: when the request arrived, on `perf_counter`'s clock.
    """

    _gave_up: UsageError | None = None  # why the constraint can't go on

    def __init__(
        self,
        prompt: Sequence[int],
        cache: Cache,
        transcript: Transcript,
        *,
        key: str,
        sampling: Sampling,
        end_tokens: Sequence[int],
        constraint: Constraint | Guide | None = None,
        section: Section | None = None,
        reader: Reader | None = None,
        loops: Loops | None = None,
        drafter: str | None = None,
        processors: Sequence[Processor] = (),
        logprobs: int | None = None,
        parse: Callable[[str], Any] | None = None,
        limit: int,
        long: bool = False,
        cache_name: str = "dense",
        began: float | None = None,
    ) -> None:
        self.key = key
        self.tokens = list(prompt)
        self.seen = set(prompt)  # distinct tokens of the sequence, those that a stop string removed included
        self.prompt_length = len(prompt)
        self.cached = cache.length  # prompt rows that needed no prefill
        self.cache = cache
        self.cache_name = cache_name
        self.sampling = sampling
        self.limit = limit
        self.long = long
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # the error that ended the sequence, in place of a finish reason
        self.stats = Stats()
        self.bets: Counter[str] = Counter()  # steps by drafter, or by `none: ` and the reason
        self.drafting = self.verifying = 0.0  # seconds of drafting and of passes; a shared step counts in full for each
        self.meant = 0  # tokens that were accepted for their meaning, which the target would have written otherwise
        self.notes: list[str] = []  # messages for the user
        self.prompt_cache: Path | None = None  # where to save the prompt's rows after prefill
        self.began = perf_counter() if began is None else began
        self.prefilled: float | None = None  # when prefill ended, on perf_counter's clock
        self.first_token: float | None = None  # when the first token was committed
        self.last_token: float | None = None
        self.constraint = constraint
        self.section = section
        self.reasoning: str | None = None  # the reasoning part of `text`; None without one
        self.said = ""  # the answer part of `text`; all of it without a reasoning section and calls
        self.calls: list[Call] = []
        self.drafter, self._reader = drafter, reader
        # faults: of rows of the pass that `take` is told of, as -2, -3 and so on
        self.processors, self.faults = tuple(processors), list[Exception]()
        self.logprobs = logprobs
        self._parse = parse
        self.told: list[TokenLogprob] = []  # for each token of the answer, if asked for
        self._written = Counter[int]()  # how often the answer has each token
        self._loops = loops
        self._transcript = transcript
        self.end_tokens = frozenset(end_tokens)

    @contextmanager
    def keeping_error(self) -> Iterator[None]:
        """Store an exception raised within as this session's `error`: the other sessions keep their commits."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  the scheduler reports it
            self.error = error

    @property
    def answer(self) -> list[int]:
        """The answer's tokens, its end-of-text token included."""
        return self.tokens[self.prompt_length :]

    @property
    def unfed(self) -> list[int]:
        """The tokens that the cache lacks: at least the last one, since prefill leaves it to the first step."""
        return self.tokens[self.cache.length :]

    @property
    def begins(self) -> Sequence[int]:
        """For each token of the answer but its end of text, the offset in `text` at which it begins."""
        return self._transcript.begins

    @property
    def room(self) -> int:
        """The number of tokens that the answer may still get."""
        return self.limit - len(self.tokens)

    def noise_keys(self, depths: Sequence[int]) -> list[int]:
        """Noise keys of the tokens chosen after `depth` draft tokens, for each depth."""
        return [noise_key(self.sampling.seed, self.key, len(self.tokens) + depth) for depth in depths]

    @property
    def parsed(self) -> Any:
        """The answer as an object; None before its end, where it was cut, or without a class for it."""
        return self._parse(self.said) if self._parse is not None and self.finish_reason == "stop" else None

    @property
    def is_plain(self) -> bool:
        """Whether decoding is a plain argmax, independent of the tokens before."""
        return (
            self.constraint is None and self.sampling.is_greedy and not self.sampling.penalises and not self.processes
        )

    @property
    def processes(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.processors) or self.sampling.counts

    def processed(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> tuple[Tensor, dict[int, Exception]]:
        """Logits [r, V] after the penalties and the processors, by each row's guessed tokens behind the answer; and
        the errors of rows in which no token can be chosen.
        """
        faults: dict[int, Exception] = {}
        if self.sampling.counts:
            counts = [self._written + Counter(path) for path in paths]
            logits = penalised(logits, counts, self.sampling.frequency_penalty, self.sampling.presence_penalty)
        if self.processors:
            before = self.answer
            answers = [[*before, *path] for path in paths]
            for process in self.processors:
                logits, wrong = changed(process, logits, answers)
                faults = {**wrong, **faults}
        return logits, faults

    def rank(
        self, logits: Tensor, paths: Sequence[Sequence[int]], count: int, vocabulary: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `longspec.types.Writing.rank` says."""
        if self.processes and vocabulary is None:  # of a part of the vocabulary, a guess without them is good enough
            logits, _ = self.processed(logits, paths)
        if self.constraint is not None:
            logits = self.constraint.mask(logits, paths, vocabulary)
        keys = [] if self.sampling.is_greedy else self.noise_keys([len(path) for path in paths])
        contexts = [self.seen.union(path) for path in paths] if self.sampling.penalises else None
        return rank(logits, self.sampling, keys, contexts, count, vocabulary)

    def take(self, verdict: Verdict, draft: Sequence[int]) -> Commit:
        """Append the kept tokens and the bonus, up to the end of the answer.

        Raises:
            ModelError: the model chose no token, as its logits aren't numbers.
            UsageError: a processor left none to choose, or the grammar stops here and doesn't accept the answer.
            Exception: a processor's own, with a note of where it was.
        """
        self._raise_given_up()
        tokens = [*(draft[i] for i in verdict.kept), verdict.bonus]
        before, shown = len(self.tokens), ""
        for token in tokens:
            if self._has_given_up():
                break
            if token < 0:  # the text doesn't end before it
                raise self._fault(token)
            self.tokens.append(token)
            self.seen.add(token)
            self._written[token] += 1
            if token in self.end_tokens:
                self.finish_reason = "stop" if self._is_held_to_its_end(token) else None
                break
            shown += self._transcript.push(token)
            if self.section is not None:
                self.section.take(token, self._transcript.begins[-1])
            if self._transcript.stopped:
                self.finish_reason = "stop"
                del self.tokens[self.prompt_length + self._transcript.kept :]
                break
            if self._is_held_to_its_end(token):
                self.finish_reason = "stop"
                break
            if self._has_given_up():
                break
            if self._loops is not None and self._loops.take(token):
                self.finish_reason = "loop"
                self.notes.append("the text only repeated itself, so it was ended (--stop-loops)")
                break
            if self.room == 0:
                self.finish_reason = "length"
                break
        shown += self._close() if self.finish_reason else ""
        thought, said, calls = self._show(shown)
        self.last_token = perf_counter()
        self.first_token = self.first_token or self.last_token
        added = tuple(self.tokens[before:])
        told = verdict.logprobs[: len(added)]
        self.told += told
        del self.told[len(self.answer) :]  # a stop string may take back earlier steps' tokens
        commit = Commit(added, shown, len(draft), len(verdict.kept), self.finish_reason, thought, said, calls, told)
        self.stats += Stats.of(commit)
        self.meant += verdict.meant
        return commit

    def _fault(self, choice: int) -> Exception:
        """Why there is no token, but a negative number."""
        at = f"After {len(self.tokens):,} tokens of prompt and answer"
        if choice < -1:
            error = self.faults[-2 - choice]
            if isinstance(error, UsageError):
                return UsageError(f"{at}: {error}")
            text = f"the text with the key {self.key!r}" if self.key else "the text"
            error.add_note(f"{at} of {text}, in a logits processor.")
            return error
        return ModelError(
            f"{at} the model's logits aren't finite numbers (NaN "
            "or infinity): its weights are damaged, or too large for the dtype; pull it again, or take fp32."
        )

    def _is_held_to_its_end(self, token: int) -> bool:
        """Whether the answer ends with this token as its constraint wants. An error waits for the next step, so that
        the tokens before it are told; where there is no next step, it is raised.
        """
        if self.constraint is None:
            return token in self.end_tokens
        try:
            if token not in self.end_tokens:
                return self.constraint.take(token)
            self.constraint.end()
        except UsageError as error:
            self._gave_up = error
            if self.room == 0:
                raise
            return False
        return True

    def _raise_given_up(self) -> None:
        if self._has_given_up() and self._gave_up is not None:
            raise self._gave_up

    def _has_given_up(self) -> bool:
        """Whether the constraint can't go on from here."""
        if self._gave_up is None and self.constraint is not None:
            self._gave_up = self.constraint.broken
        return self._gave_up is not None

    def interrupt(self, reason: FinishReason = "interrupted") -> Commit:
        """End the sequence here; its commit has the text that was held back."""
        self.finish_reason = reason
        rest = self._close()
        return Commit((), rest, 0, 0, reason, *self._show(rest))

    def _show(self, text: str) -> tuple[str, str, tuple[CallPart, ...]]:
        """Add new text to `reasoning`, `said` and `calls`, and return the new part of each."""
        self.text += text
        thought, said = "", text
        if self.section is not None:
            thought, said = self.section.parts(self.text, over=self.finish_reason is not None)
            if self.section.is_there:
                self.reasoning = (self.reasoning or "") + thought
        parts: tuple[CallPart, ...] = ()
        if self._reader is not None:
            said, parts = self._reader.take(said, over=self.finish_reason is not None)
        for part in parts:
            if part.index == len(self.calls):
                self.calls.append(Call(part.name, ""))
            call = self.calls[part.index]
            self.calls[part.index] = Call(call.name, call.arguments + part.arguments)
        self.said += said
        return thought, said, parts

    def _close(self) -> str:
        return "" if self._transcript.stopped else self._transcript.close()
