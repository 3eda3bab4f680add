"""A looped target's early loops as drafter, beside its later ones (SPEED, 2310.12072; LoopSpec, 2609.17184).

The readout of a token's first loop begins the next token at once, while the token itself goes on: all tokens under way
run their next loop in one pass, so that the layers' weights are read once for all of them. A token at loop r reads keys
and values of loop r, which those before it have left there by then. What begins and what ends is the schedule of
`longspec.drafters.common.lanes`.

The readout of a token's last loop is the target's own, and what it names by the session's sampling and noise is the
text's next token (unless that one isn't among the 128 that `rank` looks at): where a guess named the same, it goes on,
else it ends. So a draft is what the target writes, and its tokens have run all their loops (`Begun`); the verification
computes their logits from the last hidden states, and compares. LoopSpec resamples where sampled guesses differ; with
noise that is fixed there is nothing to resample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from longspec.cache.stage import BLOCK
from longspec.drafters.common.lanes import Lane, Lanes, Schedule
from longspec.errors import UsageError
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.types import Begun, Draft, Drafter, Writing

__all__ = ["Pipeline"]


@dataclass(slots=True)
class _Text:
    """One session's lanes, and their rows in a stage of its cache: those of the text, then one for each lane."""

    session: Writing
    ahead: Sequence[int]
    lanes: Lanes
    stage: Any
    tokens: list[int]  # of the rows
    hidden: Tensor  # [rows, width], each after its own loops
    held: list[Lane]  # whose rows are the last ones

    @property
    def before(self) -> int:
        """Rows before the first lane's: tokens that the cache lacks as well, and that run with it."""
        return len(self.tokens) - len(self.held)

    def running(self) -> Iterator[tuple[int, slice]]:
        """The rows that lack loops, those alike together, and how many they have run."""
        at = 0
        for done, some in groupby([self.held[0].done] * self.before + [lane.done for lane in self.held]):
            first, at = at, at + len(list(some))
            if done < self.lanes.schedule.loops:
                yield done, slice(first, at)

    def follow(self, decoder: Decoder) -> None:
        """Forget the rows of lanes that ended, and add those of lanes that begin."""
        lanes = [*self.lanes.finished, *self.lanes.live]
        held = [lane for lane in lanes if lane.done]
        if len(held) < len(self.held):
            stays = set(map(id, held))
            kept = (row for row, lane in enumerate(self.held, self.before) if id(lane) in stays)
            rows = [*range(self.before), *kept]
            self.stage.keep(rows)
            self.tokens, self.hidden = [self.tokens[row] for row in rows], self.hidden[rows]
        self.held = held
        if born := lanes[len(held) :]:
            places = {id(lane): row for row, lane in enumerate(held, self.before)}
            self.stage.add([places[id(lane.parent)] for lane in born])
            tokens = [lane.token for lane in born]
            self.hidden = torch.cat((self.hidden, decoder.embed(torch.tensor(tokens, device=decoder.device))))
            self.tokens += tokens
            self.held = lanes


class Pipeline(Drafter):
    """Drafts by running the tokens of a looped target beside each other. ends: tokens behind which none is begun."""

    serves = False  # its drafts carry passes of the target, and must be verified unchanged

    def __init__(self, decoder: Decoder, schedule: Schedule, ends: Sequence[int] = ()) -> None:
        self.decoder = decoder
        self.schedule = schedule
        self._ends = ends

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None, *, loops: int = 1, second: int = 0) -> Drafter:
        """loops: that all tokens under way run in one pass; the first guess is made behind the first of them. second:
        after how many such passes a second guess is made; 0 for none.
        """
        config = model.decoder.config
        if config.loops == 1:
            raise UsageError(
                f"The drafter pipeline is for a model whose layers run several times (ouro), and those of this "
                f"{config.family} run once; take another one, or auto."
            )
        try:
            schedule = Schedule(config.loops, loops, second or None)
        except ValueError as error:
            raise UsageError(f"pipeline:loops={loops},second={second} can't be: {error}.") from error
        return cls(model.decoder, schedule, model.end_tokens)

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        guesses = ahead or [()] * len(sessions)
        texts = [self._begin(*each) for each in zip(sessions, limits, guesses, strict=True)]
        while going := [text for text in texts if text.lanes.live]:
            self._cycle(going)
        return [_draft(text, self.decoder.config.layers) for text in texts]

    def _begin(self, session: Writing, limit: int, ahead: Sequence[int]) -> _Text:
        """A text whose last tokens are its first lane."""
        tokens, stage = [*session.unfed, *ahead], session.cache.open()
        limit = min(limit, BLOCK - len(tokens))  # a stage isn't a block deep
        lanes = Lanes(self.schedule, tokens[-1], limit + 1 if limit > 0 else 0, self._ends)  # and the bonus
        if lanes.live:
            stage.add(range(-1, len(tokens) - 1))
        hidden = self.decoder.embed(torch.tensor(tokens, device=self.decoder.device))
        return _Text(session, ahead, lanes, stage, tokens, hidden, list(lanes.live))

    def _cycle(self, texts: Sequence[_Text]) -> None:
        """Run all lanes of all texts through their next loops in one pass, and read out those that name a token."""
        decoder, group = self.decoder, self.decoder.config.group
        chunks, lacking = [], []
        for text in texts:
            spans, session = list(text.running()), text.session
            lacking.append(text.hidden[spans[0][1].start :])  # rows that are through come first
            chunks += [
                Chunk(text.stage, rows, text.tokens[rows], session.cache.length, session.long, done * group)
                for done, rows in spans
            ]
        rows = Rows.of(chunks, decoder.device)
        hidden = decoder.forward(rows, torch.cat(lacking), 0, self.schedule.stride * group)
        for own, new in zip(lacking, hidden.split_with_sizes([len(own) for own in lacking]), strict=True):
            own.copy_(new)
        readers = [text.lanes.advance() for text in texts]
        places = [
            [row for row, lane in enumerate(text.held, text.before) if lane in some]
            for text, some in zip(texts, readers, strict=True)
        ]
        read = [text.hidden[some] for text, some in zip(texts, places, strict=True) if some]
        logits = iter(decoder.logits(torch.cat(read)).split_with_sizes([len(each) for each in read]) if read else ())
        for text, some in zip(texts, readers, strict=True):
            if some:
                paths = [[*text.ahead, *lane.path] for lane in some]
                named = text.session.rank(next(logits), paths, 1)[0]
                text.lanes.take(some, named[:, 0].tolist())
            text.follow(decoder)


def _draft(text: _Text, layers: int) -> Draft:
    """All tokens chosen but the last, which the verification will choose."""
    draft = Draft.chain(text.lanes.chosen[:-1])
    if text.ahead or not text.lanes.finished:
        return draft
    begun = Begun(text.stage, text.hidden, (layers,) * len(text.tokens))
    return Draft(draft.tokens, draft.parents, begun=begun, whole=True)
