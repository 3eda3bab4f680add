"""The engine: a model, its drafters and its KV caches; runs steps for one or many sessions.

    prompt -> tokens -> chunked prefill -> KV cache                   once
    propose -> Draft -> forward pass -> Verdict -> commit -> observe  each step

It never prints: progress goes to a callback, text to the iterator's caller.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Unpack

import torch

from longspec.cache import CACHES, LOSSLESS
from longspec.control import latency
from longspec.control import make as make_control
from longspec.control.policy import Control
from longspec.drafters import DRAFT_TOKENS
from longspec.drafters.auto import auto, heads_for
from longspec.drafters.spec import parse
from longspec.engine.answer import Answer, memory, speculation, timing, usage
from longspec.engine.memory_guard import Watch
from longspec.engine.opening import Prepared, prepare
from longspec.engine.options import Options, check, check_options, drafter_options, kind
from longspec.engine.passes import Passes, one_at_a_time
from longspec.engine.prefix_cache import keep, resume, take_over
from longspec.engine.scheduler import WIDTH, Schedule
from longspec.engine.session import Session
from longspec.engine.speculator import Speculator
from longspec.errors import LongspecError, UsageError
from longspec.memory.plan import CHUNKS, Plan, make_plan
from longspec.model.load import Model, open_model
from longspec.text.prompt import Prompt
from longspec.text.tokenizer import Vocabulary
from longspec.types import Commit, Drafter

__all__ = ["Engine", "costs_path"]


class Engine(Passes):
    """A loaded model and its drafters.

    engine = Engine.load("smollm2")
    print(engine.generate("Why is the sky blue?").text)

    Every method may be called from any thread, and several threads may generate with one engine: each gets the tokens
    that it would get alone. They take turns, one forward pass at a time (the model's lock is held during a step, not
    while a caller handles an iterator's value), so threads don't make it faster; `generate_many` does, as its
    sequences share passes. Engines of one `Model` share its lock; a `Model` that drafts for one engine must not be
    used by another at the same time. A session, an iterator, a schedule or a conversation belongs to one thread at a
    time.
    """

    def __init__(
        self,
        model: Model,
        *,
        drafter: str | Drafter = "auto",
        options: Mapping[str, Any] | None = None,
        control: str | Control = "goodput",
        cache: str = "auto",
        all_rows: bool = False,
        draft_tokens: int = DRAFT_TOKENS,
        costs_file: Path | None = None,
        plan: Plan | None = None,
    ) -> None:
        """drafter: a name (`longspec.drafters.spec`) or a Drafter. options: drafters' options by drafter name. control:
        a name or a Control. costs_file: measured latencies on this machine, read at start, written by `keep_costs`.
        """
        check(drafter, cache, all_rows, draft_tokens, options)
        self.plan = plan
        drafters = _drafters(model, drafter, options or {}, plan)
        self.drafter_name = next(iter(drafters)) if len(drafters) == 1 else str(drafter)
        self.costs_file = costs_file
        if isinstance(control, str):
            learned = latency.read(costs_file) if costs_file and control == "goodput" else None
            control = make_control("fixed" if [*drafters] == ["none"] else control, [*drafters], draft_tokens, learned)
        watch = Watch(plan, moves=cache == "auto", is_read=model.is_read) if plan else None
        rows = plan.choice.prefill_rows if plan else CHUNKS[0]
        super().__init__(model, Speculator(drafters, control, draft_tokens), watch, rows)
        if control.is_new and model.decoder.kernel is not None:
            self.calibrate()
        self.cache_name = plan.choice.cache if plan else kind("dense" if cache == "auto" else cache, all_rows)
        self.load_seconds: dict[str, float] = {}

    @classmethod
    def load(
        cls,
        model: str = "smollm2",
        *,
        drafter: str | Drafter = "auto",
        cache: str = "auto",
        all_rows: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        strict: bool = False,
        num_speculative_tokens: int = DRAFT_TOKENS,
        draft_model: str | None = None,
        skip_set: str | Path | None = None,
        draft_from: Sequence[str | Path] = (),
        remember: bool = False,
        control: str | Control = "goodput",
        memory: str | int | None = None,
        tokens: int | Callable[[Vocabulary], int | None] | None = None,
        texts: int = 1,
        report: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load a model by short name, path or Hugging Face id.

        all_rows: an offload or disk cache attends to every row exactly. strict: batch-invariant operators. draft_model:
        the draft model of the drafter `model`, named like a model. skip_set: the layers that `skip` leaves out, a file
        of `longspec tune`; used where a drafter skips layers. draft_from: text files that the answer may repeat.
        remember: draft from earlier answers too, and store the new ones. control: the draft-length policy, one of
        CONTROLS. memory: the process's limit, such as "6GiB" (on a GPU: torch's reserved memory), or "auto" for the
        machine's free memory; the cache and the prefill chunk are chosen to fit. tokens: prompt and answer that memory
        is planned for, as a number or a function of the vocabulary; the model's context if left out. texts: sequences
        decoded side by side. report: a callback for downloads: stage, bytes done, total.

        Raises:
            ModelError: the model can't be found, read, or isn't supported.
            UsageError: an option is unknown or out of range.
            BudgetError: the memory doesn't hold such a sequence, with any cache that may be chosen.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; it must be 1 or more.")
        # Report invalid options before loading a model.
        options = drafter_options(draft_model, skip_set, draft_from, remember)
        check(drafter, cache, all_rows, num_speculative_tokens, options)
        began = perf_counter()
        opened, plan = open_model(model, dtype=dtype, device=device, report=report), None
        opened.set_threads(threads)
        if memory is not None:
            plan = make_plan(
                opened,
                memory,
                tokens=tokens(opened.vocabulary) if callable(tokens) else tokens,
                cache=kind(cache, all_rows),
                draft_tokens=num_speculative_tokens,
                drafter=drafter,
                options=options,
                strict=strict,
                texts=texts,
            )
        loaded = opened.load(strict=strict, report=report)
        if draft_model is not None:
            smaller = open_model(draft_model, dtype=loaded.dtype, device=device, report=report)
            options["draft"] = smaller.load(strict=strict)
        engine = cls(
            loaded,
            drafter=drafter,
            options=options,
            control=control,
            cache=cache,
            all_rows=all_rows,
            draft_tokens=num_speculative_tokens,
            costs_file=costs_path(loaded),
            plan=plan,
        )
        engine.load_seconds = {"load_s": perf_counter() - began, **loaded.seconds}
        return engine

    @property
    def context(self) -> int:
        """The maximum of prompt and answer together, in tokens."""
        return self.model.decoder.config.context

    @one_at_a_time
    def keep_costs(self) -> None:
        """Write the measured latencies, so that the next process drafts well from its first step."""
        if self.costs_file is not None and (report := self.speculator.control.report()):
            latency.write(self.costs_file, report)

    @one_at_a_time
    def save(self, session: Session, path: str | Path) -> None:
        """Save the session's cached rows to a file, for prompts with the same prefix (the option `prompt_cache`).

        Raises:
            LongspecError: it can't be written.
        """
        keep(session, self.model, Path(path))

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Generate one answer."""
        session = self.open(prompt, **options)
        for _ in self.write(session):
            pass
        return self.answer(session)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str]:
        """Generate one answer, yielding its text as it becomes final."""
        check_options(options)  # raise at the call, not at the first piece
        return self._stream(prompt, options)

    def _stream(self, prompt: Prompt, options: Options) -> Iterator[str]:
        for commit in self.write(self.open(prompt, **options)):
            if commit.text:
                yield commit.text

    def generate_many(
        self, prompts: Iterable[Prompt | tuple[Prompt, Options]], *, width: int = WIDTH, **options: Unpack[Options]
    ) -> Iterator[tuple[int, Answer | LongspecError]]:
        """Generate many answers, `width` at a time: yields each prompt's index and answer, in the order in which they
        finish.

        A prompt may bring its own options. A prompt that fails yields its error in the answer's place, of any kind
        (`longspec.errors.reported`), and the others go on. Prompts are taken from the iterable as needed; a
        sequence's sampling noise is keyed by its index, unless it has a `key`.
        """
        check_options(options)
        return self._generate_many(prompts, width, options)

    def _generate_many(
        self, prompts: Iterable[Prompt | tuple[Prompt, Options]], width: int, options: Options
    ) -> Iterator[tuple[int, Answer | LongspecError]]:
        schedule, numbers, coming = Schedule(self, width), dict[Session, int](), enumerate(prompts)
        while True:
            for number, prompt in islice(coming, schedule.wants):
                text, own = prompt if isinstance(prompt, tuple) else (prompt, Options())
                opened = schedule.begin(text, {"key": str(number), **options, **own})
                if isinstance(opened, LongspecError):
                    yield number, opened
                else:
                    numbers[opened] = number
            if not schedule:
                return
            for session, event in schedule.step():
                if isinstance(event, LongspecError):
                    yield numbers.pop(session), event
                elif event.finish_reason is not None:
                    yield numbers.pop(session), self.answer(session)

    def open(self, prompt: Prompt, **options: Unpack[Options]) -> Session:
        """Open a session for this prompt; nothing is computed yet.

        Raises:
            ContextError: the prompt, or prompt and `max_new_tokens`, is longer than the model's context.
            UsageError: an option is out of range, the prompt has no token, or one that the model has no embedding
            for.
            TypeError: an option has no such name.
        """
        return self.begin(self.prepare(prompt, **options))

    def prepare(self, prompt: Prompt, **options: Unpack[Options]) -> Prepared:
        """The first half of `open`: read the prompt and compile its grammar, beside another thread's passes."""
        return prepare(self.model, prompt, options, self.plan.request.tokens if self.plan else None)

    @one_at_a_time
    def begin(self, prepared: Prepared) -> Session:
        """The second half of `open`, once for each `prepared`: a session with a cache."""
        tokens, options, decoder = prepared.tokens, prepared.options, self.model.decoder
        long = decoder.first_context is not None and prepared.limit > decoder.first_context
        cache, path = CACHES[self.cache_name](decoder.shape), options.get("prompt_cache")
        if (after := options.get("after")) is not None:
            cache = take_over(after, cache, tokens, long=long)
        if path is not None and not cache.length:
            resume(cache, self.cache_name, self.model, Path(path), tokens, limit=prepared.limit, long=long)
        session = Session(
            tokens,
            cache,
            prepared.transcript,
            key=options.get("key", ""),
            sampling=prepared.sampling,
            end_tokens=prepared.end_tokens,
            limit=prepared.limit,
            drafter=self.speculator.named(options.get("drafter")),
            long=long,
            cache_name=after.cache_name if after is not None and cache.length else self.cache_name,
            began=prepared.began,
            **prepared.guidance,
        )
        if path is not None and session.unfed[1:]:
            session.prompt_cache = Path(path)
        self.speculator.begin(session)
        return session

    def write(self, session: Session, progress: Callable[[int, int], None] | None = None) -> Iterator[Commit]:
        """Prefill, then step until the answer ends. progress: a callback for the prompt's tokens, done and in total."""
        for done in self.prefill(session):
            if progress is not None:
                progress(done, session.prompt_length - 1)
        while session.finish_reason is None:
            yield from self.step([session])

    @one_at_a_time
    def answer(self, session: Session, began: float | None = None) -> Answer:
        """The session's answer so far, with its figures. began: when the wait for the first token began, on
        `perf_counter`'s clock; if left out, when the session was opened.
        """
        return Answer(
            text=session.said,
            reasoning=session.reasoning,
            tokens=tuple(session.answer),
            finish_reason=session.finish_reason or "interrupted",
            model=self.model.name,
            dtype=self.model.dtype,
            exactness="exact" if self.model.decoder.is_exact else "rounding",
            cache=session.cache_name,
            cache_lossless=session.cache_name in LOSSLESS,
            usage=usage(session),
            speculation=speculation(session, self.drafter_name),
            timing={**self.load_seconds, **timing(session, began)},
            memory=memory(session, self.model.decoder, self.speculator.nbytes, self.plan),
            calls=tuple(session.calls),
        )


def _drafters(
    model: Model, drafter: str | Drafter, options: Mapping[str, Any], plan: Plan | None
) -> dict[str, Drafter]:
    """The drafters by name, in the order in which the control tries them."""
    if isinstance(drafter, Drafter):
        return {type(drafter).__name__.lower(): drafter}
    if drafter != "auto":
        spec = parse(drafter, options)
        return {spec.name: spec.make(model)}
    heads = heads_for(model)
    if plan is not None:
        tokens, spare = plan.request.tokens * plan.request.texts, plan.budget - plan.choice.need.total
        heads = heads_for(model, tokens, spare)
    return {spec.name: spec.make(model) for spec in auto(options, nbytes=model.decoder.nbytes, heads=heads)}


def costs_path(model: Model) -> Path:
    """The file for this model's latencies on this machine."""
    decoder = model.decoder
    return latency.costs_file(
        machine=f"{platform.node()} {platform.machine()}",
        config=repr(decoder.config),
        dtype=model.dtype,
        device=str(decoder.device),
        strict=str(decoder.strict),
        threads=str(torch.get_num_threads()),
    )
