"""SuffixDecoding (2411.04975): `ngram` that also drafts from other texts.

Besides the session's own sequence it searches given files (`--draft-from`) and, if the user asks for it, earlier
answers (`--remember`). Both sources estimate probabilities from counts of continuations, and their trees are merged.

Takes committed tokens and gives trees of tokens; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from longspec.drafters.common.answer_store import Outputs
from longspec.drafters.common.merge import laid_over, merged
from longspec.drafters.common.suffix_array import MOST_TOKENS, Corpus
from longspec.drafters.ngram import Ngram
from longspec.errors import UsageError
from longspec.model.load import Model
from longspec.types import Commit, Draft, Drafter, Verdict, Writing

__all__ = ["MOST_NBYTES", "Suffix", "remembering"]

MOST_NBYTES = 16 << 20
"""Largest size of a file to draft from: some four million tokens, twice a corpus's capacity."""


class Suffix(Drafter):
    """corpus: the other texts. outputs: store for finished answers, if they are to be remembered."""

    takes_inner = True

    def __init__(self, corpus: Corpus, outputs: Outputs | None = None, floor: float = 0.03) -> None:
        self.corpus = corpus
        self.outputs = outputs
        self.floor = floor
        self._own = Ngram(floor)
        self._begun: WeakKeyDictionary[Writing, int] = WeakKeyDictionary()

    @classmethod
    def make(
        cls, model: Model, inner: Drafter | None = None, *, texts: Sequence[str | Path] = (), remember: bool = False
    ) -> Drafter:
        return merged(remembering(model, [Path(text) for text in texts], remember=remember), inner)

    def begin(self, session: Writing) -> None:
        self._own.begin(session)
        self._begun[session] = len(session.tokens)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        drafts = self._own.propose(sessions, limits, ahead)
        if not len(self.corpus):
            return drafts
        guesses = ahead or [()] * len(sessions)
        trees = []
        for session, limit, guess, draft in zip(sessions, limits, guesses, drafts, strict=True):
            end = [*session.tokens[-16:], *guess]
            trees.append(laid_over(draft, Draft.tree(*self.corpus.bet(end, limit, self.floor)), limit))
        return trees

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        self._own.observe(session, commit, verdict)
        if commit.finish_reason is not None:
            answer = session.tokens[self._begun.pop(session, 0) :]
            if self.outputs is not None and answer:
                self.corpus.add(answer)
                self.outputs.add(answer)


def remembering(model: Model, texts: Sequence[Path], *, remember: bool) -> Suffix:
    """A `Suffix` drafter over these files, and over earlier answers if `remember` is set.

    Raises:
        UsageError: a file can't be read, isn't UTF-8, or is too long.
    """
    outputs = None
    if remember:
        outputs = Outputs(model.fingerprint["tokenizer"], model.decoder.config.vocabulary)
    tokens = [model.vocabulary.encode(_text(path), add_special=False) for path in texts]
    if (total := sum(map(len, tokens))) > MOST_TOKENS:
        raise UsageError(f"The files to draft from have {total:,} tokens together; {MOST_TOKENS:,} are held at most.")
    return Suffix(Corpus([*(outputs or ()), *tokens]), outputs)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_NBYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} can't be read to draft from: {error.strerror}; give a text file.") from error
    if len(data) > MOST_NBYTES:
        raise UsageError(f"{path} is longer than {MOST_NBYTES >> 20} MiB; give a part of it to draft from.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} isn't text in UTF-8 (byte {error.start}); give a text file to draft from.") from None
