"""The engine: a model, its drafter and its caches; runs steps for one or many sessions.

    prompt -> tokens -> chunked prefill -> cache                                      once
    propose -> Draft -> target forward over all rows -> choices -> verify -> commit   each step

It never prints and never draws: progress goes to a callback, text to whoever iterates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from longspec.answer import Answer, memory, speculation, timing, usage
from longspec.cache import BLOCK, CACHES, LOSSLESS
from longspec.drafters import make as make_drafter
from longspec.errors import ContextError, UsageError
from longspec.feed import Feed, lay
from longspec.model.decoder import Rows
from longspec.model.load import Model, load_model
from longspec.sampling import Sampling, choose
from longspec.session import Session
from longspec.text import Transcript
from longspec.types import Commit
from longspec.verify import verify

__all__ = ["DRAFT_TOKENS", "Engine", "Options", "Prompt"]

PREFILL_ROWS = 8 * BLOCK
"""Rows of a prefill chunk, cut at blocks: a CPU is then bound by arithmetic (bf16: 0.11 ms a row, 2.1 at 8 rows)."""

DRAFT_TOKENS = 8
"""Tokens drafted at most, if nobody says otherwise: nine rows cost a bf16 pass what one costs (16.9 and 16.4 ms)."""

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: `{"role": ..., "content": ...}`."""


class Options(TypedDict, total=False):
    """How one text is written. Sampling left open comes from the checkpoint's generation config, else it is greedy."""

    system: str | None  # a system message before the prompt
    raw: bool  # the prompt as it is, without the chat template
    key: str  # names the text in the noise of its sampling
    max_new_tokens: int | None  # None: up to the end of text, or of the model's context
    stop: str | Sequence[str]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


