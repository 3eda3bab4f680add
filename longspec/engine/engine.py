"""The engine: a model, its drafters and its KV caches; runs steps for one or many sessions.

    prompt -> tokens -> chunked prefill -> KV cache                   once
    propose -> Draft -> forward pass -> Verdict -> commit -> observe  each step

It never prints: progress goes to a callback, text to the iterator's caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Unpack

import torch

from longspec.cache import CACHES, LOSSLESS, Cache
from longspec.control import latency
from longspec.control import make as make_control
from longspec.control.policy import Control
from longspec.drafters import DRAFT_TOKENS
from longspec.drafters.chosen import FREE, chosen
from longspec.drafters.draft_model import check_vocabulary
from longspec.drafters.heads.mtp import Multitoken
from longspec.drafters.spec import parse
from longspec.engine.answer import Answer, memory, speculation, timing, usage
from longspec.engine.memory_guard import Watch
from longspec.engine.opening import Prepared, prepare
from longspec.engine.options import Options, check, drafter_options, kind
from longspec.engine.passes import one_at_a_time
from longspec.engine.prompt_cache import keep, resume, take_over
from longspec.engine.scoring import Score, scores
from longspec.engine.session import Session
from longspec.engine.speculator import Speculator
from longspec.engine.writer import Writer
from longspec.heads.published.mtp import check_head
from longspec.machine.declared import declared
from longspec.machine.schema import whole
from longspec.memory.plan import CHUNKS, STREAMED_DRAFT_TOKENS, Plan, check_weights, make_plan, on_disk
from longspec.model.files.store import Report
from longspec.model.load import Model, Opened, choose_device, open_model
from longspec.semantic.accept import EXACT, REMARK, accepting, check_text
from longspec.semantic.probe import Judge, load_probe
from longspec.text.prompt import Prompt
from longspec.text.tokenizer import Vocabulary
from longspec.types import Drafter

__all__ = ["Engine", "costs_path"]


class Engine(Writer):
    """A loaded model and its drafters.

    engine = Engine.load("smollm2")
    print(engine.generate("Why is the sky blue?").text)

    Every method may be called from any thread: what several threads generate with one engine shares forward passes, as
    in `generate_many`, and each gets the tokens that it would get alone. Engines of one `Model` take turns at its lock;
    a `Model` that drafts for one engine must not be used by another at the same time. A session, an iterator, a
    schedule or a conversation belongs to one thread at a time. `with` closes the engine at its end.
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
        draft_tokens: int | None = None,
        costs_file: Path | None = None,
        plan: Plan | None = None,
        judge: Judge | None = None,
    ) -> None:
        """drafter: a name (`longspec.drafters.spec`) or a Drafter. options: drafters' options by drafter name. control:
        a name or a Control. draft_tokens: 15 if left out, or 48 with weights on disk. costs_file: measured latencies,
        which `keep_costs` writes. judge: accepts drafts by their meaning, lossily; goodput, which cuts them, is fixed.
        """
        check(drafter, cache, all_rows, draft_tokens, options)
        draft_tokens = draft_tokens or (DRAFT_TOKENS if model.decoder.ring is None else STREAMED_DRAFT_TOKENS)
        if plan is not None and plan.choice.draft_tokens:
            draft_tokens = min(draft_tokens, plan.choice.draft_tokens)
        self.plan = plan
        drafters, remark = chosen(model, drafter, options or {}, FREE if plan is None else plan.limits)
        self._remark = remark if judge is None else REMARK
        self.drafter_name = next(iter(drafters)) if len(drafters) == 1 else str(drafter)
        self.costs_file = costs_file
        if isinstance(control, str):
            learned = _learned(control, model, costs_file)
            idle = [*drafters] == ["none"] or (judge is not None and control == "goodput")
            control = make_control("fixed" if idle else control, [*drafters], draft_tokens, learned)
        watch = Watch(plan, moves=cache == "auto", is_read=model.is_read) if plan else None
        rows = plan.choice.prefill_rows if plan else CHUNKS[0]
        if plan is not None and plan.choice.how.texts < plan.request.texts:
            self.most_texts = plan.choice.how.texts
        super().__init__(model, Speculator(drafters, control, draft_tokens), watch, rows, judge)
        if control.is_new and model.decoder.kernel is not None:
            self.calibrate()
        self.cache_name = plan.choice.cache if plan else kind("dense" if cache == "auto" else cache, all_rows)
        self.load_seconds: dict[str, float] = {}

    @classmethod
    @declared(threads=whole(1, 1 << 16), texts=whole(1, 1 << 16))
    def load(
        cls,
        model: str | Path | torch.nn.Module = "smollm2",
        *,
        tokenizer: Any = None,
        drafter: str | Drafter = "auto",
        cache: str = "auto",
        all_rows: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        strict: bool = False,
        num_speculative_tokens: int | None = None,
        accept: str = EXACT,
        draft_model: str | None = None,
        skip_set: str | Path | None = None,
        draft_from: Sequence[str | Path] = (),
        remember: bool = False,
        control: str | Control = "goodput",
        memory: str | int | None = None,
        weights: str = "auto",
        tokens: int | Callable[[Vocabulary], int | None] | None = None,
        texts: int = 1,
        report: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load a model by short name, path or Hugging Face id, or transformers' model object with its `tokenizer`.

        all_rows: an offload or disk cache attends to every row exactly. strict: batch-invariant operators. draft_model:
        the draft model of the drafter `model`, named like a model. skip_set: the layers that `skip` leaves out, a file
        of `longspec tune`; used where a drafter skips layers. draft_from: text files that the answer may repeat.
        remember: draft from earlier answers too, and store the new ones. control: the draft-length policy, one of
        CONTROLS. accept: exact, or semantic:FOLDER, by a probe of drafted steps, which is lossy. memory: the process's
        limit, such as "6GiB" (on a GPU: torch's reserved memory), or "auto" for what is free; cache and prefill chunk
        fit it. weights: where the layers are: memory, disk (but for those that `memory` has room for), or auto, which
        is disk where nothing else fits. tokens: prompt and answer to plan for, as a number or by the vocabulary; the
        context if left out. texts: sequences side by side. report: a callback of downloads: stage, done, total.

        Raises:
            ModelError: the model can't be found, read, or isn't supported.
            UsageError: an option is unknown or out of range.
            BudgetError: the memory doesn't hold such a sequence, with any cache that may be chosen.
        """
        options = drafter_options(draft_model, skip_set, draft_from, remember)  # wrong ones are told first
        drafting, probe = accepting(accept, drafter, options, num_speculative_tokens, strict=strict)
        check(**drafting, cache=cache, all_rows=all_rows)
        check_weights(weights, choose_device(device))
        began, name = perf_counter(), str(model) if isinstance(model, Path) else model
        opened = open_model(name, tokenizer=tokenizer, dtype=dtype, device=device, report=report)
        opened.set_threads(threads)
        smaller = _draft_model(draft_model, drafting, opened, device, report)
        run = {"cache": kind(cache, all_rows), "strict": strict, "texts": texts, "weights": weights, **drafting}
        plan = None if memory is None else make_plan(opened, memory, tokens=tokens, **run)
        loaded = opened.load(strict=strict, report=report, **on_disk(weights, plan))
        if smaller is not None and (plan is None or plan.limits.holds("model")):
            drafting["options"]["draft"] = smaller.load(strict=strict)
        judge = None if probe is None else load_probe(probe, loaded, drafting["options"]["draft"])
        drafting |= {"control": control, "cache": cache, "all_rows": all_rows, "judge": judge}
        engine = cls(loaded, costs_file=costs_path(loaded), plan=plan, **drafting)
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

    def empty_cache(self) -> Cache:
        """A cache of the kind that texts of this engine begin with."""
        return CACHES[self.cache_name](self.model.decoder.shape)

    def prepare(self, prompt: Prompt, **options: Unpack[Options]) -> Prepared:
        """The first half of `open`: read the prompt and compile its grammar, beside another thread's passes."""
        self.check_open()
        if self.judge is not None:
            check_text(options)
        return prepare(self.model, prompt, options, self.plan.request.tokens if self.plan else None)

    @one_at_a_time
    def begin(self, prepared: Prepared) -> Session:
        """The second half of `open`, once for each `prepared`: a session with a cache."""
        tokens, options, decoder = prepared.tokens, prepared.options, self.model.decoder
        long = decoder.first_context is not None and prepared.limit > decoder.first_context
        cache, path = self.empty_cache(), options.get("prompt_cache")
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
        if self._remark is not None:
            session.notes.append(self._remark)
            self._remark = None
        return session

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
            exactness="lossy" if self.judge else "exact" if self.model.decoder.is_exact else "rounding",
            cache=session.cache_name,
            cache_lossless=session.cache_name in LOSSLESS,
            usage=usage(session),
            speculation=speculation(session, self.drafter_name, lossy=self.judge is not None),
            timing={**self.load_seconds, **timing(session, began)},
            memory=memory(session, self.model.decoder, self.speculator.nbytes, self.plan, self.pruned_rows),
            calls=tuple(session.calls),
            logprobs=None if session.logprobs is None else tuple(session.told),
            parsed=session.parsed,
        )

    @declared()
    @one_at_a_time
    def score(self, texts: Sequence[str], prompt: Prompt | None = None) -> list[Score]:
        """The log-probability of every token of each text, after the prompt (rendered as by `generate`), or from the
        text's own beginning, whose first token has none.

        Raises:
            UsageError: a text has no token, or no second one without a prompt.
            ContextError: it is longer than the model's context.
        """
        return scores(self, texts, prompt)

    def __repr__(self) -> str:
        if self.is_closed:
            return "<Engine, closed>"
        model = self.model
        return f"<Engine {model.name}: {model.dtype} on {model.decoder.device}, drafter {self.drafter_name}>"


def _draft_model(
    name: str | None, drafting: Mapping[str, Any], target: Opened, device: str, report: Report | None
) -> Opened | None:
    """The draft model, opened, if there is one. What can't draft for the target is refused before weights are read: a
    model that doesn't fit it, or a head that its files lack.
    """
    drafter = drafting["drafter"]
    if isinstance(drafter, str) and drafter != "auto" and Multitoken in parse(drafter, drafting["options"]).kinds:
        check_head(target.checkpoint, target.config)
    if name is None:
        return None
    opened = open_model(name, dtype=target.dtype, device=device, report=report)
    names = (target.checkpoint.name, target.vocabulary), (opened.checkpoint.name, opened.vocabulary)
    check_vocabulary(*names, opened.config.vocabulary)
    return opened


def _learned(control: str, model: Model, costs_file: Path | None) -> Mapping[str, Any] | None:
    """What is known of the model before its first text: latencies of an earlier run, or the limits that were tuned."""
    if control == "goodput" and costs_file is not None:
        return latency.read(costs_file)
    if control == "entropy" and model.fit is not None and model.fit.entropy is not None:
        return {"entropy": model.fit.entropy}
    return None


def costs_path(model: Model) -> Path:
    """The file for this model's latencies on this machine."""
    decoder, ring, threads = model.decoder, model.decoder.ring, torch.get_num_threads()
    streamed = None if ring is None else ring.streamed
    return latency.costs_file(
        decoder.config, model.dtype, decoder.device, threads, strict=decoder.strict, streamed=streamed
    )
