"""A running server's model, as `suggest` asks an engine: answers side by side, and how likely texts are.

Takes the server's socket; gives what an engine of this process would. Loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter
from typing import Any

from longspec.cli.io.progress import Progress
from longspec.cli.io.server_client import GoneError, Remote, Reported, told

__all__ = ["Served"]

Messages = list[dict[str, str]]


class Served:
    """The model of the server at that path. Its methods raise GoneError where it takes no more."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path = path
        self._progress = progress

    def generate_many(
        self, asks: Sequence[tuple[Messages, Mapping[str, Any]]], width: int
    ) -> Iterator[tuple[int, Reported]]:
        """The answers with their numbers, which key their noise, in order; they are written side by side."""
        with ExitStack() as stack:
            remotes = []
            for number, (messages, options) in enumerate(asks):
                own = {"key": str(number), **options}
                if (remote := Remote.reached(self._path, messages, own, perf_counter())) is None:
                    raise GoneError("The server takes no more requests.")
                remotes.append(stack.enter_context(closing(remote)))
            for number, remote in enumerate(remotes):
                while not remote.is_over:
                    remote.advance(self._progress)
                assert remote.report is not None
                yield number, Reported(remote.report)

    def scores(self, pairs: Sequence[tuple[Messages, str]]) -> list[float]:
        """The mean log-probability of each text's tokens behind its messages, in nats."""
        answer = told(self._path, "/score", {"pairs": pairs}, seconds=None)
        if answer is None:
            raise GoneError("The server takes no more requests.")
        return [float(value) for value in answer["scores"]]
