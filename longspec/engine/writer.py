"""Whole answers, of forward passes: one text, many side by side, those of several threads, and of a program's tasks.

Takes prompts and options; knows of a model only that `prepare` and `begin` make a session for a prompt, and `answer`
its result.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from types import TracebackType
from typing import Self, Unpack, cast

from longspec.cache import Cache
from longspec.engine.answer import Answer
from longspec.engine.opening import Prepared
from longspec.engine.options import Options, check_options
from longspec.engine.passes import Passes
from longspec.engine.scheduler import WIDTH, Schedule
from longspec.engine.session import Session
from longspec.engine.together import Together
from longspec.errors import LongspecError
from longspec.machine.declared import declared
from longspec.machine.schema import whole
from longspec.text.prompt import Prompt
from longspec.types import Commit

__all__ = ["Writer"]


class Writer(Passes):
    """Passes that write answers."""

    cache_name: str

    def empty_cache(self) -> Cache:
        """A cache of the kind that texts begin with."""
        raise NotImplementedError

    def prepare(self, prompt: Prompt, **options: Unpack[Options]) -> Prepared:
        """Read a prompt; any thread may."""
        raise NotImplementedError

    def begin(self, prepared: Prepared) -> Session:
        """Open a session for it."""
        raise NotImplementedError

    def open(self, prompt: Prompt, **options: Unpack[Options]) -> Session:
        """Open a session for this prompt; nothing is computed yet.

        Raises:
            ContextError: the prompt, or prompt and `max_new_tokens`, is longer than the model's context.
            UsageError: an option is out of range, the prompt has no token, or one that the model has no embedding
            for.
            TypeError: an option has no such name.
        """
        return self.begin(self.prepare(prompt, **options))

    def answer(self, session: Session, began: float | None = None) -> Answer:
        """The session's answer so far."""
        raise NotImplementedError

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Generate one answer."""
        return self._together.answer(self.prepare(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str]:
        """Generate one answer, yielding its text as it becomes final."""
        check_options(options)  # raise at the call, not at the first piece
        return self._stream(prompt, options)

    def _stream(self, prompt: Prompt, options: Options) -> Iterator[str]:
        for commit in self._together.stream(self.prepare(prompt, **options)):
            if commit.text:
                yield commit.text

    @declared(width=whole(1, 1 << 16))
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
                text, own = _parted(prompt)
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

    @declared(n=whole(1, 1 << 16))
    def sample(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Answer]:
        """`n` answers to one prompt, which is read once: their caches are forks of it, and each has noise of its own.

        Raises:
            UsageError: n isn't a number of answers.
            LongspecError: an answer can't be written.
        """
        answers: dict[int, Answer] = {}
        for number, answer in self.generate_many([prompt] * n, **options):
            if isinstance(answer, LongspecError):
                raise answer
            answers[number] = answer
        return [answers[number] for number in range(n)]

    async def agenerate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """`generate` for a program of tasks: those that wait at the same time share passes."""
        check_options(options)
        work = partial(self.generate, prompt, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[str]:
        """`stream` for a program of tasks."""
        pieces, loop = self.stream(prompt, **options), asyncio.get_running_loop()
        while (piece := await loop.run_in_executor(self._threads, next, pieces, None)) is not None:
            yield piece

    def write(self, session: Session, progress: Callable[[int, int], None] | None = None) -> Iterator[Commit]:
        """Prefill, then step until the answer ends. progress: a callback for the prompt's tokens, done and in total."""
        for done in self.prefill(session):
            if progress is not None:
                progress(done, session.prompt_length - 1)
        while session.finish_reason is None:
            yield from self.step([session])

    def close(self) -> None:
        """Let go of the model, its drafters and its threads; later calls are refused, and a second `close` is idle."""
        if self.is_closed:
            return
        with self.model.lock:
            if "_threads" in vars(self):
                self._threads.shutdown(wait=False)
            self.speculator.drafters.clear()
            self.speculator.everyone.clear()
            vars(self).pop("_together", None)
            del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _together(self) -> Together:
        return Together(self)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(WIDTH, thread_name_prefix="longspec")


def _parted(prompt: Prompt | tuple[Prompt, Options]) -> tuple[Prompt, Options]:
    """A prompt and its own options; a tuple of messages is a prompt."""
    brings = isinstance(prompt, tuple) and [isinstance(each, Mapping) for each in prompt] == [False, True]
    return cast("tuple[Prompt, Options]", prompt) if brings else (cast("Prompt", prompt), Options())
