"""Forward passes for one or many sessions: draft, run the target, verify, commit.

    propose -> Draft -> forward pass -> Verdict -> commit -> observe  each step
    chunk -> forward pass -> commit                                   during prefill

Takes open sessions; knows no options and no prompt. Threads take turns, a pass at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from time import perf_counter
from typing import Any, TypeVar, cast

import torch

from longspec.cache import BLOCK, CACHES
from longspec.engine.forward import Output, forward
from longspec.engine.input import Input
from longspec.engine.memory_guard import Watch
from longspec.engine.prompt_cache import keep
from longspec.engine.pruning import Pruner
from longspec.engine.session import Session
from longspec.engine.speculator import Speculator
from longspec.errors import LongspecError, UsageError
from longspec.model.decoder import Chunk, Rows
from longspec.model.load import Model
from longspec.model.reads import Growth
from longspec.semantic.probe import Judge
from longspec.types import Commit

__all__ = ["Passes", "one_at_a_time"]

_CALIBRATED = (1, 2, 4, 8, 16)  # positions
_STREAMED = (1, 1, 16)  # where a pass may take seconds
_SHORT = 0.1  # seconds of a pass, which other processes may take as much of
_STRIDE = 257  # between the tokens of such a pass: rows of one token would all choose the same experts

_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_at_a_time(method: _Method) -> _Method:
    """Decorator: hold the model's lock, which all engines of a model share, during the call."""

    @wraps(method)
    def locked(self: Passes, *args: Any, **kwargs: Any) -> Any:
        self.check_open()
        with self.model.lock:
            return method(self, *args, **kwargs)

    return cast(_Method, locked)


