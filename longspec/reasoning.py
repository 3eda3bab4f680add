"""What a model thinks before it answers: where it stands in a text, how long it may become, and what follows it.

Takes a vocabulary, whose markers say how a section of reasoning begins and ends; gives a
`Section`, which tells an answer's thoughts from its words, and a `Guide`, which holds the thoughts to a budget and the
words to a grammar. Knows no model and no drafter. Where a path of tokens stands depends on these tokens alone, so the
text is the same whatever is drafted.

A section is open when the prompt ends with its beginning, as the templates of DeepSeek-R1 and QwQ have it, or when the
answer begins with it. An answer has one at most: markers that come later are part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from longspec.constraint import Constraint, joined
from longspec.errors import UsageError
from longspec.markers import Markers
from longspec.text import Vocabulary
from longspec.types import Draft

__all__ = ["Guide", "Reader", "Section", "held"]

_BEFORE, _INSIDE, _AFTER = "before", "inside", "after"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text stands. count: tokens since the section began, or since it ended."""

    phase: str
    tail: bytes = b""  # what a marker may have begun with
    count: int = 0
    rest: int = 0  # bytes behind the marker in the token that ended it


class Reader:
    """Follows tokens from place to place."""

    def __init__(self, vocabulary: Vocabulary, markers: Markers) -> None:
        self._begin, self._end = markers.begin.encode(), markers.end.encode()
        self.spelled = lru_cache(maxsize=4096)(lambda token: vocabulary.piece(token, first=False) or b"")
        self.ending = vocabulary.encode(markers.end, add_special=False)

    def begun(self, prompt: Sequence[int]) -> Place:
        """At the end of a prompt: inside where it ends with the beginning of a section."""
        last = b"".join(map(self.spelled, prompt[-(len(self._begin) + 8) :])).rstrip()
        return Place(_INSIDE if last.endswith(self._begin) else _BEFORE)

    def after(self, place: Place, token: int) -> Place:
        """With one more token."""
        if place.phase == _AFTER:
            return Place(_AFTER, b"", place.count + 1)
        tail = place.tail + self.spelled(token)
        if place.phase == _BEFORE:
            text = tail.lstrip()
            if text.startswith(self._begin):
                return Place(_INSIDE, text[len(self._begin) :])
            return Place(_BEFORE if self._begin.startswith(text) else _AFTER, tail)
        at = tail.find(self._end)
        if at >= 0:
            return Place(_AFTER, rest=len(tail) - at - len(self._end))
        return Place(_INSIDE, tail[-len(self._end) :], place.count + 1)

    def ends(self, place: Place) -> int:
        """How many of the tokens that end a section the text already ends with."""
        for n in range(len(self.ending) - 1, 0, -1):
            if place.tail.endswith(b"".join(map(self.spelled, self.ending[:n]))):
                return n
        return 0


class Section:
    """One answer in two: its thoughts, and its words."""

    def __init__(self, reader: Reader, markers: Markers, place: Place) -> None:
        self._reader = reader
        self._markers = markers
        self._place = place
        self._opened: int | None = 0 if self._place.phase == _INSIDE else None  # offsets in the text: of the thoughts
        self._closed: int | None = None
        self._words: int | None = None  # and of the words
        self._sizes: list[int] = []  # bytes of each token of the section
        self._thought = self._said = 0  # how far each was given
        self._began = [False, False]  # the blanks before them were passed over
        self.tokens = 0  # of the thoughts

    @property
    def is_there(self) -> bool:
        """The answer has thoughts, though they may be empty."""
        return self._opened is not None

    @property
    def is_open(self) -> bool:
        """What is written now is thought."""
        return self._place.phase == _INSIDE

    def take(self, token: int, begin: int) -> None:
        """The answer has one more token, whose text begins at this offset."""
        old, self._place = self._place, self._reader.after(self._place, token)
        piece = self._reader.spelled(token)
        phase = self._place.phase
        if old.phase == _INSIDE:
            self._sizes.append(len(piece))
            self.tokens += 1
        if phase == old.phase:
            return
        if phase == _INSIDE:
            self._opened = begin + _letters(piece[: len(piece) - len(self._place.tail)])
        elif old.phase == _BEFORE:
            self._words = 0
        else:
            self._words = begin + _letters(piece[: len(piece) - self._place.rest])
            self._closed = self._words - len(self._markers.end)
            wanted = len(self._markers.end.encode()) + self._place.rest
            while wanted > 0 and self._sizes:
                wanted -= self._sizes.pop()
                self.tokens -= 1

    def parts(self, text: str, *, over: bool) -> tuple[str, str]:
        """What is certain of thoughts and words and wasn't given before; text: all of the answer that may be shown.

        The blanks around the thoughts, and before the words that follow them, are left out.
        """
        thought = said = ""
        if self._opened is not None:
            end = self._closed
            if end is None:
                end = len(text) - (0 if over else self._held(text))
            thought = text[max(self._thought, self._opened) : end].rstrip()
            self._thought = max(self._thought, self._opened) + len(thought)
            thought = self._stripped(0, thought)
        words = 0 if self._words is None and over and self._opened is None else self._words
        if words is not None:
            begin = max(self._said, words)
            said = text[begin:]
            self._said = begin + len(said)
            if self._opened is not None:
                said = self._stripped(1, said)
        return thought, said

    def _held(self, text: str) -> int:
        """Letters at the end of the text that may turn out to be the marker's."""
        end = self._markers.end
        return next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:n])), 0)

    def _stripped(self, part: int, text: str) -> str:
        if not self._began[part]:
            text = text.lstrip()
            self._began[part] = bool(text)
        return text


