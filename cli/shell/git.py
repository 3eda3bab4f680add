"""What git's subcommands destroy.

Takes the words after `git`; gives the harm as a phrase, or None. Whether a word is a file or a branch is told by its
form, as nothing is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from longspec.cli.shell.arguments import Harm, always, given, has, operands, saying, unless
from longspec.cli.shell.bash_ast import Word
from longspec.cli.shell.foreign import is_tame

__all__ = ["git"]

_FROM_SETTINGS = "takes a program from its settings, which can't be judged"


def git(words: Sequence[Word]) -> str | None:
    """The harm of a git command."""
    rest, at = list(words), 0
    while at < len(rest) and rest[at].text.startswith("-"):
        option, attached, setting = rest[at].text.partition("=")
        following = next(iter(rest[at + 1 :]), Word(""))
        if option in ("-c", "--config-env"):
            key, _, value = (setting if attached else following.text).partition("=")
            if _runs(key, Word(value, option == "-c" and following.known)):
                return _FROM_SETTINGS
        elif option == "--exec-path" and attached:
            return _FROM_SETTINGS
        takes_value = ("-C", "-c", "--config-env", "--git-dir", "--work-tree", "--namespace")
        at += 2 if option in takes_value and not attached else 1
    if at >= len(rest):
        return None
    if not rest[at].known:
        return "does what a variable says, which can't be judged"
    if any(word.text in ("--help", "-h") for word in rest[at + 1 : at + 2]):
        return None
    if any(word.text.startswith("ext::") for word in rest[at + 1 :]):
        return "runs a command as if it were another repository, which can't be judged"
    harm = _GIT.get(rest[at].text)
    return harm(rest[at + 1 :]) if harm else None


def _runs(key: str, value: Word) -> bool:
    """Whether a setting has git run a program: an alias, a pager, a helper."""
    if key.lower().startswith("alias."):
        return value.text.lstrip("'\"").startswith("!") or not value.known
    return _PROGRAM.search(key.lower()) is not None and not is_tame(value)


_PROGRAM = re.compile(
    r"^core\.(pager|editor|sshcommand|fsmonitor|hookspath|askpass|gitproxy)|helper|cmd|pager|editor|^diff\..*(command|textconv)|^filter\.|\.(program|driver|command)$"
)


def _clone(words: Sequence[Word]) -> str | None:
    for option, word in pairwise(words):
        key, _, value = word.text.partition("=")
        if option.text in ("-c", "--config") and _runs(key, Word(value, word.known)):
            return _FROM_SETTINGS
    return None


def _config(words: Sequence[Word]) -> str | None:
    said = [word for word in operands(words) if word.text not in ("set", "get", "unset", "list")]
    for key, value in pairwise(said):
        if "." in key.text and _runs(key.text, value):
            return _FROM_SETTINGS
    return None


def _push(words: Sequence[Word]) -> str | None:
    if has(words, "f", "d", "--force", "--force-with-lease", "--mirror", "--delete", "--prune"):
        return "overwrites or deletes what others have"
    return "overwrites or deletes what others have" if any(w.text[:1] in "+:" for w in operands(words)) else None


_NAMES = re.compile(
    r"(make|docker|jenkins|rake|gem|proc)file|readme|license|changelog|copying|contributing", re.IGNORECASE
)
_ENDS = re.compile(r"(?<!\d)(?:\.\d+)*\.[A-Za-z][A-Za-z0-9]{0,9}$|[A-Za-z_-]\w*\.[A-Za-z][A-Za-z0-9]{0,9}$")


def _checkout(words: Sequence[Word]) -> str | None:
    loses = "throws uncommitted changes away"
    if has(
        words, "f", "p", "B", "--force", "--patch", "--ours", "--theirs", "--pathspec-from-file", "--merge", exact=True
    ):
        return loses
    if any(word.text == "--" for word in words):
        return loses
    if has(words, "b", "t", "d", "--track", "--detach", "--orphan", exact=True):
        return None
    said = operands(words)
    return loses if len(said) > 1 or any(_is_path(word) for word in said) else None


def _is_path(word: Word) -> bool:
    """Whether a word looks like a file, not like a branch, a tag or a commit."""
    text = word.text
    version = re.search(r"(^|[/v-])\d+(\.(\d+|x))*$", text)
    return (
        not word.known
        or text.startswith(".")
        or text.endswith("/")
        or bool(set(text) & set("*?["))
        or (
            version is None
            and (_ENDS.search(text) is not None or _NAMES.fullmatch(text.rsplit("/", 1)[-1]) is not None)
        )
    )


def _restore(words: Sequence[Word]) -> str | None:
    staged = has(words, "S", "--staged", exact=True) and not has(words, "W", "--worktree")
    return None if staged else "throws uncommitted changes away"


_GIT: dict[str, Harm] = {
    "push": _push,
    "clean": unless("deletes files that git doesn't know", "n", "--dry-run"),
    "reset": given("throws uncommitted changes away", "--hard", "--merge", "--keep"),
    "checkout": _checkout,
    "checkout-index": given("replaces files", "f", "--force"),
    "config": _config,
    "clone": _clone,
    "restore": _restore,
    "switch": given("throws uncommitted changes away", "f", "C", "--force", "--discard-changes", "--force-create"),
    "branch": given("deletes or replaces a branch", "D", "d", "M", "C", "f", "--delete", "--force"),
    "tag": given("deletes or replaces a tag", "d", "f", "--delete", "--force"),
    "stash": saying("throws stashed changes away", "drop", "clear"),
    "rm": unless("deletes files", "n", "--dry-run", "--cached"),
    "mv": given("may replace files", "f", "--force"),
    "reflog": saying("deletes what could bring commits back", "expire", "delete"),
    "gc": given("deletes what could bring commits back", "--prune", "--aggressive"),
    "prune": unless("deletes what could bring commits back", "n", "--dry-run"),
    "filter-branch": always("rewrites history"),
    "filter-repo": always("rewrites history"),
    "update-ref": given("deletes a reference", "d"),
    "remote": saying("deletes a remote", "remove", "rm", "prune"),
    "worktree": saying("deletes a working tree", "remove", "prune"),
    "submodule": saying("throws a submodule's changes away", "deinit"),
    "apply": unless("changes files", "--check", "--stat", "--numstat", "--summary"),
    "rebase": given("runs commands between commits, which can't be judged", "x", "--exec"),
    "bisect": saying("runs a command, which can't be judged", "run"),
}
