"""Warnings about destructive shell lines, by static analysis: nothing is run, nothing is looked up.

Takes a line; gives its dangers as phrases, none for a harmless line. Commands inside substitutions, pipelines, `sh
-c`, `env`, `xargs`, `find -exec` and the like are judged as if they stood alone. A command that can't be known (a
variable) is reported as such. Knows no model and no files: a redirection over any file counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from longspec.cli.shell.bash_ast import Call, Word, calls, functions, parse
from longspec.cli.shell.harms import HARMS, has, is_system, is_void

__all__ = ["judge", "programs"]

_DEPTH = 8
_SHELLS = {"sh", "bash", "zsh", "dash", "ksh", "mksh", "ash", "fish", "csh", "tcsh", "rbash", "pwsh", "xonsh", "nu"}
_INTERPRETERS = {"python", "python2", "python3", "perl", "ruby", "node", "nodejs", "php", "lua", "osascript", "pypy3"}
_FETCHERS = {"curl", "wget", "fetch", "aria2c", "http", "https", "nc", "ncat", "netcat", "ftp", "scp", "ssh", "lynx"}

# Programs that run the rest of their arguments as a command: the letters of options that take a value, and the number
# of operands before the command.
_WRAPPERS: dict[str, tuple[str, int]] = {
    name: how
    for names, how in {
        "nohup setsid builtin command coproc pkexec run0 unbuffer noglob nocorrect not and or busybox toybox "
        "linux32 linux64 valgrind gdb hyperfine firejail bwrap dbus-run-session prlimit ts chronic ifne "
        "direnv torsocks rlwrap fakeroot -": ("", 0),
        "time": ("fo", 0),
        "nice": ("n", 0),
        "ionice": ("cn", 0),
        "timeout gtimeout": ("sk", 1),
        "stdbuf": ("ioe", 0),
        "exec": ("a", 0),
        "env doas": ("uC", 0),
        "sudo": ("ugpCThrtUD", 0),
        "gosu taskset chroot setarch faketime": ("", 1),
        "chrt": ("TPD", 1),
        "caffeinate": ("tw", 0),
        "xargs": ("aEIdLnPsJRS", 0),
        "ltrace": ("eopsu", 0),
        "strace": ("eopsuEPSOabXI", 0),
        "perf": ("eo", 1),
        "xvfb-run": ("nes", 0),
        "proxychains": ("f", 0),
    }.items()
    for name in names.split()
}

# Programs that run some of their arguments, as words or as a line of shell: every argument is tried as both.
_RUNNERS = set(
    """
    ssh watch parallel entr flock script tmux screen systemd-run nsenter unshare su runuser docker podman kubectl
    expect at trap alias eval git vagrant lxc distrobox toolbox adb mosh xterm konsole gnome-terminal npx make just
    poetry pipenv uv tar fd fdfind rg sem moreutils-parallel inotifywait watchexec nodemon cpulimit start-stop-daemon
    """.split()  # noqa: SIM905 - a list would be as many lines as words
)

_STEERING = set(
    """
    LD_PRELOAD LD_AUDIT LD_LIBRARY_PATH BASH_ENV ENV PROMPT_COMMAND PS4 GIT_SSH_COMMAND GIT_EXTERNAL_DIFF
    DYLD_INSERT_LIBRARIES PERL5OPT PYTHONSTARTUP NODE_OPTIONS IFS
    """.split()  # noqa: SIM905 - a list would be as many lines as words
)


def judge(line: str) -> tuple[str, ...]:
    """The dangers of a line, without duplicates; empty for a harmless one."""
    try:
        return tuple(dict.fromkeys(harm for harm in _line(line, 0) if isinstance(harm, str)))
    except RecursionError:
        return ("is nested too deeply to be judged",)


def programs(line: str) -> Iterator[Word]:
    """The first word of every command in a line, also of those after `env`, `xargs`, `find -exec` and the like."""
    with suppress(RecursionError):
        yield from (word for word in _line(line, 0) if isinstance(word, Word))


def _line(line: str, depth: int) -> Iterator[str | Word]:
    if depth > _DEPTH:
        yield "is nested too deeply to be judged"
        return
    if not line.strip():
        return
    root = parse(line)
    if root is None:
        if not all(each.lstrip().startswith("#") for each in line.splitlines() if each.strip()):
            yield "isn't shell that can be read, so it can't be judged"
        return
    defined = functions(root)
    for call in calls(root):
        yield from _call(call, depth)
        if call.words and call.words[0].text in defined and _repeats(line, call.words[0].text):
            yield f"{call.words[0].text} starts itself again and again"


def _repeats(line: str, name: str) -> bool:
    """Whether a function calls itself (a fork bomb): its name occurs in its definition, in a call, and a third time."""
    return len(re.findall(rf"(?<![\w:]){re.escape(name)}(?![\w:])", line)) > 2


def _call(call: Call, depth: int) -> Iterator[str | Word]:
    for redirect in call.redirects:
        target = redirect.target
        if target is None or ">" not in redirect.operator or is_void(target):
            continue
        if redirect.operator == ">&" and re.fullmatch(r"\d+-?|-", target.text):
            continue
        if target.text.startswith(">("):
            continue
        if is_system(target):
            yield f"{redirect.operator} {target.text} writes to a device or a file of the system"
        elif redirect.operator not in (">>", "&>>"):
            yield f"{redirect.operator} {target.text} replaces what that file holds"
    for name, value in call.assigned:
        if name in _STEERING:
            yield f"{name}={value.text} changes which programs run, which can't be judged"
    if call.words:
        yield from _command(call.words, call, depth)


def _command(words: Sequence[Word], call: Call, depth: int) -> Iterator[str | Word]:
    """The dangers of one command, and of the commands that it runs."""
    if not words:
        return
    if depth > _DEPTH:
        yield "is nested too deeply to be judged"
        return
    first, rest = words[0], words[1:]
    yield first
    if not first.known or first.text in ("", "{}") or first.text[:1] in "=-":
        yield f"{first.text or 'an empty word'} is the command, which can't be judged"
        return
    name = first.text.rsplit("/", 1)[-1]
    if first.text.startswith("/dev/") or name.startswith("mkfs"):
        yield f"{name} changes a disk or its file systems"
        return
    if (harm := HARMS.get(name)) is not None and (said := harm(rest)):
        yield said if said.startswith(name) else f"{name} {said}"
    for inside in _starts(name, rest):
        yield from _command(inside, call, depth + 1)
    if name in _SHELLS or re.fullmatch(r"python[\d.]*|perl[\d.]*", name) or name in _INTERPRETERS:
        yield from _interpreter(name, rest, call, depth)
    elif name in ("source", "."):
        yield from _interpreter(name, rest[:1], call, depth)
    elif name in ("find", "gfind", "fd", "fdfind"):
        yield from _find(name, rest, call, depth)
    elif name == "env":
        yield from _env(rest, depth)
    if name in _RUNNERS:
        yield from _runner(name, rest, call, depth)


def _starts(name: str, words: Sequence[Word]) -> Iterator[Sequence[Word]]:
    """Candidates for the command that a wrapper runs: after its options, whose values can be mistaken for it."""
    if name not in _WRAPPERS or (name == "command" and has(words, "v", "V")):
        return
    valued, skipped = _WRAPPERS[name]
    at = 0
    while at < len(words):
        text = words[at].text
        if text == "--":
            at += 1
            break
        if text.startswith("--") and "=" not in text and at + 2 < len(words):
            yield words[at + 2 :]  # in case the next word is the option's value
        elif name in ("env", "sudo", "doas") and re.match(r"\w+=", text):
            pass
        elif not text.startswith("-") or text == "-":
            break
        elif re.fullmatch(rf"-[A-Za-z]*[{valued or '-'}]", text):
            at += 1
        at += 1
    found = words[at + skipped :]
    if name == "xargs":
        if not found:
            return
        replaced = next((w.text[2:] or words[i + 1].text for i, w in enumerate(words[:at]) if w.text[:2] == "-I"), None)
        if replaced and replaced in found[0].text:
            yield (Word(found[0].text, known=False),)
            return
        found = (*found, Word("what xargs reads", known=False))
    yield found


def _interpreter(name: str, words: Sequence[Word], call: Call, depth: int) -> Iterator[str | Word]:
    """The dangers of code that a shell or an interpreter runs: an argument, a file from a
    substitution, or its input.
    """
    shell = name in _SHELLS
    for at, word in enumerate(words):
        text = word.text
        if text.startswith(("<(", "/dev/stdin", "/dev/fd", "/proc/self/fd")) or (not word.known and "<(" in text):
            yield f"{name} runs what another command writes, which can't be judged"
            return
        if shell and re.match(r"-[a-zA-Z]*c", text) and not text.startswith("--"):
            code = next((each for each in words[at + 1 :] if not each.text.startswith(("-", "+"))), None)
            yield from _code(name, code, depth)
            return
        if not shell and re.match(r"-[a-zA-Z]*[ceErm]|--eval|--version|-V", text):
            return
        if not text.startswith(("-", "+")) or text == "-":
            if text == "-":
                break
            if not word.known and shell:
                yield f"{name} runs {text}, which can't be judged"
            return
        if text in ("--version", "--help", "-n"):
            return
    if name in ("source", "."):
        return
    for redirect in call.redirects:
        if redirect.operator == "<<<":
            yield from _code(name, redirect.target, depth) if shell else [f"{name} runs code that can't be judged"]
        elif redirect.operator.startswith("<<"):
            yield f"{name} runs a document, which can't be judged"
        elif redirect.operator == "<" and redirect.target is not None and not redirect.target.known:
            yield f"{name} runs what another command writes, which can't be judged"
    if call.fed:
        fetched = any(each.words and each.words[0].text.rsplit("/", 1)[-1] in _FETCHERS for each in call.feeder)
        what = "what comes from the network" if fetched else "what another command writes"
        yield f"{name} runs {what}, which can't be judged"


def _code(name: str, code: Word | None, depth: int) -> Iterator[str | Word]:
    if code is None:
        yield f"{name} runs a text that isn't there, which can't be judged"
    elif not code.known:
        yield f"{name} runs {code.text}, which can't be judged"
        yield from _line(code.text[1:-1] if code.text.startswith('"') else code.text, depth + 1)
    else:
        yield from _line(code.text, depth + 1)


def _find(name: str, words: Sequence[Word], call: Call, depth: int) -> Iterator[str | Word]:
    """The dangers of the commands that `find` runs for each file, up to `;` or `+`."""
    flags = ("-exec", "-execdir", "-ok", "-okdir") if (name.endswith("find") and name[0] != "f") or name == "find" else (  # noqa: E501
        "-x", "-X", "--exec", "--exec-batch")  # fmt: skip
    for at, word in enumerate(words):
        if word.text in flags:
            end = next((i for i in range(at + 1, len(words)) if words[i].text in (";", "+")), len(words))
            yield from _command(words[at + 1 : end], call, depth + 1)


def _env(words: Sequence[Word], depth: int) -> Iterator[str | Word]:
    """The dangers of `env`: `env -S` splits a string into a command; `env NAME=value` may change a program's
    behaviour.
    """
    for at, word in enumerate(words):
        if (match := re.match(r"(-[a-zA-Z0-9]*S|--split-string=?)(.*)", word.text, re.DOTALL)) is not None:
            line = " ".join([match[2], *(each.text for each in words[at + 1 :])])
            yield from _line(line, depth + 1)
        if word.text.split("=")[0] in _STEERING and "=" in word.text:
            yield f"{word.text} changes which programs run, which can't be judged"


def _runner(name: str, words: Sequence[Word], call: Call, depth: int) -> Iterator[str | Word]:
    """The dangers of arguments that are commands: each one that is a program's name, with those after it, and each
    one of several words, as a line.
    """
    if name == "eval" or (name == "trap" and words and not has(words, "l", "p")):
        code = words if name == "eval" else words[:1]
        if any(not word.known for word in code):
            yield f"{name} runs {' '.join(word.text for word in code)}, which can't be judged"
        yield from _line(" ".join(word.text for word in code), depth + 1)
        return
    for at, word in enumerate(words):
        text = word.text.partition("=")[2] if re.match(r"--?\w[\w-]*=|\w+=", word.text) else word.text
        if name == "git" and not text.startswith("!") and at + 1 < len(words) and "foreach" not in _texts(words[:at]):
            continue
        text = text.removeprefix("!")
        named = text.rsplit("/", 1)[-1]
        if word.known and (named in HARMS or named in _SHELLS or named in _WRAPPERS) and name != "git":
            yield from _command((Word(named), *words[at + 1 :]), call, depth + 1)
        elif re.search(r"\s|[;|&<>$`]", text) and not text.startswith(("<(", '"$', "$")):
            lines = text[1:-1] if not word.known and text[:1] == '"' else text
            if parse(lines) is not None:
                yield from _line(lines, depth + 1)


def _texts(words: Sequence[Word]) -> list[str]:
    return [word.text for word in words]
