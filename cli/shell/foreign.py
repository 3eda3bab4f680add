"""What code in other languages does, found by the names in it, as it isn't parsed; and which variables choose programs.

Takes texts; gives yes or no. A text that changes something without such a name passes: a judge can be evaded.
"""

# ruff: noqa: E501  the expressions read as lists
from __future__ import annotations

import re

from longspec.cli.shell.bash_ast import Word

__all__ = ["changes", "is_tame", "redirected"]

_LANGUAGES = {
    "any": r"",
    "code": r"system|popen|exec|spawn|subprocess|rmtree|unlink|remove|rmdir|rename|truncate|shutil|fork|kill|eval|import\s+os"
    r"|import\s+pty|socket|requests|urllib|base64|writeFile|appendFile|\.write|write_|delete|child_process|File\.|`"
    r"|open\s*\(?\s*['\"]\s*\||open\s*\([^)]*['\"][rb]*[wax+]|open\b[^;]*>|__import__|getattr|chmod|chown|mkfs|getline|\bdo\s+['\"]"
    r"|FileUtils|%x\W|IO\.(p|bin)|\b(rm|cp|mv|copyFile|symlink|createWriteStream)(Sync)?\s*\(|import\s*\(|Deno\.\w*(run|Command)|Bun\.\$",
    "apple": r"do\s*shell\s*script|\b(delete|move|duplicate|make|empty|erase|quit|shut|restart|log\s+out|sleep|save|close|run|load"
    r"|keystroke|click|eject)\b|ObjC",
    "sql": r"\b(drop|delete|truncate|update|alter|replace|insert|grant|revoke|dropdatabase|deletemany|flushall|flushdb)\b"
    r"|\\(!|[oweig.]\b|copy|setenv|\.)|(^|\n)\s*(system|tee|source|pager)\b|into\s+(out|dump)file|\bprogram\s+'"
    r"|(^|\n)\s*\.(she?l?l?\b|sy|o|sav|ba?c|cl|exc|im|lo|res|rea|w\b)|\b(edit|writefile|load_extension|lo_export)\s*\(",
    "edit": r"(^|\n|\|)[\s%\d,$.+-]*(w|wq|x|xit|up\w*|sav\w*|r\s+!|!|e\s+!|norm\w*|so\w*|py\w*|lua)\b|!",
    "gdb": r"(^|\s)([!|]|(shell|make|python|py|pi|source|pipe|call|compile|dump|append|restore|kill|guile|save|script|platform)\b)"
    r"|\b(system|exec\w*)\s*\(",
}
_FINDS = {name: re.compile(pattern, re.IGNORECASE if name != "code" else 0) for name, pattern in _LANGUAGES.items()}


def changes(language: str, code: str) -> bool:
    """Whether code has a name in it that changes something, or starts programs."""
    return _FINDS[language].search(code) is not None


_CHOOSES = re.compile(r"\w*(PAGER|EDITOR|VISUAL|BROWSER|SHELL|ASKPASS|_RSH|_SSH|SSH_COMMAND|_DIFF)")
_LOADS = re.compile(
    r"LD_(PRELOAD|AUDIT|LIBRARY_PATH)|GCONV_PATH|DYLD_\w+|BASH_ENV|ENV|ZDOTDIR|PROMPT_COMMAND|PS4|IFS|SHELLOPTS|BASHOPTS"
    r"|PERL5(OPT|LIB|DB)|PYTHON(STARTUP|HOME)|RUBY(OPT|LIB)|NODE_OPTIONS|GIT_(CONFIG\w*|EXEC_PATH|TEMPLATE_DIR)"
    r"|TAR_OPTIONS|RIPGREP_CONFIG_PATH|FZF_DEFAULT_\w+|LESS(OPEN|CLOSE)|MAKEFLAGS|JAVA_TOOL_OPTIONS"
)
_TAME = set(
    """
    less more most cat bat batcat delta vi vim nvim view nano pico emacs emacsclient ed micro hx code gedit kate true
    false : ssh diff firefox chromium open xdg-open w3m lynx
    """.split()  # noqa: SIM905 - a list would be as many lines as words
)


def is_tame(value: Word) -> bool:
    """Whether this is one of the usual pagers and editors, with options at most, or nothing."""
    first = re.fullmatch(r"(?:/usr|/usr/local|/opt/homebrew)?(?:/bin/)?([\w:.-]*)(\s+-[\w=.-]+)*", value.text)
    return value.known and first is not None and (not first[1] or first[1] in _TAME)


def redirected(name: str, value: Word) -> bool:
    """Whether setting this variable may make other programs run. PATH may grow at its end."""
    if name == "PATH":
        return re.match(r"['\"]?\$(PATH\b|\{PATH\})", value.text) is None
    if name == "SHELL" and re.fullmatch(r"(/usr)?/bin/\w*sh", value.text):
        return False
    return bool(_LOADS.fullmatch(name)) or (_CHOOSES.fullmatch(name) is not None and not is_tame(value))