class Passes:
    """A model's passes.

    prefill_rows: tokens of a prefill chunk, cut at block boundaries; large enough that a CPU is compute-bound. watch:
    the memory guard. judge: what may accept drafts by their meaning; None is exact.
    """

    most_texts: int | None = None  # that the memory plan holds side by side; None: no limit

    def __init__(
        self,
        model: Model,
        speculator: Speculator,
        watch: Watch | None,
        prefill_rows: int,
        judge: Judge | None = None,
    ) -> None:
        self.model = model
        self.speculator = speculator
        self.watch = watch
        if watch is not None:
            watch.give_back = speculator.give_back
        self.prefill_rows = prefill_rows
        self.judge = judge  # of whole drafts, which then don't shrink on the way
        self.growth = Growth(model.decoder)
        speculator.control.price_by(self.growth)
        # A dense model's layers are read whole for any rows, and a pass waits for them: only experts can stay unread
        # (docs/benchmarks/pruned.json).
        self.pruner = None if model.decoder.pool is None or judge is not None else Pruner(model.decoder)

    @property
    def pruned_rows(self) -> int:
        """Rows of drafts that left passes on the way."""
        return 0 if self.pruner is None else self.pruner.rows

    @property
    def is_closed(self) -> bool:
        """Whether `Writer.close` let go of the model."""
        return "model" not in vars(self)

    def check_open(self) -> None:
        """Raise UsageError where it is closed."""
        if self.is_closed:
            raise UsageError("This engine is closed; load another one.")

    @one_at_a_time
    @torch.inference_mode()
    def calibrate(self) -> None:
        """Measure passes of up to 16 positions, some thirty tokens' time at most, so that the control doesn't learn on
        the first text what they cost here: a further position costs from .01 (AMX) to .2 of a pass (AVX2). Of two short
        ones the faster one counts: the other may have been disturbed.
        """
        decoder = self.model.decoder
        for rows in (1, *_CALIBRATED) if decoder.ring is None else _STREAMED:  # the first one wakes threads
            seconds = self._calibrated(rows)
            if seconds < _SHORT:
                seconds = min(seconds, self._calibrated(rows))
            self.speculator.control.calibrate(rows, seconds, self.growth.observe())

    def _calibrated(self, rows: int) -> float:
        """Seconds of a pass of so many positions."""
        decoder = self.model.decoder
        stage = CACHES["dense"](decoder.shape).open()
        tokens = [_STRIDE * i % decoder.config.vocabulary for i in range(rows)]
        chunk = Chunk(stage, stage.add(range(-1, rows - 1)), tokens, 0, False)
        began = perf_counter()
        decoder.logits(decoder.forward(Rows.of([chunk], decoder.device)))
        return perf_counter() - began

    def prefill(self, session: Session) -> Iterator[int]:
        """Prefill all uncached tokens but the last, chunk by chunk; yields the cache's length after each."""
        while session.unfed[1:]:
            self.read(session)
            yield session.cache.length

    @one_at_a_time
    @torch.inference_mode()
    def read(self, session: Session, stop: int | None = None) -> None:
        """Run a pass for the prompt's next chunk, up to position `stop`."""
        chunk = self._chunk(session, stop)
        output = forward([], [chunk], self.model.decoder, self.speculator.needs)
        self.growth.observe()
        self._prefilled(chunk, output, 0)

    @one_at_a_time
    @torch.inference_mode()
    def step(
        self, sessions: Sequence[Session], reading: Session | None = None, stop: int | None = None
    ) -> list[Commit]:
        """Draft, run one forward pass of the target, verify, commit: returns each session's commit.

        reading: a session in prefill, whose next chunk, up to position `stop`, shares the pass. An error of one
        sequence is stored in `Session.error`, and raised where there is no other sequence; an error of the whole pass
        is raised before anything is committed.
        """
        began = perf_counter()
        drafts = self.speculator.propose(sessions)
        inputs = [Input.of(session, session.unfed, draft) for session, draft in zip(sessions, drafts, strict=True)]
        chunks = [] if reading is None else [self._chunk(reading, stop)]
        output = forward(inputs, chunks, self.model.decoder, self.speculator.needs, self.pruner, self.judge)
        growth, commits = self.growth.observe(), []
        for i, (one, verdict) in enumerate(zip(output.inputs, output.verdicts, strict=False)):
            commits.append(Commit((), "", len(inputs[i].draft), 0))
            with one.session.keeping_error():
                commits[-1] = one.session.take(verdict, one.draft)
                self._commit(one, verdict.kept, output, i)
        for chunk in chunks:
            with chunk.session.keeping_error():
                self._prefilled(chunk, output, len(inputs))
        rows = sum(len(one.tokens) for one in inputs)
        verdicts = [one.proposed(verdict) for one, verdict in zip(output.inputs, output.verdicts, strict=False)]
        self.speculator.observe(commits, verdicts, began, output.seconds, rows, shared=bool(chunks), growth=growth)
        return self._guarded(sessions, commits)

    def _commit(self, one: Input, kept: Sequence[int], output: Output, index: int) -> None:
        """Commit an input's accepted positions to its cache, and pass their hidden states to the drafters."""
        committed = one.commit(kept)
        if committed and self.speculator.needs.layers:
            self.speculator.read(one.session, output.features_of(index, committed))

    def _guarded(self, sessions: Sequence[Session], commits: list[Commit]) -> list[Commit]:
        """The commits, after the memory guard's check, which may end a sequence."""
        if (remark := self.model.decoder.remark()) is not None:
            sessions[0].notes.append(remark)
        if self.watch is not None and (ending := self.watch.after_step(sessions)) is not None:
            commits[list(sessions).index(ending)] += ending.interrupt("length")
        if len(sessions) == 1 and sessions[0].error is not None:
            raise sessions[0].error
        return commits

    def _chunk(self, session: Session, stop: int | None) -> Input:
        """The prompt's next tokens, up to a block boundary; its last token is left to the first step."""
        start = session.cache.length
        end = min((start + self.prefill_rows) // BLOCK * BLOCK, len(session.tokens) - 1, stop or len(session.tokens))
        return Input.of(session, session.tokens[start:end])

    def _prefilled(self, chunk: Input, output: Output, index: int) -> None:
        """Commit a prefilled chunk."""
        session = chunk.session
        self._commit(chunk, [], output, index)
        if self.watch is not None:
            self.watch.after_chunk(session, min(self.prefill_rows, len(session.unfed)))
        if session.unfed[1:]:
            return
        session.cache.mark()
        if session.prompt_cache is not None:
            path, session.prompt_cache = session.prompt_cache, None
            try:
                keep(session, self.model, path)
            except LongspecError as error:  # a cache file that can't be written must not cost the answer
                session.notes.append(str(error))
        session.prefilled = perf_counter()
