"""Warnings about destructive shell lines, by static analysis: nothing is run, nothing is looked up.

Takes a line; gives its dangers as phrases, none for a harmless line. Commands inside substitutions, pipelines,
here-documents, `sh -c`, `env`, `xargs`, `find -exec` and the like (usage.toml) are judged as if they stood alone. A
command that can't be known (a variable) is reported as such. Knows no model and no files: a redirection over any file
counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from longspec.cli.io.progress import printable
from longspec.cli.shell.arguments import is_system, is_void
from longspec.cli.shell.bash_ast import Call, Redirect, Word, calls, functions, parse
from longspec.cli.shell.foreign import changes, redirected
from longspec.cli.shell.harms import HARMS
from longspec.cli.shell.quoting import continued, readable, unescaped
from longspec.cli.shell.usage import Part, language, parts, plain_name

__all__ = ["judge", "programs"]

_DEPTH = 8
_FETCHERS = {"curl", "wget", "fetch", "aria2c", "http", "https", "nc", "ncat", "netcat", "ftp", "scp", "ssh", "lynx"}
_HELP = ("--help", "--version")
_EXECUTES = {
    **dict.fromkeys(("find", "gfind"), ("-exec", "-execdir", "-ok", "-okdir")),
    **dict.fromkeys(("fd", "fdfind"), ("-x", "-X", "--exec", "--exec-batch")),
}
_UNSEEN = "which can't be judged"

_RUNS = re.compile(
    r"(?i)^\w*command[= ]\s*(.*)|^exec=(.*)|(?:execute|become|reload|transform)[\w-]*\((.*)\)", re.DOTALL
)
"""A setting of ssh, tar or fzf that has a command in it."""

Found = Iterator[str | Word]
"""Dangers as phrases, and the first words of the commands that are run on this machine."""


def judge(line: str) -> tuple[str, ...]:
    """The dangers of a line, without duplicates and control characters; empty for a harmless one."""
    try:
        return tuple(dict.fromkeys(printable(harm) for harm in _line(line, 0) if isinstance(harm, str)))
    except RecursionError:
        return ("is nested too deeply to be judged",)


def programs(line: str) -> Iterator[Word]:
    """The first word of every command in a line, also of those after `env`, `xargs`, `find -exec` and the like."""
    with suppress(RecursionError):
        yield from (word for word in _line(line, 0) if isinstance(word, Word))


def _line(line: str, depth: int, outer: Call | None = None) -> Found:
    """outer: the command that runs the line; what feeds that is read by the commands in it."""
    if depth > _DEPTH:
        yield "is nested too deeply to be judged"
        return
    # Also as it stands: a text may look continued where it isn't, in a quoted document.
    for text in dict.fromkeys((line, continued(line), unescaped(continued(line)))):
        yield from _parsed(text, depth, outer)


def _parsed(line: str, depth: int, outer: Call | None) -> Found:
    if not line.strip():
        return
    if line.strip() == "{}":  # of find and xargs
        yield f"{{}} is the command, {_UNSEEN}"
    root = parse(readable(line))
    if root is None:
        if not all(each.lstrip().startswith("#") for each in line.splitlines() if each.strip()):
            yield f"isn't shell that can be read, {_UNSEEN}"
        return
    defined = functions(root)
    for call in calls(root):
        if outer is not None and not call.fed:
            around = (*outer.around, *outer.redirects, *call.around)
            call = replace(call, fed=outer.fed, feeder=outer.feeder, around=around)
        yield from _call(call, depth)
        if call.words and call.words[0].text in defined and _repeats(line, call.words[0].text):
            yield f"{call.words[0].text} starts itself again and again"


def _repeats(line: str, name: str) -> bool:
    """Whether a function calls itself (a fork bomb): its name occurs in its definition, in a call, and a third time."""
    return len(re.findall(rf"(?<![\w:]){re.escape(name)}(?![\w:])", line)) > 2


def _call(call: Call, depth: int) -> Found:
    for redirect in call.redirects:
        if redirect.target is not None and ">" in redirect.operator and not is_void(redirect.target):
            yield from _written(redirect, redirect.target)
    for name, value in call.assigned:
        yield from _assigned(name, value, depth)
    if call.words:
        yield from _command(call.words, call, depth)


def _written(redirect: Redirect, target: Word) -> Found:
    """The danger of a redirection to a file."""
    if (redirect.operator == ">&" and re.fullmatch(r"\d+-?|-", target.text)) or target.text.startswith(">("):
        return
    if is_system(target):
        yield f"{redirect.operator} {target.text} writes to a device or a file of the system"
    elif redirect.operator not in (">>", "&>>"):
        yield f"{redirect.operator} {target.text} replaces what that file holds"


def _assigned(name: str, value: Word, depth: int) -> Found:
    """The dangers of a variable that other programs take a program from."""
    if redirected(name, value):
        yield f"{name}={value.text} changes which programs run, {_UNSEEN}"
        yield from _remote(_line(value.text, depth + 1)) if name != "PATH" else ()


def _remote(found: Found) -> Found:
    """The dangers alone: the programs needn't be on this machine."""
    return (harm for harm in found if isinstance(harm, str))


