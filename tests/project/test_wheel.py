"""What an installation gets: the wheel holds every module under its right name, nothing else, and each one imports."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from longspec import __version__
from longspec.kernels import build as build_module
from longspec.kernels.isa import candidates

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {"longspec": "longspec", "cache": "longspec/cache", "cli": "longspec/cli", "prompts": "longspec/prompts"}
SOURCES = [*MAPPED, "docs/man", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]

# Runs where only the unpacked wheel is importable as longspec. Warnings of other libraries' imports are theirs.
IMPORT_ALL = """
import importlib, json, sys, traceback
failed, places = {}, {}
for name in json.load(sys.stdin):
    try:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            getattr(module, public)
        places[name] = module.__file__
    except BaseException:
        failed[name] = traceback.format_exc()
print(json.dumps([failed, places]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads: building in the checkout would leave files, and could find some left there."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(tree: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a checkout with its links gives."""
    out = tmp_path_factory.mktemp("wheel")
    build(tree, out, "--wheel")
    (path,) = out.glob("*.whl")
    return path


def contents(wheel: Path) -> list[str]:
    return sorted(name for name in ZipFile(wheel).namelist() if not name.endswith("/"))


def expected(tree: Path) -> list[str]:
    """Every file of the four folders, under its installed name, and the manual pages."""
    pages = [f"longspec-{__version__}.data/data/share/man/man1/{path.name}" for path in (tree / "docs/man").iterdir()]
    files = [
        f"{installed}/{path.relative_to(tree / folder).as_posix()}"
        for folder, installed in MAPPED.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.resolve() == path.absolute()
    ]
    return sorted([*pages, *files])


def test_wheel_holds_every_file_and_nothing_else(tree: Path, wheel: Path) -> None:
    inside = contents(wheel)
    assert [name for name in inside if name.split("/")[0].endswith(".dist-info")] != []
    assert [name for name in inside if not name.split("/")[0].endswith(".dist-info")] == expected(tree)


def test_source_archive_carries_no_links_and_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    build(tree, tmp_path)  # the archive, then the wheel from the archive
    (archive,) = tmp_path.glob("*.tar.gz")
    (rebuilt,) = tmp_path.glob("*.whl")
    with tarfile.open(archive) as tar:
        assert [member.name for member in tar if not (member.isfile() or member.isdir())] == []
    assert contents(rebuilt) == contents(wheel)


def test_every_module_of_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ZipFile(wheel) as archive:
        archive.extractall(target)
    files = [name for name in contents(wheel) if name.endswith(".py")]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0, result.stderr
    failed, places = json.loads(result.stdout)
    assert failed == {}, "\n".join(failed.values())
    assert places == {module: str(target / name) for module, name in zip(modules, files, strict=True)}


def test_a_built_library_is_taken_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/wheel.py puts into a wheel: found by its sources and flags, and by nothing else."""
    source = Path(build_module.__file__).parent / "sampler.c"
    known = candidates()
    assert not isinstance(known, str)
    flags = known[0][1]
    made = tmp_path / build_module.built_name(source, flags)
    subprocess.run(["cc", *build_module.FLAGS, *flags, "-shared", str(source), "-o", str(made)], check=True)
    monkeypatch.setattr(build_module, "BUILT", tmp_path)
    monkeypatch.setenv("PATH", "")
    build_module._first.cache_clear()
    try:
        found = build_module.library("sampler.c")
        assert not isinstance(found, str)
        assert Path(found._name) == made
        made.rename(tmp_path / f"sampler-{'0' * 20}.so")
        build_module._first.cache_clear()
        assert "no C compiler" in str(build_module.library("sampler.c"))
    finally:
        build_module._first.cache_clear()


@pytest.mark.full
def test_a_wheel_with_its_kernels_needs_no_compiler(tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="the extra `wheel` isn't installed")
    machine = platform.machine()
    subprocess.run([sys.executable, ROOT / "docs/wheel.py", machine, "--output", tmp_path], check=True)
    (path,) = tmp_path.glob(f"*manylinux_2_17_{machine}.whl")
    ZipFile(path).extractall(tmp_path / "tree")
    code = "from longspec.model import native; print(native.kernel())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "tree"), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "CDLL" in done.stdout, done.stdout