class Guide:
    """What may follow an answer with a section, as `longspec.constraint.Constraint` says it of one with a grammar.

    budget: after so many tokens of thought the section is ended. grammar: holds what follows the section, which then
    has to come: a text can't end in its thoughts.
    """

    def __init__(
        self,
        reader: Reader,
        place: Place,
        budget: int | None,
        grammar: Constraint | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        self._reader = reader
        self._budget = budget
        self._grammar = grammar
        self._end_tokens = list(end_tokens)
        # An answer that is held to a grammar has no thoughts but those that the prompt has begun.
        self._place = Place(_AFTER) if grammar is not None and place.phase == _BEFORE else place

    def take(self, token: int) -> bool:
        """The text has one more token: whether nothing can follow it."""
        held = self._grammar is not None and self._place.phase == _AFTER
        self._place = self._reader.after(self._place, token)
        return held and self._grammar is not None and self._grammar.take(token)

    def mask(self, logits: Tensor, paths: Sequence[Sequence[int]], vocabulary: Tensor | None = None) -> Tensor:
        """Logits [r, V] with -inf for what can't follow the text and each of r paths. vocabulary: the tokens [V] that
        the logits are of, if they aren't of all; a row whose one token isn't among them stays open.
        """
        if self._place.phase == _AFTER:
            return logits if self._grammar is None else self._grammar.mask(logits, paths, vocabulary)
        if self._grammar is None and not self._may_end(max(map(len, paths), default=0)):
            return logits
        places = list(self._along(paths))
        due = {row: token for row, place in enumerate(places) if (token := self._due(place)) is not None}
        held = [row for row, place in enumerate(places) if place.phase == _AFTER] if self._grammar else []
        if not due and self._grammar is None:
            return logits
        logits = logits.clone()
        if self._grammar is not None:
            inside = [row for row, place in enumerate(places) if place.phase == _INSIDE]
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
            inner = [paths[row][len(paths[row]) - places[row].count :] for row in held]
            logits[held] = self._grammar.mask(logits[held], inner, vocabulary)
        return logits

    def forced(self, limit: int) -> list[int]:
        """The tokens that must come next, at most `limit`."""
        return self._behind([], limit)

    def prune(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        """The draft, made to follow the tokens `ahead`, without what a grammar forbids."""
        if self._grammar is None or self._place.phase != _AFTER:
            return draft
        return self._grammar.prune(draft, ahead)

    def extend(self, draft: Draft, ahead: Sequence[int], limit: int) -> Draft:
        """The tokens `ahead`, the draft behind them, and what its first path forces: at most `limit` tokens."""
        return joined(draft, ahead, limit, self._behind)

    def _behind(self, path: Sequence[int], limit: int) -> list[int]:
        """What must follow the text and this path."""
        if self._place.phase == _AFTER:
            return [] if self._grammar is None else self._grammar.behind(path, limit)
        [place] = self._along([path])
        tokens: list[int] = []
        while len(tokens) < limit and (token := self._due(place)) is not None:
            tokens.append(token)
            place = self._reader.after(place, token)
        if self._grammar is not None and place.phase == _AFTER:
            whole = [*path, *tokens]
            tokens += self._grammar.behind(whole[len(whole) - place.count :], limit - len(tokens))
        return tokens

    def _due(self, place: Place) -> int | None:
        """The token that must come here."""
        if self._budget is None or place.phase != _INSIDE or place.count < self._budget:
            return None
        return self._reader.ending[self._reader.ends(place)]

    def _may_end(self, ahead: int) -> bool:
        """Whether the budget may be used up within so many tokens."""
        return self._budget is not None and self._place.count + ahead >= self._budget

    def _along(self, paths: Sequence[Sequence[int]]) -> Iterator[Place]:
        """The place at the end of each path."""
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
) -> tuple[Section | None, Guide | Constraint | None]:
    """For an answer to this prompt: what tells its thoughts from its words, and what it is held to.

    grammar: one of `longspec.grammar.grammar_of`, over the tokens of a model with `size` logits.

    Raises:
        UsageError: there is a budget, and nothing that it is for; or the grammar can't be used with this model.
    """
    constraint = None if grammar is None else Constraint(grammar, vocabulary, size, end_tokens)
    markers = None if raw else vocabulary.markers
    if budget is not None:
        if budget < 0:
            raise UsageError(f"reasoning_budget is {budget}; it must be 0 or more.")
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
    return section, Guide(reader, place, budget, constraint, end_tokens)


def _letters(data: bytes) -> int:
    return len(data.decode(errors="replace"))


def _column(token: int, vocabulary: Tensor | None) -> int | None:
    """Where a token's logit stands."""
    if vocabulary is None:
        return token
    found = (vocabulary == token).nonzero()
    return int(found[0]) if len(found) else None