def _command(words: Sequence[Word], call: Call, depth: int) -> Found:
    """The dangers of one command, and of the commands that it runs."""
    if not words:
        return
    if depth > _DEPTH:
        yield "is nested too deeply to be judged"
        return
    first, rest = words[0], words[1:]
    yield first
    if not first.known or first.text in ("", "{}") or first.text[:1] in "=-":
        yield f"{first.text or 'an empty word'} is the command, {_UNSEEN}"
        return
    name = plain_name(first.text)
    if rest and rest[0].text in _HELP and rest[0].known:
        return
    if first.text.startswith("/dev/") or name.startswith("mkfs"):
        yield f"{name} changes a disk or its file systems"
        return
    if (harm := HARMS.get(name)) is not None and (said := harm(rest)):
        yield said if said.startswith(name) else f"{name} {said}"
    if name in ("env", "sudo", "doas"):
        for word in rest:
            if (match := re.match(r"(\w+)=(.*)", word.text, re.DOTALL)) is not None:
                yield from _assigned(match[1], Word(match[2], word.known), depth)
    if name in _EXECUTES:
        yield from _executed(name, rest, call, depth)
    if name == "command" and any(re.match(r"-\w*[vV]", word.text) for word in rest[:1]):
        return
    if name in ("sh", "bash", "zsh", "dash", "ksh") and rest and rest[0].text == "-n":
        return
    whole, found = parts(name, rest)
    for part in found:
        yield from _part(whole, part, rest, call, depth)


def _part(name: str, part: Part, words: Sequence[Word], call: Call, depth: int) -> Found:
    """The dangers of some of a program's arguments. words: all of them."""
    text = part.words[0].text if part.words else ""
    match part.role:
        case "+":
            inside = _filled(words, part.words) if name == "xargs" else part.words
            yield from _command(inside, call, depth + 1)
        case "?":
            yield from _remote(_command(part.words, call, depth + 1))
        case "*":
            if name == "eval" and not all(word.known for word in part.words):
                yield f"eval runs {' '.join(word.text for word in part.words)}, {_UNSEEN}"
            line = " ".join(_unquoted(word) for word in part.words)
            found = _line(line, depth + 1, call)
            yield from found if name == "eval" else _remote(found)
        case "!":
            yield from _code(name, part.words, call, depth)
        case "=":
            if setting := _RUNS.search(text):
                yield from _remote(_line(next(filter(None, setting.groups()), ""), depth + 1))
        case "%":
            if not part.words[0].known or changes(language(name) or "", text):
                yield f"{name} runs code that may change files or start programs, {_UNSEEN}"
        case "." if text == "{}" or "://" in text or _is_stream(part.words[0]) or not part.words[0].known:
            yield f"{name} runs {'what another command writes' if _is_stream(part.words[0]) else text}, {_UNSEEN}"
        case ">" if not is_void(part.words[0]):
            yield f"{name} replaces what {text} holds"
        case "<":
            yield from _input(name, call, depth)


