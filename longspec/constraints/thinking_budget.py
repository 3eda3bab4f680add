"""The constraint on an answer with a reasoning section: a token budget for the section, a grammar for the answer
after it.

Takes a vocabulary, whose markers delimit a reasoning section. The mask after a path of tokens depends on these tokens
alone, so the output is the same whatever is drafted. Knows no model and no drafter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from longspec.constraints.matcher import Constraint, joined
from longspec.errors import UsageError
from longspec.text.reasoning import AFTER, BEFORE, INSIDE, Place, Reader, Section
from longspec.text.tokenizer import Vocabulary
from longspec.types import Draft

__all__ = ["Guide", "held"]


class Guide:
    """The constraint of an answer with a reasoning section; `constraints.matcher.Constraint` is that of a grammar
    alone.

    budget: the section is closed after so many reasoning tokens. grammar: constrains the answer after the section;
    the sequence then can't end inside the section.
    """

    def __init__(
        self,
        reader: Reader,
        place: Place,
        budget: int | None,
        grammar: Constraint | None = None,
        end_tokens: Sequence[int] = (),
        *,
        lead: bool = True,
    ) -> None:
        """lead: what leads to an answer is forced before the grammar begins; else the grammar has it."""
        self._reader = reader
        self._budget = budget
        self._grammar = grammar
        self._end_tokens = list(end_tokens)
        self._lead = reader.lead if grammar is not None and lead else []
        # With a grammar, the model reasons only if the prompt has opened the section.
        self._place = Place(AFTER) if grammar is not None and place.phase == BEFORE else place

    def take(self, token: int) -> bool:
        """Append a token to the sequence; returns whether nothing can follow it."""
        held = self._grammar is not None and self._is_held(self._place)
        self._place = self._reader.after(self._place, token)
        return held and self._grammar is not None and self._grammar.take(token)

    @property
    def broken(self) -> UsageError | None:
        """As `Constraint.broken`."""
        return None if self._grammar is None else self._grammar.broken

    def end(self) -> None:
        """The model has chosen an end of text. Raises UsageError where the grammar doesn't accept the answer."""
        if self._grammar is not None and self._is_held(self._place):
            self._grammar.end()

    def mask(self, logits: Tensor, paths: Sequence[Sequence[int]], vocabulary: Tensor | None = None) -> Tensor:
        """Logits [r, V] with -inf for the tokens not allowed after the sequence and each of r paths. vocabulary: the
        tokens [V] of the logits, if they aren't the whole vocabulary; a row whose one allowed token isn't among them
        stays unmasked.
        """
        if self._grammar is None and self._place.phase == AFTER:
            return logits
        if self._grammar is not None and self._is_held(self._place):
            return self._grammar.mask(logits, paths, vocabulary)
        if self._grammar is None and not self._may_end(max(map(len, paths), default=0)):
            return logits
        places = list(self._along(paths))
        due = {row: token for row, place in enumerate(places) if (token := self._due(place)) is not None}
        held = [row for row, place in enumerate(places) if self._is_held(place)] if self._grammar else []
        if not due and self._grammar is None:
            return logits
        logits = logits.clone()
        if self._grammar is not None:
            inside = [row for row, place in enumerate(places) if place.phase == INSIDE]
            for column in (_column(token, vocabulary) for token in self._end_tokens):
                if column is not None:
                    logits[inside, column] = float("-inf")
        for row, token in due.items():
            column = _column(token, vocabulary)
            if column is not None:
                kept = logits[row, column].clone()
                logits[row] = float("-inf")
                logits[row, column] = kept
        if held and self._grammar is not None:
            inner = [self._inner(paths[row], places[row]) for row in held]
            logits[held] = self._grammar.mask(logits[held], inner, vocabulary)
        return logits

    def forced(self, limit: int) -> list[int]:
        """The tokens forced next, at most `limit`."""
        return self._behind([], limit)

    def prune(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        """The draft without the nodes that the grammar forbids after the tokens `ahead`."""
        if self._grammar is None or not self._is_held(self._place):
            return draft
        return self._grammar.prune(draft, ahead)

    def extend(self, draft: Draft, ahead: Sequence[int], limit: int) -> Draft:
        """The tokens `ahead`, the draft after them, and the tokens forced after its first path: at most `limit`
        tokens.
        """
        return joined(draft, ahead, limit, self._behind)

    def _behind(self, path: Sequence[int], limit: int) -> list[int]:
        """The tokens forced after the sequence and this path, at most `limit`."""
        if self._grammar is None and self._place.phase == AFTER:
            return []
        if self._grammar is not None and self._is_held(self._place):
            return self._grammar.behind(path, limit)
        [place] = self._along([path])
        tokens: list[int] = []
        while len(tokens) < limit and (token := self._due(place)) is not None:
            tokens.append(token)
            place = self._reader.after(place, token)
        if self._grammar is not None and self._is_held(place):
            tokens += self._grammar.behind(self._inner([*path, *tokens], place), limit - len(tokens))
        return tokens

    def _is_held(self, place: Place) -> bool:
        """Whether the grammar, where there is one, says what follows."""
        return place.phase == AFTER and place.count >= len(self._lead)

    def _inner(self, path: Sequence[int], place: Place) -> Sequence[int]:
        """The end of a path that is the grammar's."""
        return path[len(path) - place.count + len(self._lead) :]

    def _due(self, place: Place) -> int | None:
        """The token forced at this parser state; None where there is a choice."""
        if place.phase == AFTER:
            return self._lead[place.count] if place.count < len(self._lead) else None
        if self._budget is None or place.phase != INSIDE or place.count < self._budget:
            return None
        return self._reader.ending[self._reader.ends(place)]

    def _may_end(self, ahead: int) -> bool:
        """Whether the budget may run out within `ahead` more tokens."""
        return self._budget is not None and self._place.count + ahead >= self._budget

    def _along(self, paths: Sequence[Sequence[int]]) -> Iterator[Place]:
        """The parser state at the end of each path."""
        known: dict[tuple[int, ...], Place] = {(): self._place}
        for path in map(tuple, paths):
            start = next(n for n in range(len(path), -1, -1) if path[:n] in known)
            for n in range(start, len(path)):
                known[path[: n + 1]] = self._reader.after(known[path[:n]], path[n])
            yield known[path]


def held(
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    *,
    raw: bool,
    budget: int | None,
    grammar: str | None,
    size: int,
    end_tokens: Sequence[int],
    lead: bool = True,
) -> tuple[Section | None, Guide | Constraint | None]:
    """The reasoning parser and the constraint of an answer to this prompt.

    grammar: one of `longspec.constraints.grammar.grammar_of`, over a vocabulary of `size` logits. lead: it begins
    behind what leads to an answer (`Markers.lead`).

    Raises:
        UsageError: a budget is given, but the model or the prompt has no reasoning section; or the grammar can't be
        used with this model.
    """
    constraint = None if grammar is None else Constraint(grammar, vocabulary, size, end_tokens)
    markers = None if raw else vocabulary.markers
    if budget is not None:
        if raw:
            raise UsageError("A raw prompt has no section of reasoning; leave the budget or --raw out.")
        if markers is None:
            raise UsageError(
                "This model's chat template and tokens know no section of reasoning, such as <think>, that a budget "
                "could end; leave --reasoning-budget out."
            )
    if markers is None:
        return None, constraint
    reader = Reader(vocabulary, markers)
    place = reader.begun(prompt)
    section = Section(reader, markers, place)
    if budget is None and (constraint is None or not section.is_open):
        return section, constraint
    return section, Guide(reader, place, budget, constraint, end_tokens, lead=lead)


def _column(token: int, vocabulary: Tensor | None) -> int | None:
    """The column of a token's logit; None where it has none."""
    if vocabulary is None:
        return token
    found = (vocabulary == token).nonzero()
    return int(found[0]) if len(found) else None