class Engine:
    """A loaded model and what it bets with.

    engine = Engine.load("smollm2")
    print(engine.generate("Why is the sky blue?").text)
    """

    def __init__(
        self,
        model: Model,
        *,
        drafter: str = "auto",
        cache: str = "auto",
        all_rows: bool = False,
        draft_tokens: int = DRAFT_TOKENS,
    ) -> None:
        _check(drafter, cache, all_rows, draft_tokens)
        self.model = model
        self.drafter_name = "ngram" if drafter == "auto" else drafter
        self.drafter = make_drafter(self.drafter_name)
        self.cache_name = ("dense" if cache == "auto" else cache) + (" --all-rows" if all_rows else "")
        self.draft_tokens = draft_tokens
        self.load_seconds: dict[str, float] = {}

    @classmethod
    def load(
        cls,
        model: str = "smollm2",
        *,
        drafter: str = "auto",
        cache: str = "auto",
        all_rows: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        strict: bool = False,
        num_speculative_tokens: int = DRAFT_TOKENS,
        report: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load a model by short name, path or Hugging Face id.

        all_rows: an offload or disk cache reads every row exactly. strict: a row's bits never depend on the rows beside
        it (slower). report: told of what is fetched: stage, done, total.

        Raises:
            ModelError: the model can't be found, read, or isn't supported.
            UsageError: an option is unknown or out of range.
        """
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads is {threads}; it must be 1 or more.")
            torch.set_num_threads(threads)
        _check(drafter, cache, all_rows, num_speculative_tokens)  # what is wrong is said before a model is loaded
        began = perf_counter()
        loaded = load_model(model, dtype=dtype, device=device, strict=strict, report=report)
        engine = cls(loaded, drafter=drafter, cache=cache, all_rows=all_rows, draft_tokens=num_speculative_tokens)
        engine.load_seconds = {"load_s": perf_counter() - began, **loaded.seconds}
        return engine

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.decoder.config.context

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Write one answer to its end."""
        session = self.open(prompt, **options)
        for _ in self.write(session):
            pass
        return self.answer(session)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str]:
        """Write one answer, giving its text as it becomes certain."""
        for commit in self.write(self.open(prompt, **options)):
            if commit.text:
                yield commit.text

    def open(self, prompt: Prompt, **options: Unpack[Options]) -> Session:
        """A session for this prompt; nothing is computed yet.

        Raises:
            ContextError: the prompt, or the prompt with the tokens asked for, is longer than the model's context.
            UsageError: an option is out of range, or the prompt has no token.
        """
        began = perf_counter()
        tokens = self._encode(prompt, options.get("system"), raw=options.get("raw", False))
        decoder, sampling = self.model.decoder, self._sampling(options)
        limit = self._limit(len(tokens), options.get("max_new_tokens"))
        stop = options.get("stop", ())
        session = Session(
            tokens,
            CACHES[self.cache_name](decoder.shape),
            Transcript(self.model.vocabulary, [stop] if isinstance(stop, str) else stop),
            key=options.get("key", ""),
            sampling=sampling,
            end_tokens=self.model.end_tokens,
            limit=limit,
            long=decoder.first_context is not None and limit > decoder.first_context,
            began=began,
        )
        self.drafter.begin(session)
        return session

    def write(self, session: Session, progress: Callable[[int, int], None] | None = None) -> Iterator[Commit]:
        """Prefill, then step to the text's end. `progress` is told of prompt rows done and in all."""
        for done in self.prefill(session):
            if progress is not None:
                progress(done, session.prompt_length - 1)
        while session.finish_reason is None:
            yield from self.step([session])

    def prefill(self, session: Session) -> Iterator[int]:
        """Feed all unfed tokens but the last, in chunks that end at blocks; after each, the cache's length."""
        while (lacking := session.unfed)[1:]:
            start = session.cache.length
            end = min((start + PREFILL_ROWS) // BLOCK * BLOCK, len(session.tokens) - 1)
            with torch.inference_mode():
                feed = Feed.of(session, lacking[: end - start])
                self.model.decoder.forward(lay([feed], self.model.decoder.device))
                feed.commit([])
            yield end
        session.prefilled = perf_counter()

    @torch.inference_mode()
    def step(self, sessions: Sequence[Session]) -> list[Commit]:
        """Draft, one target forward, verify, commit: what each session got."""
        limits = [min(self.draft_tokens, session.room - 1) for session in sessions]
        drafts = self.drafter.propose(sessions, limits)
        feeds = [Feed.of(session, session.unfed, draft) for session, draft in zip(sessions, drafts, strict=True)]
        rows = lay(feeds, self.model.decoder.device)
        hidden = self.model.decoder.forward(rows)
        logits = self.model.decoder.logits(_choosing(hidden, rows, feeds))
        commits = []
        for feed, choices in zip(feeds, self._choices(feeds, logits), strict=True):
            verdict = verify(feed.draft, feed.parents, choices)
            commits.append(feed.session.take(verdict, feed.draft))
            feed.commit(verdict.kept)
            self.drafter.observe(feed.session, commits[-1])
        return commits

    def answer(self, session: Session, began: float | None = None) -> Answer:
        """What the session wrote so far, and what it took. began: from when the first token was waited for, on
        perf_counter's clock; else it is from when the session was opened.
        """
        return Answer(
            text=session.text,
            tokens=tuple(session.answer),
            finish_reason=session.finish_reason or "interrupted",
            model=self.model.name,
            dtype=self.model.dtype,
            cache=self.cache_name,
            cache_lossless=self.cache_name in LOSSLESS,
            usage=usage(session),
            speculation=speculation(session, self.drafter_name),
            timing={**self.load_seconds, **timing(session, began)},
            memory=memory(session, self.model.decoder.nbytes),
        )

    def _choices(self, feeds: Sequence[Feed], logits: Tensor) -> list[list[int]]:
        """The target's choice after every choosing row, feed by feed: one copy to the host."""
        chosen, start = [], 0
        for feed in feeds:
            session, end = feed.session, start + feed.choosing
            sampling = session.sampling
            keys = [] if sampling.is_greedy else session.noise_keys(feed.depths)
            contexts = [session.seen.union(path) for path in feed.paths()] if sampling.penalises else None
            chosen.append(choose(logits[start:end], sampling, keys, contexts))
            start = end
        flat, ends = torch.cat(chosen).tolist(), list(accumulate(feed.choosing for feed in feeds))
        return [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _encode(self, prompt: Prompt, system: str | None, *, raw: bool) -> list[int]:
        vocabulary = self.model.vocabulary
        if raw:
            if not isinstance(prompt, str) or system:
                raise UsageError("A raw prompt is one text, without a system message or roles.")
            tokens = vocabulary.encode(prompt, add_special=True)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if system:
                messages = [{"role": "system", "content": system}, *messages]
            tokens = vocabulary.encode(vocabulary.chat(messages), add_special=False)
        if not tokens:
            raise UsageError("The prompt is empty; give at least one token to go on from.")
        return tokens

    def _limit(self, prompt: int, asked: int | None) -> int:
        if prompt >= self.context:
            raise ContextError(
                f"The prompt has {prompt} tokens; the model's context for prompt and answer is {self.context}."
            )
        if asked is None:
            return self.context
        if asked < 1:
            raise UsageError(f"max_new_tokens is {asked}; it must be 1 or more.")
        if prompt + asked > self.context:
            raise ContextError(
                f"The prompt has {prompt} tokens and {asked} new ones were asked for, {prompt + asked} together; "
                f"the model's context is {self.context}."
            )
        return prompt + asked

    def _sampling(self, options: Options) -> Sampling:
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}  # type: ignore[literal-required]
        return Sampling.over(self.model.defaults, given)


def _check(drafter: str, cache: str, all_rows: bool, draft_tokens: int) -> None:
    make_drafter("none" if drafter == "auto" else drafter)
    if cache != "auto" and cache not in (names := [name for name in CACHES if " " not in name]):
        raise UsageError(f"The cache {cache!r} is not known; use auto or one of: {', '.join(names)}.")
    if all_rows and f"{cache} --all-rows" not in CACHES:
        raise UsageError(f"--all-rows is for the caches offload and disk; the cache is {cache}.")
    if not 1 <= draft_tokens <= BLOCK:
        raise UsageError(
            f"num_speculative_tokens is {draft_tokens}; it must be 1 to {BLOCK} (--drafter none bets on nothing)."
        )


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _choosing(hidden: Tensor, rows: Rows, feeds: Sequence[Feed]) -> Tensor:
    """Hidden states of the rows that choose a token, feeds behind each other."""
    if all(len(feed.lacking) == 1 for feed in feeds):
        return hidden
    return torch.cat([hidden[span.at][-feed.choosing :] for span, feed in zip(rows.spans, feeds, strict=True)])
