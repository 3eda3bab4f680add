"""Column names in a request replaced by numbers, where a CSV file in the folder has them in its first line.

Takes a request and a folder; gives the request with `column 2` for `age`. Reads only the first line of a file that
the request names.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["numbered"]

_MOST_NBYTES = 4096


def numbered(request: str, folder: Path) -> str:
    """The request with numbers for column names; unchanged where no such file is in the folder."""
    for name in re.findall(r"[\w./~-]+\.csv\b", request):
        said, _, rest = request.partition(name)
        for number, title in enumerate(_titles(folder / name), 1):
            found = re.compile(rf"\b(?:the )?{_some(title)}\b(?: column)?", re.IGNORECASE)
            said, rest = (found.sub(f"column {number}", part, count=1) for part in (said, rest))
        request = said + name + rest
    return request


def _titles(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            line = file.readline(_MOST_NBYTES).decode(errors="replace")
    except (OSError, ValueError):
        return []
    titles = [title.strip(" \"'\r\n") for title in line.split(",")]
    return titles if len(titles) > 1 and all(re.fullmatch(r"[A-Za-z][\w -]*", title) for title in titles) else []


def _some(title: str) -> str:
    """A pattern of a column's title or its plural."""
    stem = re.escape(title)
    return rf"(?:{stem}|{stem}s|{stem[:-1]}ies)" if title.endswith("y") else rf"(?:{stem}|{stem}s)"
