"""Forward passes for one or many sessions: draft, run the target, verify, commit.

    propose -> Draft -> forward pass -> Verdict -> commit -> observe  each step
    chunk -> forward pass -> commit                                   while a prompt is read

Takes open sessions; knows no options and no prompt. Threads take turns, a pass at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from time import perf_counter
from typing import Any, TypeVar, cast

import torch

from longspec.cache import BLOCK
from longspec.engine.forward import Input, Output, forward
from longspec.engine.memory_guard import Watch
from longspec.engine.prefix_cache import keep
from longspec.engine.session import Session
from longspec.engine.speculator import Speculator
from longspec.errors import LongspecError
from longspec.model.load import Model
from longspec.types import Commit

__all__ = ["Passes", "one_at_a_time"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_at_a_time(method: _Method) -> _Method:
    """The method, run by one thread at a time of all that use the engine's model."""

    @wraps(method)
    def locked(self: Passes, *args: Any, **kwargs: Any) -> Any:
        with self.model.lock:
            return method(self, *args, **kwargs)

    return cast(_Method, locked)


class Passes:
    """A model's passes.

    prefill_rows: tokens of a prefill chunk, cut at blocks: a CPU is then bound by arithmetic. watch: keeps a memory
    plan's budget.
    """

    def __init__(self, model: Model, speculator: Speculator, watch: Watch | None, prefill_rows: int) -> None:
        self.model = model
        self.speculator = speculator
        self.watch = watch
        self.prefill_rows = prefill_rows

    def prefill(self, session: Session) -> Iterator[int]:
        """Feed all unfed tokens but the last, chunk by chunk; after each, the cache's length."""
        while session.unfed[1:]:
            self.read(session)
            yield session.cache.length

    @one_at_a_time
    @torch.inference_mode()
    def read(self, session: Session, stop: int | None = None) -> None:
        """A pass for the next chunk of a prompt, up to row `stop`."""
        chunk = self._chunk(session, stop)
        self._prefilled(chunk, forward([], [chunk], self.model.decoder, self.speculator.needs), 0)

    @one_at_a_time
    @torch.inference_mode()
    def step(
        self, sessions: Sequence[Session], reading: Session | None = None, stop: int | None = None
    ) -> list[Commit]:
        """Draft, one forward pass of the target, verify, commit: what each session got.

        reading: a session whose prompt isn't fed yet; its next chunk goes along in the same pass, up to row `stop`.
        An error of one text's own is kept in `Session.error`, and raised where there is no other text; an error of the
        whole pass is raised before anything is committed.
        """
        drafts = self.speculator.propose(sessions)
        inputs = [Input.of(session, session.unfed, draft) for session, draft in zip(sessions, drafts, strict=True)]
        chunks = [] if reading is None else [self._chunk(reading, stop)]
        output = forward(inputs, chunks, self.model.decoder, self.speculator.needs)
        commits = []
        for i, (one, verdict) in enumerate(zip(inputs, output.verdicts, strict=True)):
            commits.append(Commit((), "", len(one.draft), 0))
            with one.session.keeping_error():
                commits[-1] = one.session.take(verdict, one.draft)
                self._commit(one, verdict.kept, output, i)
        for chunk in chunks:
            with chunk.session.keeping_error():
                self._prefilled(chunk, output, len(inputs))
        rows = sum(len(one.tokens) for one in inputs)
        self.speculator.observe(commits, output.verdicts, output.seconds, rows, shared=bool(chunks))
        return self._guarded(sessions, commits)

    def _commit(self, one: Input, kept: Sequence[int], output: Output, index: int) -> None:
        """What of an input is text now goes into its cache, and its hidden states to the drafters."""
        committed = one.commit(kept)
        if committed and self.speculator.needs.layers:
            self.speculator.read(one.session, output.features_of(index, committed))

    def _guarded(self, sessions: Sequence[Session], commits: list[Commit]) -> list[Commit]:
        """The commits; where the memory runs short, one of the texts ends with what it has."""
        if (remark := self.model.decoder.remark()) is not None:
            sessions[0].notes.append(remark)
        if self.watch is not None and (ending := self.watch.after_step(sessions)) is not None:
            commits[list(sessions).index(ending)] += ending.interrupt("length")
        if len(sessions) == 1 and sessions[0].error is not None:
            raise sessions[0].error
        return commits

    def _chunk(self, session: Session, stop: int | None) -> Input:
        """The next tokens of a prompt, up to the end of a block; its last token is the first step's."""
        start = session.cache.length
        end = min((start + self.prefill_rows) // BLOCK * BLOCK, len(session.tokens) - 1, stop or len(session.tokens))
        return Input.of(session, session.tokens[start:end])

    def _prefilled(self, chunk: Input, output: Output, index: int) -> None:
        """A chunk has been through the pass."""
        session = chunk.session
        self._commit(chunk, [], output, index)
        if self.watch is not None:
            self.watch.after_chunk(session, min(self.prefill_rows, len(session.unfed)))
        if session.unfed[1:]:
            return
        if session.prompt_cache is not None:
            path, session.prompt_cache = session.prompt_cache, None
            try:
                keep(session, self.model, path)
            except LongspecError as error:  # the answer is what was asked for first
                session.notes.append(str(error))
        session.prefilled = perf_counter()
