"""The manual pages, `man longspec` and `man longspec-run`, made of the command's own tree.

    python docs/man.py            # writes docs/man/*.1, which the wheel installs below share/man/man1

They are committed, since a wheel is built where nothing of longspec can be imported; tests/project/test_man.py
holds that they say what the command says.
"""

from __future__ import annotations

import re

from reference import ROOT, Page, pages

from longspec import __version__

FOLDER = ROOT / "docs" / "man"
FILES = [
    ("~/.config/longspec/config.toml", "Settings; $XDG_CONFIG_HOME in the place of ~/.config where it is set."),
    ("~/.config/longspec/prompts", "Templates of your own."),
    ("~/.cache/longspec", "Pulled models, what passes cost on this machine, what --remember kept ($XDG_CACHE_HOME)."),
]
ENVIRONMENT = [
    ("LONGSPEC_*", "Every option that config.toml may set, such as LONGSPEC_MAX_NEW_TOKENS for --max-new-tokens."),
    ("LONGSPEC_COMPILER", "The C compiler for longspec's kernels; none turns them off."),
    ("LONGSPEC_ISA", "Instructions for the kernels, fewer than the processor has: amx, avx512, avx2, neon, scalar."),
    ("LONGSPEC_DEBUG", "1 shows the traceback above an error."),
    ("HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, XDG_CACHE_HOME, NO_COLOR", "What they mean everywhere."),
]


def manual() -> dict[str, str]:
    """File names and what they hold."""
    every = pages()
    codes = exit_codes()
    return {f"{page.name}.1": _page(page, every, codes) for page in every}


def exit_codes() -> list[tuple[str, str]]:
    """From the table in docs/cli.md."""
    section = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## Exit codes\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", section, re.MULTILINE)
    return [(code, meaning.replace("\\|", "|").replace("`", "")) for code, meaning in rows]


def _page(page: Page, every: list[Page], codes: list[tuple[str, str]]) -> str:
    top = page.words == "longspec"
    lines = [
        '.\\" Made by docs/man.py from the command itself.',
        f'.TH {_quoted(page.name.upper())} 1 "" {_quoted(f"longspec {__version__}")} {_quoted("longspec")}',
        ".SH NAME",
        f"{_text(page.name)} \\- {_text(_lowered(page.summary))}",
        ".SH SYNOPSIS",
        ".nf",
        _text(page.usage),
        ".fi",
        ".SH DESCRIPTION",
    ]
    for paragraph in [page.summary, *page.more]:
        lines += [".PP", _text(paragraph)]
    if page.commands:
        lines.append(".SH COMMANDS")
        for name, summary in page.commands:
            lines += [".TP", f".B {_text(name)}", f"{_text(summary)} See {_reference(f'{page.name}-{name}')}"]
    for heading, options in page.options.items():
        lines.append(".SH OPTIONS" if heading == "Other" else f".SH {_text(heading.upper())}")
        for written, text in options:
            lines += [".TP", f".B {_text(written)}", _text(text)]
    for note in page.notes:
        head, *rest = note.split("\n")
        if rest and head.rstrip(":") in ("Example", "Examples"):
            lines.append(f".SH {head.rstrip(':').upper()}")
        else:
            lines.append(".PP")
            rest = [head, *rest]
        lines += [".nf", *(_text(line) for line in rest), ".fi"]
    if top:
        lines += [".SH EXIT STATUS", *_list(codes), ".SH ENVIRONMENT", *_list(ENVIRONMENT), ".SH FILES", *_list(FILES)]
    others = [other.name for other in every if other is not page and (top or _near(other, page))]
    lines += [".SH SEE ALSO", " ".join(_reference(name, "," if name != others[-1] else ".") for name in others)]
    return "\n".join(lines) + "\n"


def _near(other: Page, page: Page) -> bool:
    """The page above, and the members of a group."""
    return page.words.rpartition(" ")[0] == other.words or other.words.rpartition(" ")[0] == page.words


def _list(entries: list[tuple[str, str]]) -> list[str]:
    return [line for name, text in entries for line in (".TP", f".B {_text(name)}", _text(text))]


def _reference(name: str, end: str = ".") -> str:
    return f"\\fB{_text(name)}\\fR(1){end}"


def _lowered(text: str) -> str:
    """NAME wants a phrase: no capital, no full stop."""
    return text[:1].lower() + text[1:].rstrip(".")


def _text(text: str) -> str:
    """What roff takes for its own stands for itself; a hyphen stays one that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "").replace("~", "\\(ti").replace("^", "\\(ha")
    return f"\\&{text}" if text[:1] in (".", "'") else text


def _quoted(text: str) -> str:
    return f'"{_text(text)}"'


def main() -> None:
    """Write them, and take away those whose command is gone."""
    FOLDER.mkdir(exist_ok=True)
    made = manual()
    for path in FOLDER.glob("*.1"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
