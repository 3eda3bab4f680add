"""From a request to commands: how a model is asked, and which of its answers is taken.

Takes an engine, a request and a place; gives lines that are commands there. A small model errs often, so it is asked
several times: the likeliest answer after this many examples and that many, then sampled ones. Its answers and the
nearest examples' own commands then compete: the line counts that is about the request, that the model says more often,
and that is built like the nearest examples. Runs nothing, prints nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longspec.cli.danger import judge
from longspec.cli.examples import Pair, names, nearest, template
from longspec.cli.place import Place
from longspec.cli.syntax import calls, parse

if TYPE_CHECKING:
    from longspec.engine import Engine
    from longspec.options import Options

__all__ = ["TRIES", "Try", "fits", "suggest"]

_MOST_TOKENS = 64
_PROGRAMS = 12


@dataclass(frozen=True, slots=True)
class Try:
    """One way to ask: after how many examples, and how freely."""

    shown: int
    temperature: float = 0.0


TRIES = [Try(5), Try(3), Try(1), Try(8)], [Try(5, 0.6), Try(3, 0.6), Try(8, 0.8), Try(12, 0.9)]
"""The first are asked until one line stands out; the second, one by one, until there are enough commands."""


def suggest(
    engine: Engine,
    request: str,
    place: Place,
    *,
    count: int = 1,
    seed: int = 0,
    step: Callable[[int], None] = lambda asked: None,
    tries: tuple[Sequence[Try], Sequence[Try]] = TRIES,
) -> list[str]:
    """Up to `count` distinct commands, the best first; none where no answer was a command.

    step: told, before each token, how many answers there are.
    """
    known = [pair for pair in template()[1] if place.means(pair[1])]
    near = nearest(known, request, max(one.shown for part in tries for one in part))
    like = [command for nearness, (_, command) in near if nearness > _NEAR / 2]
    said: Counter[str] = Counter()
    about = {line for line in like if fits(line, request, [pair for _, pair in near]) and place.reads(line)}

    def rank(line: str) -> tuple[bool, float]:
        return line in about, said[line] / len(first) + _built_like(line, near)

    first, more = tries
    for asked, one in enumerate([*first, *more]):
        if len(about) >= count and (asked >= len(first) or (asked and max(map(rank, about))[1] >= _ENOUGH)):
            break
        shown = [pair for _, pair in near[len(near) - one.shown :]]
        line = _ask(engine, _messages(request, place, shown), one.temperature, seed + asked, place, lambda: step(asked))  # noqa: B023
        if line is not None:
            said[line] += 1
            if fits(line, request, shown):
                about.add(line)
    return sorted({*said, *about}, key=rank, reverse=True)[:count]


def fits(line: str, request: str, shown: Sequence[Pair]) -> bool:
    """Whether a line is about this request: it has its names and numbers and none of an example's, loses nothing that
    nobody spoke of, and is no sentence and no stutter.
    """
    if any(name not in line for name in names(request)):
        return False
    if any(name in names(asked) and name not in request for asked, _ in shown for name in names(line)):
        return False
    theirs = {word for _, command in shown for word in _QUOTED.findall(command)}
    if any(word in theirs and word.lower() not in request.lower() for word in _QUOTED.findall(line)):
        return False
    if judge(line) and not _LOSS.search(request):
        return False
    root = parse(line)
    said = [word.text for call in calls(root) for word in call.words[1:]] if root is not None else []
    return max(Counter(said).values(), default=0) < _STUTTER and (not _FILLERS & set(said) or bool(_SPEAKS.match(line)))


_NEAR = 4.0
"""How near an example is that asks for the same in nearly the same words."""

_ENOUGH = 1.0
_STUTTER = 4
_QUOTED = re.compile(r"['\"]([A-Za-z]{3,})['\"]")
_FILLERS = {
    "in",
    "the",
    "of",
    "that",
    "with",
    "is",
    "are",
    "to",
    "which",
    "from",
    "and",
    "this",
    "your",
    "you",
    "file",
    "files",
}
_SPEAKS = re.compile(r"echo|printf|git commit")
_LOSS = re.compile(
    r"\b(delet|remov|eras|kill|stop|end\b|wip|clear|overwrit|mov|renam|sudo|root|force|truncat|shred|format|reset|discard|"
    r"undo|sav|writ|into\b|chang|push|purg|clean|instal|restart|shut|reboot|merg|cop|edit|updat)",
    re.IGNORECASE,
)


def _built_like(line: str, near: Sequence[tuple[float, Pair]]) -> float:
    """How much of a line stands in an example, times how near that one is."""
    mine = set(line.split())
    return max(
        (
            nearness / _NEAR * len(mine & set(command.split())) / len(mine | set(command.split()))
            for nearness, (_, command) in near
        ),
        default=0.0,
    )


def _messages(request: str, place: Place, shown: Sequence[Pair]) -> list[dict[str, str]]:
    """The conversation in which the model gives a command."""
    programs = list(dict.fromkeys(command.split()[0] for _, command in reversed(shown)))
    programs += [word for word in re.findall(r"[a-z][\w.+-]+", request) if place.find(word)]
    system = template()[0].format(
        shell=place.shell, system=place.system, programs=", ".join(dict.fromkeys(programs[:_PROGRAMS]))
    )
    said = [{"role": "system", "content": system}]
    for asked, command in shown:
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": command}]
    return [*said, {"role": "user", "content": request}]


def _ask(
    engine: Engine,
    messages: list[dict[str, str]],
    temperature: float,
    seed: int,
    place: Place,
    step: Callable[[], None],
) -> str | None:
    """The command in one answer, which ends with its first line that is one."""
    options: Options = {"max_new_tokens": _MOST_TOKENS, "temperature": temperature, "seed": seed}
    session = engine.open(messages, **options)
    for _ in engine.prefill(session):
        step()
    while session.finish_reason is None:
        step()
        engine.step([session])
        line, _, rest = session.text.lstrip().partition("\n")
        if rest and "```" not in session.text and (found := place.command(line)) is not None:
            return found
    cut = session.finish_reason == "length" and session.text.count("```") < 2
    return None if cut else place.command(session.text)
