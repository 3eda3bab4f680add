"""What mkdocs builds the site of beside docs/*.md: pages that are made from the code or lie at the repository's top.

A page that nobody put into mkdocs.yml's list is added to it, so that every page of docs/ is found.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from reference import to_markdown  # noqa: E402

import longspec  # noqa: E402

FENCE = re.compile(r"^( *```(?:sh|python)) (?:no-run|full): .*$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Name in the list what the list lacks."""
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    more = [path.name for path in sorted(HERE.glob("*.md")) if path.name not in named]
    if more:
        config.nav.insert(-1, {"More": list(more)})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file in docs/ holds."""
    made = {
        "index.md": at_top("README.md"),
        "changes.md": at_top("CHANGELOG.md"),
        "contributing.md": at_top("CONTRIBUTING.md"),
        "reference.md": to_markdown(),
        "api.md": api(),
        "modules.md": modules(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Blocks without what they say to the tests."""
    return FENCE.sub(r"\1", markdown)


def at_top(name: str) -> str:
    """A page from above docs/, its links as they lead from within."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\(benchmarks\)", "](benchmarks/README.md)", text)
    for there, here in (("CHANGELOG.md", "changes.md"), ("CONTRIBUTING.md", "contributing.md")):
        text = text.replace(f"]({there})", f"]({here})")
    return re.sub(r"\[([^\]]*)\]\(LICENSE\)", r"\1", text)


def api() -> str:
    """The public names, each with its docstrings."""
    lines = ["# From Python", "", "Everything that `from longspec import ...` gives, from the docstrings.", ""]
    lines += [f"::: longspec.{home}.{name}" for name, home in public()]
    lines += [
        "",
        "## Options of one text",
        "",
        "What `generate`, `stream`, `generate_many` and `open` take beside the prompt:",
    ]
    return "\n".join([*lines, "", "```text", *options(), "```", ""])


def options() -> list[str]:
    """The lines of `Options` and of its sampling part, whose comments say what each is."""
    lines = []
    for path, name in (("engine/options.py", "Options"), ("sampling/parameters.py", "SamplingOptions")):
        source = (ROOT / "longspec" / path).read_text(encoding="utf-8")
        (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
        fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
        lines += [line.strip() for line in source.splitlines()[fields[0].lineno - 1 : fields[-1].end_lineno]]
    return lines


def modules() -> str:
    """Every module with the first sentence of its docstring."""
    lines = ["# Every module", "", "What each module is, from its own first lines.", ""]
    for folder in ("longspec", "cache", "cli", "prompts"):
        for path in sorted(
            (ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path)
        ):
            first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            if path.name == "__init__.py":
                lines += ["", f"## {path.parent.relative_to(ROOT).as_posix()}", "", " ".join(first.split()), ""]
            else:
                lines.append(f"- `{path.name}`: {' '.join(first.split())}")
    return "\n".join([*lines, ""])


def public() -> list[tuple[str, str]]:
    """What one uses comes first, then the values it gives, then what can go wrong."""
    errors = [entry for entry in longspec._HOMES.items() if entry[1] == "errors"]
    others = [entry for entry in longspec._HOMES.items() if entry[1] != "errors"]
    return sorted(others, key=lambda entry: (entry[1] == "types", entry[0] != "Engine", entry[0])) + errors