def _unquoted(word: Word) -> str:
    """A word as a part of a line that another shell reads."""
    return word.text[1:-1] if not word.known and word.text[:1] == '"' == word.text[-1:] else word.text


def _is_stream(word: Word) -> bool:
    return word.text.startswith(("<(", "/dev/fd", "/dev/stdin", "/proc/self/fd")) or (
        not word.known and "<(" in word.text
    )


def _filled(words: Sequence[Word], run: Sequence[Word]) -> tuple[Word, ...]:
    """The command that xargs runs, with a placeholder of any name as `{}`, and with what is read."""
    options = [word.text for word in words[: len(words) - len(run)]]
    for at, option in enumerate(options):
        match = re.fullmatch(r"-\w*?[IJ](.*)|--replace=(.*)|-i(.+)", option)
        if match and (mark := match[1] or match[2] or match[3] or "".join(options[at + 1 : at + 2])):
            run = [Word(word.text.replace(mark, "{}"), word.known) for word in run]
    return (*run, Word("what xargs reads", known=False))


def _code(name: str, code: Sequence[Word], call: Call, depth: int) -> Found:
    """The dangers of a text that a program runs as shell."""
    if not code:
        yield f"{name} runs a text that isn't there, {_UNSEEN}"
        return
    if not code[0].known:
        yield f"{name} runs {code[0].text}, {_UNSEEN}"
    if code[0].text != "-":  # `trap -`
        found = _line(_unquoted(code[0]), depth + 1, call)
        yield from found if language(name) == "" else _remote(found)


def _input(name: str, call: Call, depth: int) -> Found:
    """The dangers of code that a program reads from its input: here-documents, here-strings, `echo`, other pipes."""
    for redirect in (*call.around, *call.redirects):
        if redirect.target is not None and redirect.operator.startswith("<<"):
            yield from _read(name, redirect.target, depth)
        elif redirect.operator == "<" and redirect.target is not None and not redirect.target.known:
            yield f"{name} runs what another command writes, {_UNSEEN}"
    if not call.fed:
        return
    last = call.feeder[-1] if len(call.feeder) == 1 else Call()
    documents = [each.target for each in last.redirects if each.operator.startswith("<<") and each.target is not None]
    said = [word.text for word in last.words]
    if said[:1] == ["echo"] and all(word.known and "\\" not in word.text for word in last.words):
        yield from _read(name, Word(" ".join(said[1:])), depth)
    elif said == ["cat"] and documents:
        yield from _read(name, documents[-1], depth)
    else:
        fetched = any(each.words and each.words[0].text.rsplit("/", 1)[-1] in _FETCHERS for each in call.feeder)
        what = "what comes from the network" if fetched else "what another command writes"
        yield f"{name} runs {what}, {_UNSEEN}"


def _read(name: str, code: Word, depth: int) -> Found:
    written = language(name) or ""
    if not code.known:
        yield f"{name} runs a text with expansions, {_UNSEEN}"
    if not written:
        yield from _remote(_line(_unquoted(code), depth + 1))
    elif changes(written, code.text):
        yield f"{name} runs code that may change files or start programs, {_UNSEEN}"


def _executed(name: str, words: Sequence[Word], call: Call, depth: int) -> Found:
    """The dangers of the commands that `find` runs for each file, up to `;` or `+`."""
    for at, word in enumerate(words):
        if word.text in _EXECUTES[name]:
            end = next((i for i in range(at + 1, len(words)) if words[i].text in (";", "+")), len(words))
            yield from _command(words[at + 1 : end], call, depth + 1)
