"""One text being written, and all that belongs to it: tokens, cache, sampling, and where it ends.

A session knows when its text is over; it doesn't know how tokens come about. `take` is the one way in for tokens, so
that an end-of-text token, a stop string or a limit inside of a draft is one case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from torch import Tensor

from longspec.cache.stage import Cache
from longspec.constraints.matcher import Constraint
from longspec.constraints.thinking_budget import Guide
from longspec.sampling.sampler import Sampling, noise_key, rank
from longspec.text.detokenizer import Transcript
from longspec.text.reasoning import Section
from longspec.text.repetition import Loops
from longspec.types import Commit, FinishReason, Stats, Verdict

__all__ = ["Session"]


class Session:
    """A prompt and the answer so far.

    key: names the session in the noise of its sampling: the same seed and key give the same text.
    limit: the most tokens that prompt and answer may have together.
    constraint: what the answer is held to: a grammar, a budget of its reasoning, or both.
    section: tells the answer's reasoning from its words, where the model knows the two.
    loops: notices an answer that only repeats itself, which ends it.
    long: the text is planned beyond a longrope model's first context.
    cache_name: what kind the cache is; another one from where a memory budget made it smaller.
    began: when the work on it began, on `perf_counter`'s clock.
    """

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
        loops: Loops | None = None,
        limit: int,
        long: bool = False,
        cache_name: str = "dense",
        began: float | None = None,
    ) -> None:
        self.key = key
        self.tokens = list(prompt)
        self.seen = set(prompt)  # distinct tokens of the text; those of a part that a stop string took back stay
        self.prompt_length = len(prompt)
        self.cached = cache.length  # prompt rows that needed no prefill
        self.cache = cache
        self.cache_name = cache_name
        self.sampling = sampling
        self.limit = limit
        self.long = long
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # what ended the text in place of a finish reason
        self.stats = Stats()
        self.bets: Counter[str] = Counter()  # steps by who drafted, or `none: ` and why nobody did
        self.drafting = 0.0  # seconds that the session's steps drafted; a step of several sessions counts for each
        self.verifying = 0.0  # and ran the target
        self.notes: list[str] = []  # what happened to the text on its way, for people
        self.prompt_cache: Path | None = None  # where the prompt's rows go once they are whole
        self.began = perf_counter() if began is None else began
        self.prefilled: float | None = None  # when the prompt was in the cache
        self.first_token: float | None = None  # when the first token was committed
        self.last_token: float | None = None
        self.constraint = constraint
        self.section = section
        self.reasoning: str | None = None  # what of `text` was thought, if anything was
        self.said = ""  # and what was said; without a section, all of it
        self._loops = loops
        self._transcript = transcript
        self._end_tokens = frozenset(end_tokens)

    @contextmanager
    def keeping_error(self) -> Iterator[None]:
        """Keep an exception raised within as this text's `error`: it must not cost the other texts their commits."""
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
        """Tokens that the cache lacks: the last one at least, since prefill leaves it for the first step."""
        return self.tokens[self.cache.length :]

    @property
    def begins(self) -> Sequence[int]:
        """For each token of the answer but its end of text, the offset in `text` at which it begins."""
        return self._transcript.begins

    @property
    def room(self) -> int:
        """How many tokens the answer may still get."""
        return self.limit - len(self.tokens)

    def noise_keys(self, depths: Sequence[int]) -> list[int]:
        """Keys of the noise for tokens that are chosen `depth` draft tokens behind the text."""
        return [noise_key(self.sampling.seed, self.key, len(self.tokens) + depth) for depth in depths]

    @property
    def is_plain(self) -> bool:
        """Whether the greatest logit is written, whatever stands before it."""
        return self.constraint is None and self.sampling.is_greedy and not self.sampling.penalises

    def rank(
        self, logits: Tensor, paths: Sequence[Sequence[int]], count: int, vocabulary: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `longspec.types.Writing.rank` says."""
        if self.constraint is not None:
            logits = self.constraint.mask(logits, paths, vocabulary)
        keys = [] if self.sampling.is_greedy else self.noise_keys([len(path) for path in paths])
        contexts = [self.seen.union(path) for path in paths] if self.sampling.penalises else None
        return rank(logits, self.sampling, keys, contexts, count, vocabulary)

    def take(self, verdict: Verdict, draft: Sequence[int]) -> Commit:
        """Add the kept tokens and the bonus to the text, up to where it ends."""
        tokens = [*(draft[i] for i in verdict.kept), verdict.bonus]
        before, shown = len(self.tokens), ""
        for token in tokens:
            self.tokens.append(token)
            self.seen.add(token)
            if token in self._end_tokens:
                self.finish_reason = "stop"
                break
            shown += self._transcript.push(token)
            if self.section is not None:
                self.section.take(token, self._transcript.begins[-1])
            if self._transcript.stopped:
                self.finish_reason = "stop"
                del self.tokens[self.prompt_length + self._transcript.kept :]
                break
            if self.constraint is not None and self.constraint.take(token):
                self.finish_reason = "stop"
                break
            if self._loops is not None and self._loops.take(token):
                self.finish_reason = "loop"
                self.notes.append("the text only repeated itself, so it was ended (--stop-loops)")
                break
            if self.room == 0:
                self.finish_reason = "length"
                break
        shown += self._close() if self.finish_reason else ""
        thought, said = self._show(shown)
        self.last_token = perf_counter()
        self.first_token = self.first_token or self.last_token
        added = tuple(self.tokens[before:])
        commit = Commit(added, shown, len(draft), len(verdict.kept), self.finish_reason, thought, said)
        self.stats += Stats.of(commit)
        return commit

    def interrupt(self, reason: FinishReason = "interrupted") -> Commit:
        """End the text here: what was held back of it is given."""
        self.finish_reason = reason
        rest = self._close()
        return Commit((), rest, 0, 0, reason, *self._show(rest))

    def _show(self, text: str) -> tuple[str, str]:
        """The text has grown: what of that was thought, and what was said."""
        self.text += text
        thought, said = "", text
        if self.section is not None:
            thought, said = self.section.parts(self.text, over=self.finish_reason is not None)
            if self.section.is_there:
                self.reasoning = (self.reasoning or "") + thought
        self.said += said
        return thought, said

    def _close(self) -> str:
        return "" if self._transcript.stopped else self._transcript.close()
