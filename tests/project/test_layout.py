"""The shape of the repository: the five folders, the links, the direction of imports, sizes, the cost of an import."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import longspec

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["cache", "cli", "longspec", "prompts", "tests"]
LINKED = ["cache", "cli", "prompts"]  # install as longspec.NAME, and are linked so that the checkout reads the same

# A room imports from rooms of the lines above its own and, within a line, from itself alone.
ROOMS = [
    ["errors", "methods", "prompts"],
    ["calls"],
    ["types"],
    ["machine"],
    ["kernels"],
    ["sampling"],
    ["text"],
    ["cache", "constraints"],
    ["attention"],
    ["model"],
    ["heads", "semantic"],
    ["drafters"],
    ["memory"],
    ["control"],
    ["engine"],
    ["requests"],
    ["batch", "bench", "server", "training"],
    ["ray"],
    ["cli"],
]
STAGE_OF = {name: number for number, names in enumerate(ROOMS) for name in names}
NARROWER = {"text": {"calls", "errors", "machine", "sampling"}}  # may import less than its line would allow


def sources() -> list[Path]:
    """The package's files at their real places, each once."""
    found = {path for folder in ["longspec", *LINKED] for path in (ROOT / folder).rglob("*.py")}
    return sorted(path for path in found if path.resolve() == path)  # not through a link


def module_of(path: Path) -> str:
    """cache/dense.py is longspec.cache.dense."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "longspec":
        parts = ("longspec", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """What has a place in ROOMS: longspec.cache.dense belongs to cache; longspec itself is ''."""
    return module.removeprefix("longspec").removeprefix(".").split(".")[0]


def imported_units(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and unit of each import of this package in a file, the late ones and those for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "longspec":
                    yield node.lineno, unit_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write longspec.{node.module or ''}"
            if node.module == "longspec":
                for alias in node.names:
                    if alias.name != "__version__":
                        yield node.lineno, longspec._HOMES.get(alias.name, alias.name)
            elif node.module and node.module.startswith("longspec."):
                yield node.lineno, unit_of(node.module)


def test_the_five_folders_exist() -> None:
    assert [name for name in FOLDERS if not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_the_folders_at_the_top(name: str) -> None:
    link = ROOT / "longspec" / name
    assert link.is_symlink(), f"longspec/{name} must be a link to ../{name} (git needs core.symlinks=true here)"
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    unit = unit_of(module_of(path))
    if not unit:
        return  # longspec/__init__.py names everything, and loads it on first use
    assert unit in STAGE_OF, f"{unit} has no place in ROOMS: give it the one that its imports need"
    allowed = NARROWER.get(unit, {name for name, stage in STAGE_OF.items() if stage < STAGE_OF[unit]})
    found = imported_units(ast.parse(path.read_text(encoding="utf-8")))
    wrong = [f"line {line}: {other}" for line, other in found if other != unit and other not in allowed]
    assert wrong == [], f"{module_of(path)} may import {sorted(allowed)} only"


# --- sizes


MOST_LINES, MOST_FUNCTION, MOST_FILES = 350, 60, 20
LOOSE = {"longspec": {"__init__.py", "types.py", "errors.py"}, "cli": {"__init__.py", "main.py", "app.py"}}

# What is larger as yet, with its lines or files. None may grow, and one that fits is to be taken out.
LARGE_FILES: dict[str, int] = {}
FULL_FOLDERS: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


def product() -> list[Path]:
    """Python and C, each file once."""
    found = {path for folder in ["longspec", *LINKED] for path in (ROOT / folder).rglob("*.[pch]*")}
    kinds = (".py", ".c", ".h")
    return sorted(path for path in found if path.suffix in kinds and path.resolve() == path)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def check_sizes(found: dict[str, int], most: int, known: dict[str, int]) -> None:
    larger = {name: size for name, size in found.items() if size > max(most, known.get(name, 0))}
    assert larger == {}, f"more than {most}, or more than it had: divide it"
    fits = [name for name in known if found.get(name, 0) <= most]
    assert fits == [], "no exception is needed any more: take it out of the list"


def test_a_file_fits_in_the_head() -> None:
    found = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in product()}
    check_sizes(found, MOST_LINES, LARGE_FILES)


def declares_options(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A command: its parameters are the options, with what is said of each."""
    return any(".command" in ast.unparse(each) for each in function.decorator_list) or any(
        "typer" in ast.unparse(argument.annotation) or "shared." in ast.unparse(argument.annotation)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None
    )


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lines of a file's functions; of one that declares options those of its body."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0].lineno if declares_options(node) else node.lineno
            yield f"{name_of(path)} {node.name}", (node.end_lineno or first) - first + 1


def c_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Of a C file: from the line that opens a function, which has its name, to the brace in the first column."""
    name, first = "", 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not name and (opened := re.match(r"[A-Za-z_].*?(\w+)\(.*", line)) and not line.rstrip().endswith(";"):
            name, first = opened[1], number
        elif name and line.startswith("}"):
            yield f"{name_of(path)} {name}", number - first + 1
            name = ""


def test_a_function_fits_on_a_screen() -> None:
    found: dict[str, int] = {}
    for path in product():
        for name, lines in functions(path) if path.suffix == ".py" else c_functions(path):
            found[name] = max(lines, found.get(name, 0))
    check_sizes(found, MOST_FUNCTION, LONG_FUNCTIONS)


@pytest.mark.parametrize("folder", LOOSE)
def test_few_files_are_loose(folder: str) -> None:
    found = {path.name for path in (ROOT / folder).iterdir() if path.suffix == ".py"}
    assert found <= LOOSE[folder], "give it a room"


def test_a_folder_can_be_looked_over() -> None:
    counts = Counter(name_of(path.parent) for path in product())
    check_sizes(counts, MOST_FILES, FULL_FOLDERS)


def test_importing_longspec_is_light() -> None:
    seen = "import longspec, sys; print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_public_names_are_listed_once() -> None:
    """The lazy table and the imports that type checkers read say the same."""
    tree = ast.parse((ROOT / "longspec" / "__init__.py").read_text(encoding="utf-8"))
    for_checkers = {
        alias.name: node.module.removeprefix("longspec.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("longspec.")
        for alias in node.names
    }
    assert for_checkers == longspec._HOMES
