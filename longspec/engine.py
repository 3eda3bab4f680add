"""The engine: a model, its drafter and its caches; runs steps for one or many sessions.

    prompt -> tokens -> chunked prefill -> cache                                      once
    propose -> Draft -> target forward over all rows -> choices -> verify -> commit   each step

It never prints and never draws: progress goes to a callback, text to whoever iterates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from longspec.answer import Answer, memory, speculation, timing, usage
from longspec.budget import CHUNKS, Plan, make_plan
from longspec.cache import BLOCK, CACHES, LOSSLESS
from longspec.control import Bet, Outcome, Step
from longspec.controls import make as make_control
from longspec.drafters import Means
from longspec.drafters import check as check_drafter
from longspec.drafters import make as make_drafter
from longspec.drafters.skip import load_skip
from longspec.errors import BudgetError, ContextError, LongspecError, UsageError
from longspec.feed import Feed, choosing, entropies_of, run
from longspec.model.decoder import Skip
from longspec.model.load import Model, open_model
from longspec.resume import keep, resume
from longspec.sampling import Sampling, choose
from longspec.session import Session
from longspec.text import Prompt, Transcript, Vocabulary, encode
from longspec.types import Commit, Draft, Drafter, Reading
from longspec.verify import verify
from longspec.watch import Watch

__all__ = ["DRAFT_TOKENS", "Engine", "Options"]

PREFILL_ROWS = CHUNKS[0]
"""Rows of a prefill chunk, cut at blocks: a CPU is then bound by arithmetic (bf16: 0.11 ms a row, 2.1 at 8 rows)."""

DRAFT_TOKENS = 8
"""Tokens drafted at most, if nobody says otherwise: nine rows cost a bf16 pass what one costs (16.9 and 16.4 ms)."""


class Options(TypedDict, total=False):
    """How one text is written. Sampling left open comes from the checkpoint's generation config, else it is greedy."""

    prompt_cache: str | Path | None  # a file that keeps the prompt's rows: read if it is there, written after prefill
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
        draft_model: Model | None = None,
        skip: Skip | None = None,
        control: str = "goodput",
        plan: Plan | None = None,
    ) -> None:
        _check(drafter, cache, all_rows, draft_tokens, draft_model=draft_model is not None)
        self.model = model
        self.drafter_name = _drafter(drafter, draft_model=draft_model is not None)
        means = Means(model, draft_model, skip)
        self.drafters: dict[str, Drafter] = {self.drafter_name: make_drafter(self.drafter_name, means)}
        self.control = make_control(control, self.drafter_name, draft_tokens)
        self.plan = plan
        self.cache_name = plan.choice.cache if plan else _kind("dense" if cache == "auto" else cache, all_rows)
        self.prefill_rows = plan.choice.prefill_rows if plan else PREFILL_ROWS
        self.watch = Watch(plan, moves=cache == "auto") if plan else None
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
        draft_model: str | None = None,
        skip_set: str | Path | None = None,
        control: str = "goodput",
        memory: str | int | None = None,
        tokens: int | Callable[[Vocabulary], int | None] | None = None,
        report: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load a model by short name, path or Hugging Face id.

        all_rows: an offload or disk cache reads every row exactly. strict: a row's bits never depend on the rows beside
        it (slower). draft_model: what the drafter `model` drafts with, named like a model. skip_set: what `skip` leaves
        out, a file of `longspec tune`. control: how much is bet, one of CONTROLS. memory: what the process may have,
        such as "6GiB" (on a GPU: what torch may reserve there), or "auto" for what the machine has left; the
        cache and the prefill chunk are chosen to fit. tokens: prompt and answer that the memory is planned for, as a
        number or told from the vocabulary; the model's context if left out. report: told of what is fetched: stage,
        done, total.

        Raises:
            ModelError: the model can't be found, read, or isn't supported.
            UsageError: an option is unknown or out of range.
            BudgetError: the memory doesn't hold such a text, with any cache that may be chosen.
        """
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads is {threads}; it must be 1 or more.")
            torch.set_num_threads(threads)
        # What is wrong is said before a model is loaded.
        _check(drafter, cache, all_rows, num_speculative_tokens, draft_model=draft_model is not None)
        began = perf_counter()
        opened, plan = open_model(model, dtype=dtype, device=device, report=report), None
        if memory is not None:
            plan = make_plan(
                opened,
                memory,
                tokens=tokens(opened.vocabulary) if callable(tokens) else tokens,
                cache=_kind(cache, all_rows),
                draft_tokens=num_speculative_tokens,
                drafter=drafter,
                strict=strict,
            )
        loaded = opened.load(strict=strict, report=report)
        smaller = None
        if draft_model is not None:
            smaller = open_model(draft_model, dtype=loaded.dtype, device=device, report=report).load(strict=strict)
        engine = cls(
            loaded,
            drafter=drafter,
            cache=cache,
            all_rows=all_rows,
            draft_tokens=num_speculative_tokens,
            draft_model=smaller,
            skip=None if skip_set is None else load_skip(skip_set, loaded.decoder.config.layers),
            control=control,
            plan=plan,
        )
        engine.load_seconds = {"load_s": perf_counter() - began, **loaded.seconds}
        return engine

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.decoder.config.context

    def save(self, session: Session, path: str | Path) -> None:
        """Keep the session's rows in a file, for a text that begins like its own (the option `prompt_cache`).

        Raises:
            LongspecError: it can't be written.
        """
        keep(session, self.model, Path(path))

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
        tokens = encode(self.model.vocabulary, prompt, options.get("system"), raw=options.get("raw", False))
        decoder, sampling = self.model.decoder, self._sampling(options)
        limit = self._limit(len(tokens), options.get("max_new_tokens"))
        stop = options.get("stop", ())
        long = decoder.first_context is not None and limit > decoder.first_context
        cache, path = CACHES[self.cache_name](decoder.shape), options.get("prompt_cache")
        if path is not None:
            resume(cache, self.cache_name, self.model, Path(path), tokens, limit=limit, long=long)
        session = Session(
            tokens,
            cache,
            Transcript(self.model.vocabulary, [stop] if isinstance(stop, str) else stop),
            key=options.get("key", ""),
            sampling=sampling,
            end_tokens=self.model.end_tokens,
            limit=limit,
            long=long,
            cache_name=self.cache_name,
            began=began,
        )
        if path is not None and session.unfed[1:]:
            session.prompt_cache = Path(path)
        for drafter in self.drafters.values():
            drafter.begin(session)
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
            end = min((start + self.prefill_rows) // BLOCK * BLOCK, len(session.tokens) - 1)
            with torch.inference_mode():
                feed = Feed.of(session, lacking[: end - start])
                _, hidden = run([feed], self.model.decoder)
                self._read(feed, hidden, feed.commit([]))
                if self.watch is not None:
                    self.watch.after_chunk(session, min(self.prefill_rows, len(session.unfed)))
            yield end
        if session.prompt_cache is not None:
            path, session.prompt_cache = session.prompt_cache, None
            try:
                self.save(session, path)
            except LongspecError as error:  # the answer is what was asked for first
                session.notes.append(str(error))
        session.prefilled = perf_counter()

    @torch.inference_mode()
    def step(self, sessions: Sequence[Session]) -> list[Commit]:
        """Draft, one target forward, verify, commit: what each session got."""
        bets = self.control.bets(sessions, [min(self.draft_tokens, session.room - 1) for session in sessions])
        drafts, draft_seconds = self._drafts(sessions, bets)
        began = perf_counter()
        feeds = [Feed.of(session, session.unfed, draft) for session, draft in zip(sessions, drafts, strict=True)]
        rows, hidden = run(feeds, self.model.decoder)
        logits = self.model.decoder.logits(choosing(hidden, rows, feeds))
        chosen = self._choices(feeds, logits)
        entropies: Sequence[list[float] | None] = [None] * len(feeds)
        if self.control.entropies:
            entropies = entropies_of(feeds, logits)
        pass_seconds = perf_counter() - began
        commits, outcomes = [], []
        per_feed = zip(feeds, rows.spans, bets, drafts, chosen, entropies, strict=True)
        for feed, span, bet, draft, choices, entropy in per_feed:
            session = feed.session
            verdict = verify(feed.draft, feed.parents, choices)
            commits.append(session.take(verdict, feed.draft))
            self._read(feed, hidden[span.at], feed.commit(verdict.kept))
            session.drafting += sum(draft_seconds.values())
            session.verifying += pass_seconds
            for drafter in self.drafters.values():
                drafter.observe(session, commits[-1], verdict)
            last = verdict.kept[-1] + 1 if verdict.kept else 0
            outcomes.append(Outcome(session, bet, draft, verdict.kept, None if entropy is None else entropy[last]))
        self.control.observe(Step(outcomes, draft_seconds, pass_seconds, len(rows.tokens)))
        if self.watch is not None and (ending := self.watch.after_step(sessions)) is not None:
            at = list(sessions).index(ending)
            rest = ending.interrupt("length")
            commits[at] = replace(commits[at], text=commits[at].text + rest, finish_reason="length")
        return commits

    def _drafts(self, sessions: Sequence[Session], bets: Sequence[Bet]) -> tuple[list[Draft], dict[str, float]]:
        """Each session's draft by its bet, and the seconds of every drafter that was asked."""
        drafts, seconds = [Draft.chain(()) for _ in sessions], {}
        for name, drafter in self.drafters.items():
            asked = [i for i, bet in enumerate(bets) if bet.drafter == name and bet.limit > 0]
            if asked:
                began = perf_counter()
                made = drafter.propose([sessions[i] for i in asked], [bets[i].limit for i in asked])
                seconds[name] = perf_counter() - began
                for i, draft in zip(asked, made, strict=True):
                    drafts[i] = draft
        return self.control.trim(bets, drafts), seconds

    def _read(self, feed: Feed, hidden: Tensor, committed: Sequence[int]) -> None:
        """Give what a feed's rows became, hidden [r, width], to drafters that read it."""
        for drafter in self.drafters.values():
            if isinstance(drafter, Reading) and committed:
                drafter.read(feed.session, hidden[list(committed)])

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
            cache=session.cache_name,
            cache_lossless=session.cache_name in LOSSLESS,
            usage=usage(session),
            speculation=speculation(session, self.drafter_name),
            timing={**self.load_seconds, **timing(session, began)},
            memory=memory(session, self.model.decoder.nbytes, self.plan),
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

    def _limit(self, prompt: int, asked: int | None) -> int:
        if prompt >= self.context:
            raise ContextError(
                f"The prompt has {prompt} tokens; the model's context for prompt and answer is {self.context}."
            )
        planned = self.plan.request.tokens if self.plan else self.context
        if prompt >= planned:
            raise BudgetError(f"The prompt has {prompt} tokens; the memory was planned for {planned} with the answer.")
        if asked is None:
            return min(planned, self.context)
        if asked < 1:
            raise UsageError(f"max_new_tokens is {asked}; it must be 1 or more.")
        if prompt + asked > self.context:
            raise ContextError(
                f"The prompt has {prompt} tokens and {asked} new ones were asked for, {prompt + asked} together; "
                f"the model's context is {self.context}."
            )
        if prompt + asked > planned:
            raise BudgetError(
                f"The prompt has {prompt} tokens and {asked} new ones were asked for, {prompt + asked} together; "
                f"the memory was planned for {planned}."
            )
        return prompt + asked

    def _sampling(self, options: Options) -> Sampling:
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}  # type: ignore[literal-required]
        return Sampling.over(self.model.defaults, given)


def _kind(cache: str, all_rows: bool) -> str:
    """The name in CACHES."""
    return f"{cache} --all-rows" if all_rows else cache


def _drafter(name: str, *, draft_model: bool) -> str:
    """The drafter that `auto` stands for."""
    if name != "auto":
        return name
    return "model+ngram" if draft_model else "ngram"


def _check(drafter: str, cache: str, all_rows: bool, draft_tokens: int, *, draft_model: bool) -> None:
    check_drafter(_drafter(drafter, draft_model=draft_model), draft_model=draft_model)
    if cache != "auto" and cache not in (names := [name for name in CACHES if " " not in name]):
        raise UsageError(f"The cache {cache!r} is not known; use auto or one of: {', '.join(names)}.")
    if all_rows and f"{cache} --all-rows" not in CACHES:
        raise UsageError(f"--all-rows is for the caches offload and disk; the cache is {cache}.")
    if not 1 <= draft_tokens <= BLOCK:
        raise UsageError(
            f"num_speculative_tokens is {draft_tokens}; it must be 1 to {BLOCK} (--drafter none bets on nothing)."
        )


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
